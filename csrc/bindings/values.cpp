// Questions about the values of a tensor in CPU memory.
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

// A number that changes with any byte of a window of 64 bytes: of all that the memory has, or of
// 256 that are spread over it if there are more. Where such a window lies in its share of the
// memory looks random, so that windows do not follow the rows. Changes in a tenth of the rows
// escape 256 windows with a chance of 0.9^256 = 2e-12.
std::uint64_t sample(Address values, Index bytes) {
  constexpr Index kWindow = 64, kWindows = 256, kWords = 8;
  constexpr std::uint64_t kMixing = 0x9e3779b97f4a7c15u;
  const auto* memory = pointer<const unsigned char>(values);
  if (memory == nullptr) return 0;
  std::uint64_t sums[kWords] = {}, key = 0;
  const auto take = [&](const unsigned char* window) {
    std::uint64_t words[kWords];
    std::memcpy(words, window, kWindow);
    key += kMixing;  // the place counts
    // Products of halves are vectors in any instruction set.
    for (Index i = 0; i < kWords; ++i) {
      const std::uint64_t mixed = words[i] ^ key;
      sums[i] += words[i] + (mixed & 0xffffffffu) * (mixed >> 32);
    }
  };
  if (bytes <= kWindows * kWindow) {
    const Index whole = bytes / kWindow * kWindow;
    for (Index i = 0; i < whole; i += kWindow) take(memory + i);
    unsigned char rest[kWindow] = {};
    std::memcpy(rest, memory + whole, bytes - whole);
    take(rest);
  } else {
    for (Index w = 0; w < kWindows; ++w) {
      const Index begin = bytes * w / kWindows, end = bytes * (w + 1) / kWindows;
      const Index starts = end - begin - kWindow + 1;
      take(memory + begin + static_cast<Index>((w * kMixing >> 32) % starts));
    }
  }
  std::uint64_t sum = 0;
  for (Index i = 0; i < kWords; ++i) sum = ((sum ^ (sum >> 32)) + sums[i]) * kMixing;
  return sum;
}

}  // namespace

void bind_values(py::module_& module) {
  module.def("all_finite", &all_finite_of);
  module.def("sample", &sample);
}

}  // namespace pfgm
