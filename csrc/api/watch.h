// Gives up what run_parallel() runs (parallel.h), where someone asks for it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

namespace pfgm {

// Thrown by run_parallel() when it was given up, after the tasks at hand have ended.
struct Stopped {};

// While one lives, run_parallel() in its thread asks `stop` between two tasks, every `interval`
// milliseconds at most and in that thread only, whether to give up; after an answer of true it
// throws Stopped. Tasks that call run_parallel() themselves are given up within. `stop` does not
// throw.
class Watch {
 public:
  using Stop = bool (*)();

  Watch(Stop stop, std::int64_t interval);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // Asks, if that is due and this is the thread that may; returns whether to give up.
  bool ask();
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  bool owned() const { return std::this_thread::get_id() == owner_; }

 private:
  const Stop stop_;
  const std::int64_t interval_;
  const std::thread::id owner_ = std::this_thread::get_id();
  Watch* const outer_;
  std::int64_t asked_;  // when, in milliseconds
  std::atomic<bool> stopped_{false};
};

}  // namespace pfgm
