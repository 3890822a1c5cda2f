// What the blocks of kernels do on the host, counted for tests.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace pfgm {
namespace shim {

struct LaunchCounts {
  std::string kernel;
  std::array<std::int64_t, 3> grid;
  int threads;
  std::size_t shared;  // bytes of dynamic shared memory
  // Name → the count of each block. Block (x, y, z) is at x + grid[0] (y + grid[1] z). "copied" are
  // bytes that asynchronous copies read. Other names are those of calls: barriers of the block, and
  // shuffles, votes, reductions and products of all its warps. multiply_halves counts as
  // multiply_add_halves. "wait_for_earlier_launches" counts threads, but not those that met others
  // or copied before.
  std::map<std::string, std::vector<std::int64_t>> blocks;
};

// Starts or stops to count. Returns what was counted since the last call, launches in order.
std::vector<LaunchCounts> count(bool on);

}  // namespace shim
}  // namespace pfgm
