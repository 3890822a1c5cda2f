// Memory for the kernels to work in.
#pragma once
#include <cstddef>

namespace pfgm {

// Returns at least `bytes` bytes on a 64-byte boundary, not initialised, or null. `capacity`
// becomes the size of the block; pass both to release_workspace(), also if the block is null.
// Released blocks are kept for the next call, up to 48 MiB together with those in use. Otherwise
// the system would map and clear the same pages in every training step.
void* acquire_workspace(std::size_t bytes, std::size_t* capacity);
void release_workspace(void* block, std::size_t capacity);

}  // namespace pfgm
