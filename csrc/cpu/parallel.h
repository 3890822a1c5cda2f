// Runs numbered tasks on several threads.
#pragma once
#include <cstdint>

namespace pfgm {

using Task = void (*)(void* context, std::int64_t task, int thread);

// Calls run(context, task, thread) once for each task = 0 … tasks − 1, in any order, and returns
// when all are done; throws Stopped where they were given up (watch.h). `thread`, below `threads`,
// is never the same in two calls that run at once. Uses OpenMP's pool (the one torch uses) where it
// was found, else std::thread; in a forked child, where the threads of that pool are missing, the
// calling thread alone.
void run_parallel(std::int64_t tasks, int threads, Task run, void* context);

}  // namespace pfgm
