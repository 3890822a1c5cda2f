// Memory for the kernels to work in.
#pragma once
#include <cstddef>

namespace pfgm {

// At least `bytes` bytes on a 64-byte boundary, not initialised, or null; `capacity` is what it
// became, to be handed back with it, null or not. Blocks that come back are kept for the next call,
// 48 MiB at most with those in use: a training step would else have the system map and clear the
// same pages every time.
void* acquire_workspace(std::size_t bytes, std::size_t* capacity);
void release_workspace(void* block, std::size_t capacity);

}  // namespace pfgm
