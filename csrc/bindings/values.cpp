// Questions about the values of a tensor in CPU memory.
#include <algorithm>
#include <cstring>

#include "bindings/direct.h"
#include "bindings/interruptible.h"

namespace pfgm {
namespace {

using Index = std::int64_t;

// ---- finite values --------------------------------------------------------------------------

// Whether x − x is 0 for all values: it is NaN for NaN and for infinity.
template <class T>
bool all_finite(const T* values, Index count) {
  constexpr Index kLanes = 16;
  T off[kLanes] = {};
  Index i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (Index lane = 0; lane < kLanes; ++lane) off[lane] += values[i + lane] - values[i + lane];
  for (; i < count; ++i) off[0] += values[i] - values[i];
  for (Index lane = 1; lane < kLanes; ++lane) off[0] += off[lane];
  return off[0] == 0;
}

bool all_finite_of(int type, Address values, Index count) {
  return static_cast<Type>(type) == Type::float64 ? all_finite(pointer<const double>(values), count)
                                                  : all_finite(pointer<const float>(values), count);
}

// ---- a sample of memory ---------------------------------------------------------------------

// A number that changes with any byte of a window of 64 bytes: of the 16 to 64 windows that are
// spread over the memory, or of all bytes if they are few. Where a window lies in its share of the
// memory looks random, so that windows do not follow the rows.
std::uint64_t sample(Address values, Index bytes) {
  constexpr Index kWindow = 64, kFew = 1024, kBytesPerWindow = 8192, kFewest = kFew / kWindow,
                  kMost = 64;
  constexpr std::uint64_t kMixing = 0x9e3779b97f4a7c15u;
  const auto* memory = pointer<const unsigned char>(values);
  if (memory == nullptr) return 0;
  std::uint64_t sum = 0;
  const auto take = [&sum, memory](Index begin, Index end) {
    for (Index i = begin; i < end; i += sizeof sum) {
      std::uint64_t word = 0;
      std::memcpy(&word, memory + i, std::min<Index>(sizeof word, end - i));
      sum = (sum ^ word) * kMixing;
      sum ^= sum >> 32;
    }
  };
  if (bytes <= kFew) {
    take(0, bytes);
    return sum;
  }
  const Index windows = std::clamp(bytes / kBytesPerWindow, kFewest, kMost);
  for (Index w = 0; w < windows; ++w) {
    const Index begin = bytes * w / windows, end = bytes * (w + 1) / windows;
    const Index starts = end - begin - kWindow + 1;
    const Index start = begin + static_cast<Index>((w * kMixing >> 32) % starts);
    take(start, start + kWindow);
  }
  return sum;
}

}  // namespace

void bind_values(py::module_& module) {
  module.def("all_finite", &all_finite_of);
  module.def("sample", &sample);
}

}  // namespace pfgm
