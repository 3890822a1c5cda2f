#include "cpu/workspace.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pfgm {
#ifdef PFGM_SANITIZE

// Keeps and rounds up nothing, so that sanitizers see every access beyond the end.
void* acquire_workspace(std::size_t bytes, std::size_t* capacity) {
  *capacity = bytes;
  void* memory = nullptr;
  return posix_memalign(&memory, 64, std::max<std::size_t>(bytes, 1)) == 0 ? memory : nullptr;
}

void release_workspace(void* block, std::size_t) { std::free(block); }

#else

namespace {

constexpr std::size_t kMaxKeptBytes = 48 << 20;
constexpr std::size_t kHugePageBytes = 2 << 20;

struct Block {
  void* memory;
  std::size_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> idle;  // the longest idle first
  std::size_t kept = 0;     // idle bytes
  std::size_t used = 0;     // bytes in use

  // Frees idle blocks until `more` bytes fit into kMaxKeptBytes, or none is left.
  void make_room(std::size_t more) {
    while (!idle.empty() && kept + used + more > kMaxKeptBytes) {
      std::free(idle.front().memory);
      kept -= idle.front().capacity;
      idle.erase(idle.begin());
    }
  }
};

// Never destroyed: a thread may still compute while the process exits. Created when the library is
// loaded: a fork during its creation in another thread would leave the child waiting forever.
Pool& pool = *new Pool;

// A child has only the thread that forked. If another thread held the lock, it would stay locked,
// so the fork waits for the lock. Blocks in use by other threads are lost to the child, like their
// stacks.
[[maybe_unused]] const int registered =
    pthread_atfork([] { pool.mutex.lock(); }, [] { pool.mutex.unlock(); },
                   [] {
                     pool.used = 0;
                     pool.mutex.unlock();
                   });

void* allocate(std::size_t capacity) {
  if (capacity < kHugePageBytes) return std::aligned_alloc(64, capacity);
  void* memory = std::aligned_alloc(kHugePageBytes, capacity);
#ifdef __linux__
  // Rows lie pages apart, more of them than the TLB holds small pages.
  if (memory != nullptr) madvise(memory, capacity, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace

void* acquire_workspace(std::size_t bytes, std::size_t* capacity) {
  alignas(64) static char nothing;  // a block of no bytes
  const std::size_t unit = bytes < kHugePageBytes ? 4096 : kHugePageBytes;
  *capacity = (bytes + unit - 1) / unit * unit;
  if (*capacity == 0) return &nothing;
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    pool.used += *capacity;
    const auto fitting = std::find_if(pool.idle.begin(), pool.idle.end(), [&](const Block& block) {
      return block.capacity == *capacity;
    });
    if (fitting != pool.idle.end()) {
      void* memory = fitting->memory;
      pool.kept -= *capacity;
      pool.idle.erase(fitting);
      return memory;
    }
    pool.make_room(0);
  }
  return allocate(*capacity);
}

void release_workspace(void* block, std::size_t capacity) {
  if (capacity == 0) return;
  const std::lock_guard<std::mutex> lock(pool.mutex);
  pool.used -= capacity;
  if (block == nullptr) return;
  pool.make_room(capacity);
  if (pool.kept + pool.used + capacity > kMaxKeptBytes) {
    std::free(block);
    return;
  }
  pool.idle.push_back({block, capacity});
  pool.kept += capacity;
}

#endif

}  // namespace pfgm
