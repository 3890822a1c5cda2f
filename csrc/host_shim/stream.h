// Stream for the host. cuda/launch.h includes this after Grid and Launch. A launch runs the whole
// grid before it returns.
#pragma once
#include <functional>
#include <tuple>

namespace pfgm {
namespace shim {

struct Device {
  int multiprocessors, capability;
  std::size_t shared_limit;
  int l2_cache;
};
Device device();

// Calls `thread` once for each thread of the grid.
void run(const Launch& shape, const std::function<void()>& thread);

}  // namespace shim

class Stream {
 public:
  explicit Stream(const CudaPlace&) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int multiprocessors() const { return shim::device().multiprocessors; }
  int l2_cache() const { return shim::device().l2_cache; }
  template <class... Parameters>
  bool warpgroups(void (*)(Parameters...)) const {
    return shim::device().capability == 90;
  }
  template <class... Parameters>
  bool geforce(void (*)(Parameters...)) const {
    const int capability = shim::device().capability;
    return capability == 86 || capability == 89 || capability >= 120;
  }
  template <class... Parameters>
  int architecture(const char*, void (*)(Parameters...)) const {
    return shim::device().capability;
  }
  std::size_t shared_limit() const { return shim::device().shared_limit; }

  template <class... Parameters, class... Arguments>
  void launch(const Launch& shape, void (*kernel)(Parameters...), Arguments... arguments) const {
    if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
    const std::tuple<Parameters...> held(static_cast<Parameters>(arguments)...);
    shim::run(shape, [&] { std::apply(kernel, held); });
  }
};

}  // namespace pfgm
