// Preloaded into a program, this remembers where its aligned allocations begin and end: torch's
// tensors in CPU memory, which stand for tensors on a device. Each has a gap behind it and holds
// NaN at first. The executor asks for them (run.cpp).
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr std::size_t kGap = 4096, kAligned = 64;

// Never destroyed: memory is freed also while the program ends.
struct Allocations {
  std::mutex mutex;
  std::map<std::uintptr_t, std::size_t> bytes;
  void (*freed)(void*) = nullptr;
};
Allocations& allocations() {
  static auto* const all = new Allocations;
  return *all;
}

// Whether this thread is in here, and what it frees is of the map.
thread_local bool inside = false;

}  // namespace

extern "C" {

// The C library's own. What dlsym finds could not be asked for in `free`, which dlsym calls.
void* __libc_memalign(std::size_t alignment, std::size_t bytes);
void __libc_free(void* at);

int posix_memalign(void** to, std::size_t alignment, std::size_t bytes) {
  const bool counts = alignment >= kAligned;
  void* const at = __libc_memalign(alignment, counts ? bytes + kGap : bytes);
  if (at == nullptr) return ENOMEM;
  *to = at;
  if (!counts) return 0;
  std::memset(at, 0xff, bytes + kGap);
  Allocations& all = allocations();
  const std::lock_guard<std::mutex> lock(all.mutex);
  inside = true;
  all.bytes[reinterpret_cast<std::uintptr_t>(at)] = bytes;
  inside = false;
  return 0;
}

void free(void* at) {
  const auto address = reinterpret_cast<std::uintptr_t>(at);
  if (at != nullptr && address % kAligned == 0 && !inside) {
    Allocations& all = allocations();
    const std::lock_guard<std::mutex> lock(all.mutex);
    inside = true;
    if (all.bytes.erase(address) != 0 && all.freed != nullptr) all.freed(at);
    inside = false;
  }
  __libc_free(at);
}

// The allocation that an address lies in, or is less than a gap behind. False if there is none.
bool ptx_allocation(std::uintptr_t at, std::uintptr_t* from, std::size_t* bytes) {
  Allocations& all = allocations();
  const std::lock_guard<std::mutex> lock(all.mutex);
  auto found = all.bytes.upper_bound(at);
  if (found == all.bytes.begin()) return false;
  --found;
  *from = found->first, *bytes = found->second;
  return at < found->first + found->second + kGap;
}

// Calls `freed` before an allocation is freed.
void ptx_watch(void (*freed)(void*)) { allocations().freed = freed; }
}
