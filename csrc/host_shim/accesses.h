// What warps access in shared and global memory, counted for tests.
//
// Built with PFGM_SHIM_ACCESSES, the code of kernels calls the hooks of ThreadSanitizer for each
// access, and accesses.cpp takes the place of ThreadSanitizer. Accesses of several lanes are those
// of one instruction if the lanes make them at the same place of the code, and as often since their
// warp last met. So an access under a condition in a loop is counted too few times if lanes make it
// in different trips. What a kernel passes to a function by value is not
// seen, so kernels copy it from shared memory first. Nor are atomic operations and the operands of
// products of warpgroups.
//
// Shared memory has 32 banks of 4 bytes. An access takes as many wavefronts as the largest number
// of different words in one bank. With 8 bytes a lane half a warp is served at a time, with 16
// bytes a quarter (CUDA C++ Programming Guide, shared memory). Global memory moves in transfers of
// 32 bytes.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pfgm {
namespace shim {

// Of shared memory, then of global memory. A copy is what an asynchronous copy writes, or reads.
enum class AccessKind { load, store, copy, global_load, global_store, global_copy };

// Wavefronts or transfers.
struct Traffic {
  std::int64_t least = 0, all = 0;  // those that the bytes need, and all
};

// By lane, in bytes; −1 for lanes that do not take part.
using LaneAddresses = std::array<std::int64_t, 32>;
Traffic wavefronts(const LaneAddresses& at, int bytes);
Traffic transfers(const LaneAddresses& at, int bytes);

// The accesses of a launch at one place of the code, with the same number of bytes a lane.
struct AccessCounts {
  std::size_t place;  // as place_of_code gives it
  AccessKind kind;
  int bytes;
  Traffic traffic;
};

#ifdef PFGM_SHIM_ACCESSES
// Bytes from the start of the library.
std::size_t place_of_code(const void* code);
void note_access(AccessKind kind, const void* code, unsigned thread, std::size_t at, int bytes);
// The thread meets others, or ends.
void end_of_stretch(unsigned thread);
// What has been noted since the last call.
std::vector<AccessCounts> take_accesses();
#else
inline std::size_t place_of_code(const void*) { return 0; }
inline void note_access(AccessKind, const void*, unsigned, std::size_t, int) {}
inline void end_of_stretch(unsigned) {}
inline std::vector<AccessCounts> take_accesses() { return {}; }
#endif

// What fibers.cpp knows: whether accesses are counted, the running thread, whether memory is its
// own stack, and where memory is in the shared memory of its block, or −1.
bool counts_accesses();
unsigned running_thread();
bool is_on_stack(const void* address);
std::int64_t place_in_shared(const void* address, std::size_t bytes);

}  // namespace shim
}  // namespace pfgm
