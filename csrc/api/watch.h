// Stops run_parallel() (cpu/parallel.h) on request.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

namespace pfgm {

// Thrown by run_parallel() when it was stopped. No task is running any more.
struct Stopped {};

// While a Watch lives, run_parallel() in its thread calls `stop` between tasks, at most once per
// `interval` milliseconds and only from that thread. Once `stop` has returned true, run_parallel()
// throws Stopped, also where tasks call run_parallel() themselves. `stop` must not throw.
class Watch {
 public:
  using Stop = bool (*)();

  Watch(Stop stop, std::int64_t interval);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // Calls `stop` if it is due and this is the owner's thread; returns whether to stop.
  bool ask();
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  bool owned() const { return std::this_thread::get_id() == owner_; }

 private:
  const Stop stop_;
  const std::int64_t interval_;
  const std::thread::id owner_ = std::this_thread::get_id();
  Watch* const outer_;
  std::int64_t asked_;  // time of the last call of `stop`, in milliseconds
  std::atomic<bool> stopped_{false};
};

}  // namespace pfgm
