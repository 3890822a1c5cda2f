#include "host_shim/accesses.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace pfgm {
namespace shim {
namespace {

constexpr std::size_t kWarp = 32, kBanks = 32;
constexpr std::int64_t kWord = 4;
constexpr std::int64_t kTransfer = 32;
constexpr int kLargest = 16;      // bytes that one instruction accesses, of a lane
constexpr int kNeighbours = 256;  // bytes of code between accesses of one struct

struct Access {
  AccessKind kind;
  const char* code;
  std::size_t at;
  int bytes;
};

// What the lanes of a warp access until they meet.
struct Stretch {
  std::array<std::vector<Access>, kWarp> lanes;
  std::size_t ended = 0;
};

using Place = std::tuple<const char*, AccessKind, int>;  // code, kind, bytes of a lane

std::map<unsigned, Stretch> stretches;  // by warp
std::map<Place, Traffic> counted;

std::int64_t different(std::vector<std::int64_t>& values) {
  std::sort(values.begin(), values.end());
  return std::unique(values.begin(), values.end()) - values.begin();
}

std::int64_t most_words_in_a_bank(const std::int64_t* at, std::size_t lanes, int bytes) {
  std::array<std::vector<std::int64_t>, kBanks> banks;
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    if (at[lane] < 0) continue;
    for (std::int64_t word = at[lane] / kWord; word * kWord < at[lane] + bytes; ++word) {
      auto& words = banks[static_cast<std::size_t>(word) % kBanks];
      if (std::find(words.begin(), words.end(), word) == words.end()) words.push_back(word);
    }
  }
  std::size_t most = 0;
  for (const auto& words : banks) most = std::max(most, words.size());
  return static_cast<std::int64_t>(most);
}

// Whether two accesses of a lane are halves of one of twice as many bytes. Unoptimised code writes
// a struct member by member, where a GPU needs one instruction.
bool are_halves(const Access& first, const Access& second) {
  const auto size = static_cast<std::size_t>(first.bytes);
  const bool copies = first.kind == AccessKind::copy || first.kind == AccessKind::global_copy;
  return first.kind == second.kind && !copies && first.bytes == second.bytes &&
         first.bytes < kLargest && second.at == first.at + size && first.at % (2 * size) == 0 &&
         first.code < second.code && second.code < first.code + kNeighbours;
}

std::vector<Access> joined(std::vector<Access> accesses) {
  for (int bytes = 1; bytes < kLargest; bytes *= 2) {
    std::vector<Access> result;
    for (const Access& each : accesses) {
      if (!result.empty() && each.bytes == bytes && are_halves(result.back(), each))
        result.back().bytes *= 2;
      else
        result.push_back(each);
    }
    accesses = std::move(result);
  }
  return accesses;
}

void count(Stretch& stretch) {
  std::map<std::pair<Place, int>, LaneAddresses> found;  // by place, and how often before
  for (std::size_t lane = 0; lane < kWarp; ++lane) {
    std::map<Place, int> before;
    for (const Access& each : joined(stretch.lanes[lane])) {
      const Place place{each.code, each.kind, each.bytes};
      const auto [access, fresh] = found.try_emplace({place, before[place]++});
      if (fresh) access->second.fill(-1);
      access->second[lane] = static_cast<std::int64_t>(each.at);
    }
    stretch.lanes[lane].clear();
  }
  for (const auto& [key, at] : found) {
    const Place& place = key.first;
    const auto [code, kind, bytes] = place;
    const bool shared = kind < AccessKind::global_load;
    const Traffic more = shared ? wavefronts(at, bytes) : transfers(at, bytes);
    Traffic& sum = counted[place];
    sum.least += more.least, sum.all += more.all;
  }
  stretch.ended = 0;
}

void note(AccessKind shared, AccessKind global, const void* code, const void* address,
          std::size_t bytes) {
  if (!counts_accesses() || is_on_stack(address)) return;
  const std::int64_t at = place_in_shared(address, bytes);
  const auto place =
      at >= 0 ? static_cast<std::size_t>(at) : reinterpret_cast<std::size_t>(address);
  note_access(at >= 0 ? shared : global, code, running_thread(), place, static_cast<int>(bytes));
}

void note_load(const void* code, const void* address, std::size_t bytes) {
  note(AccessKind::load, AccessKind::global_load, code, address, bytes);
}
void note_store(const void* code, const void* address, std::size_t bytes) {
  note(AccessKind::store, AccessKind::global_store, code, address, bytes);
}

}  // namespace

Traffic wavefronts(const LaneAddresses& at, int bytes) {
  const std::size_t together =
      std::min(kWarp, kBanks * static_cast<std::size_t>(kWord) / static_cast<std::size_t>(bytes));
  Traffic sum;
  for (std::size_t lane = 0; lane < kWarp; lane += together) {
    const std::int64_t turns = most_words_in_a_bank(&at[lane], together, bytes);
    sum.least += turns > 0;
    sum.all += turns;
  }
  return sum;
}

Traffic transfers(const LaneAddresses& at, int bytes) {
  std::vector<std::int64_t> known, moved;
  for (const std::int64_t first : at) {
    if (first < 0) continue;
    known.push_back(first);
    for (std::int64_t each = first / kTransfer; each * kTransfer < first + bytes; ++each)
      moved.push_back(each);
  }
  return {(different(known) * bytes + kTransfer - 1) / kTransfer, different(moved)};
}

std::size_t place_of_code(const void* code) {
  Dl_info library;
  if (dladdr(code, &library) == 0) return 0;
  return static_cast<std::size_t>(static_cast<const char*>(code) -
                                  static_cast<const char*>(library.dli_fbase));
}

void note_access(AccessKind kind, const void* code, unsigned thread, std::size_t at, int bytes) {
  auto& lane = stretches[thread / kWarp].lanes[thread % kWarp];
  const bool whole = bytes <= kLargest && (bytes & (bytes - 1)) == 0;
  const int each = whole ? bytes : static_cast<int>(kWord);  // other structs go word by word
  for (int done = 0; done < bytes; done += each)
    lane.push_back(
        {kind, static_cast<const char*>(code), at + static_cast<std::size_t>(done), each});
}

void end_of_stretch(unsigned thread) {
  Stretch& stretch = stretches[thread / kWarp];
  if (++stretch.ended == kWarp) count(stretch);
}

std::vector<AccessCounts> take_accesses() {
  std::vector<AccessCounts> result;
  for (const auto& [place, sum] : counted) {
    const auto& [code, kind, bytes] = place;
    result.push_back({place_of_code(code), kind, bytes, sum});
  }
  counted.clear();
  return result;
}

}  // namespace shim
}  // namespace pfgm

// ---- what -fsanitize=thread calls ------------------------------------------------------------

using pfgm::shim::note_load;
using pfgm::shim::note_store;

extern "C" {

void __tsan_init() {}

#define PFGM_HOOKS(BYTES)                                                                  \
  void __tsan_read##BYTES(void* at) { note_load(__builtin_return_address(0), at, BYTES); } \
  void __tsan_write##BYTES(void* at) { note_store(__builtin_return_address(0), at, BYTES); }
PFGM_HOOKS(1)
PFGM_HOOKS(2)
PFGM_HOOKS(4)
PFGM_HOOKS(8)
PFGM_HOOKS(16)
#undef PFGM_HOOKS

void __tsan_read_range(void* at, std::size_t bytes) {
  note_load(__builtin_return_address(0), at, bytes);
}
void __tsan_write_range(void* at, std::size_t bytes) {
  note_store(__builtin_return_address(0), at, bytes);
}

// Atomic operations of kernels are those on global memory; they are not counted.
std::uint32_t __tsan_atomic32_fetch_add(std::uint32_t* at, std::uint32_t value, int) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
std::uint64_t __tsan_atomic64_load(const std::uint64_t* at, int) {
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}
int __tsan_atomic64_compare_exchange_weak(std::uint64_t* at, std::uint64_t* expected,
                                          std::uint64_t value, int, int) {
  return __atomic_compare_exchange_n(at, expected, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

}  // extern "C"
