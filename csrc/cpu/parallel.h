// Runs numbered tasks on several threads.
#pragma once
#include <cstdint>

namespace pfgm {

using Task = void (*)(void* context, std::int64_t task, int thread);

// Calls run(context, task, thread) once for each task = 0 … tasks − 1, in any order, and returns
// when all are done. Two calls that run at once have different values of `thread`, all below
// `threads`. Throws Stopped if a Watch stops it (api/watch.h).
//
// Uses the pool of torch's OpenMP if there is one, else std::thread. A forked child lacks
// the threads of that pool; there the calling thread runs all tasks.
void run_parallel(std::int64_t tasks, int threads, Task run, void* context);

}  // namespace pfgm
