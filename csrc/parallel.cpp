#include "parallel.h"

#include <algorithm>
#ifdef _OPENMP
#include <omp.h>
#else
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace pfgm {

void run_parallel(std::int64_t tasks, int threads, Task run, void* context) {
  threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, tasks)));
  if (threads == 1) {
    for (std::int64_t task = 0; task < tasks; ++task) run(context, task, 0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t task = 0; task < tasks; ++task) run(context, task, omp_get_thread_num());
#else
  std::atomic<std::int64_t> next{0};
  const auto work = [&](int thread) {
    for (std::int64_t task; (task = next.fetch_add(1)) < tasks;) run(context, task, thread);
  };
  std::vector<std::thread> pool;
  for (int thread = 1; thread < threads; ++thread) pool.emplace_back(work, thread);
  work(0);
  for (auto& thread : pool) thread.join();
#endif
}

}  // namespace pfgm
