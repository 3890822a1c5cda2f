#include "cpu/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <ctime>
#include <mutex>
#include <thread>
#include <vector>

#include "api/watch.h"

// The OpenMP runtime that torch has loaded, found when the extension is loaded. Linked libraries
// could bring a second one with threads of its own. Null if there is none, as in the tests for
// sanitizers, which do not see how OpenMP synchronises.
#ifdef __ELF__
extern "C" {
[[gnu::weak]] void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);
[[gnu::weak]] int omp_get_thread_num();
}
#endif

namespace pfgm {
namespace {

constexpr int kYields = 200;  // before a thread sleeps until the others are done
constexpr std::chrono::milliseconds kSleep{20};

std::atomic<bool> in_forked_child{false};
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

thread_local Watch* watch_of_thread = nullptr;

std::int64_t milliseconds() {
#ifdef CLOCK_MONOTONIC_COARSE
  // Takes a few nanoseconds. It is called between tasks that may be short.
  timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return std::int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1000000;
#else
  using namespace std::chrono;
  return duration_cast<std::chrono::milliseconds>(steady_clock::now().time_since_epoch()).count();
#endif
}

// The tasks of one call. Each thread takes one after the other.
class Team {
 public:
  Team(std::int64_t tasks, Task run, void* context, Watch* watch)
      : tasks_(tasks), run_(run), context_(context), watch_(watch) {}

  void work(int thread) {
    if (watch_ == nullptr) {
      for (std::int64_t task; (task = next_.fetch_add(1)) < tasks_;) run_(context_, task, thread);
      return;
    }
    Watch* const before = watch_of_thread;
    watch_of_thread = watch_;
    try {
      for (std::int64_t task; !watch_->ask() && (task = next_.fetch_add(1)) < tasks_;) {
        run_(context_, task, thread);
        if (ended_.fetch_add(1) + 1 == tasks_) wake();
      }
    } catch (const Stopped&) {
    }
    watch_of_thread = before;
    if (watch_->owned()) wait();
  }

 private:
  // The owner of the watch keeps asking while the last tasks of other threads run.
  void wait() {
    for (int i = 0; i < kYields && ended_ < tasks_; ++i) std::this_thread::yield();
    std::unique_lock<std::mutex> lock(mutex_);
    while (ended_ < tasks_ && !watch_->ask()) all_ended_.wait_for(lock, kSleep);
  }

  void wake() {
    const std::lock_guard<std::mutex> lock(mutex_);
    all_ended_.notify_one();
  }

  const std::int64_t tasks_;
  const Task run_;
  void* const context_;
  Watch* const watch_;
  alignas(64) std::atomic<std::int64_t> next_{0};
  std::atomic<std::int64_t> ended_{0};
  std::mutex mutex_;
  std::condition_variable all_ended_;
};

void run_threads(Team& team, int threads) {
#ifdef __ELF__
  if (GOMP_parallel != nullptr && omp_get_thread_num != nullptr) {
    const auto work = [](void* team) { static_cast<Team*>(team)->work(omp_get_thread_num()); };
    GOMP_parallel(work, &team, static_cast<unsigned>(threads), 0);
    return;
  }
#endif
  std::vector<std::thread> pool;
  for (int thread = 1; thread < threads; ++thread)
    pool.emplace_back([&team, thread] { team.work(thread); });
  team.work(0);
  for (auto& thread : pool) thread.join();
}

void run_alone(std::int64_t tasks, Task run, void* context, Watch* watch) {
  for (std::int64_t task = 0; task < tasks; ++task) {
    if (watch != nullptr && watch->ask()) throw Stopped();
    run(context, task, 0);
  }
}

}  // namespace

Watch::Watch(Stop stop, std::int64_t interval)
    : stop_(stop), interval_(interval), outer_(watch_of_thread), asked_(milliseconds()) {
  watch_of_thread = this;
}

Watch::~Watch() { watch_of_thread = outer_; }

bool Watch::ask() {
  if (stopped() || !owned()) return stopped();
  if (milliseconds() - asked_ < interval_) return false;
  Watch* const before = watch_of_thread;
  watch_of_thread = nullptr;  // `stop` may call run_parallel() itself
  stopped_ = stop_();
  watch_of_thread = before;
  asked_ = milliseconds();
  return stopped();
}

void run_parallel(std::int64_t tasks, int threads, Task run, void* context) {
  Watch* const watch = watch_of_thread;
  threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, tasks)));
  if (threads == 1 || in_forked_child) return run_alone(tasks, run, context, watch);
  Team team(tasks, run, context, watch);
  run_threads(team, threads);
  if (watch != nullptr && watch->stopped()) throw Stopped();
}

}  // namespace pfgm
