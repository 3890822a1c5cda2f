// Arithmetic of the CUDA kernels beside float64: squared distances, square roots, differences in
// two floats, rounded weights. It runs in the executor of tests/ptx.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/centering.h"
#include "cuda/launch.h"
#include "cuda/refinement.h"
#include "cuda/squared_distances.h"

extern "C" int ptx_set(const char* name, int value);  // tests/ptx/cudart.cpp

namespace pfgm {
namespace {

const CudaStream kStream{100, 0};  // the host keeps what it asked devices up to 63
constexpr int kThreads = 128;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::_Exit(1);
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  double uniform(double from, double to) {
    return from + (to - from) * std::generate_canonical<double, 53>(engine_);
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

template <class T>
std::int64_t raw(T value) {
  std::int64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

__device__ int this_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

template <class... Parameters, class... Arguments>
void for_each(std::size_t count, void (*kernel)(int, Parameters...), Arguments... arguments) {
  const auto blocks = static_cast<std::int64_t>((count + kThreads - 1) / kThreads);
  Stream(kStream).launch({"arithmetic", {blocks}, kThreads}, kernel, static_cast<int>(count),
                         arguments...);
}

// ---- squared distances ----------------------------------------------------------------------

struct Pair {
  double norm, squared[2], unit;
  float2 sum[2];
  std::int64_t tested[2];
  bool lost;  // whether a distance that is not finite is lost
};

__global__ void find_squared_distances(int count, Pair* pairs) {
  const int i = this_thread();
  if (i >= count) return;
  Pair& pair = pairs[i];
  const ReferenceNorms references(pair.squared);
  const DistanceOfQuery tested(pair.norm, pair.unit, references);
  pair.lost = false;
  for (int e = 0; e < 2; ++e) {
    pair.tested[e] = static_cast<std::int64_t>(tested(e, pair.sum[e]));
    for (const float bad : {NAN, INFINITY, -INFINITY})
      pair.lost |= tested(e, {bad, NAN}) < kInfiniteBits;
  }
}

// In two floats they are those in float64 to 2^-45 of the norms, beside a reference that is far
// away too.
void check_squared_distances() {
  Random random(1);
  const auto power = [&](double from, double to) { return std::exp2(random.uniform(from, to)); };
  std::vector<Pair> pairs(4000);
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    Pair& pair = pairs[i];
    const double scale = power(-280, 240);
    pair.norm = scale * power(-160, 0);
    pair.squared[0] = scale * power(-160, 0), pair.squared[1] = scale;
    if (i % 7 == 0) pair.norm = scale;  // equal norms, and distances from 0 to 4 of them
    if (i % 11 == 0) pair.squared[0] = 0;
    if (i % 13 == 0) pair.norm = pair.squared[0] = pair.squared[1] = 0;
    // Rows are multiplied by powers of two, so products lie in the middle of the range of float32.
    pair.unit =
        std::exp2(std::floor(std::log2(pair.norm > 0 ? std::sqrt(pair.norm * scale) : scale)) -
                  std::floor(random.uniform(0, 40)));
    for (int e = 0; e < 2; ++e) {
      const double part = i % 3 == 0 ? 1 : random.uniform(-1, 1);
      const double product = part * std::sqrt(pair.norm) * std::sqrt(pair.squared[e]) / pair.unit;
      const float high = static_cast<float>(product);
      pair.sum[e] = {high, static_cast<float>(product - high)};
    }
  }
  for_each(pairs.size(), find_squared_distances, pairs.data());
  for (const Pair& pair : pairs) {
    if (pair.lost) fail("a distance that is not finite is lost");
    for (int e = 0; e < 2; ++e) {
      const double sum = static_cast<double>(pair.sum[e].x) + pair.sum[e].y;
      const double exact = std::fmax(0, pair.squared[e] + pair.norm - 2 * pair.unit * sum);
      double tested;
      std::memcpy(&tested, &pair.tested[e], sizeof tested);
      if (!(std::fabs(tested - exact) <= 0x1p-45 * (pair.norm + pair.squared[e])))
        fail("a squared distance is wrong");
    }
  }
}

// ---- square roots -----------------------------------------------------------------------------

__global__ void find_square_roots(int count, const double* values, double* roots) {
  if (this_thread() < count) roots[this_thread()] = square_root64(values[this_thread()]);
}

// square_root64 takes the root of the digits in float32. This covers even and odd exponents, and
// digits whose root rounds up to 2.
void check_square_roots() {
  std::vector<double> values = {0};
  for (int power = -1022; power < 1024; power += 3)
    for (const double digits : {1.0, 0x1.000001p0, 0x1.6a09e6p0, 0x1.fffffep0, 0x1.fffffffffffffp0})
      values.push_back(std::ldexp(digits, power));
  std::vector<double> roots(values.size());
  for_each(values.size(), find_square_roots, values.data(), roots.data());
  if (!(roots[0] <= 0x1p-511)) fail("the square root of 0 is not small");
  for (std::size_t i = 1; i < values.size(); ++i) {
    const double root = std::sqrt(values[i]);
    if (!(std::fabs(roots[i] - root) <= 0x1p-22 * root)) fail("a square root is wrong");
  }
}

// ---- exact differences ----------------------------------------------------------------------

template <class R>
struct Difference {
  float x;
  R y;
  float unit;
  float high, low;
};

template <bool CUT, class R>
__global__ void find_squares(int count, Difference<R>* differences) {
  if (this_thread() >= count) return;
  Difference<R>& d = differences[this_thread()];
  const TwoFloats square = sum_of_squares<CUT>(&d.x, &d.y, 1, d.unit, 0);
  d.high = square.high, d.low = square.low;
}

// To the digits of two floats, whichever of the two numbers is larger, and also beside the byte
// that the other one is rounded from.
void check_differences() {
  Random random(2);
  std::vector<Difference<float>> floats(4000);
  for (std::size_t i = 0; i < floats.size(); ++i) {
    const double scale = std::exp2(random.uniform(-60, 60));
    auto& [x, y, unit, high, low] = floats[i];
    x = static_cast<float>(scale * random.normal());
    y = static_cast<float>(scale * random.normal() * std::exp2(random.uniform(-40, 40)));
    if (i % 7 == 0) y = std::nextafter(x, 0.0f);
    if (i % 11 == 0) y = -x;
    if (i % 13 == 0) x = 0;
    if (i % 17 == 0) y = 0;
    unit = std::exp2(-std::floor(std::log2(std::fmax(std::fabs(x - y), 0x1p-100f))));
  }
  for_each(floats.size(), find_squares<false, float>, floats.data());
  for (const auto& d : floats) {
    const double exact = std::pow((static_cast<double>(d.x) - d.y) * d.unit, 2);
    if (!(std::fabs(d.high + static_cast<double>(d.low) - exact) <= 0x1p-44 * exact))
      fail("a difference is wrong");
  }
  std::vector<Difference<std::uint8_t>> bytes(3 * 256);
  for (int i = 0; i < 3 * 256; ++i) {
    auto& [x, y, unit, high, low] = bytes[static_cast<std::size_t>(i)];
    y = static_cast<std::uint8_t>(i % 256), unit = 0x1p24f;
    x = static_cast<float>((2.0 * y - 255) / 255);
    if (i >= 256) x = std::nextafter(x, i < 512 ? 2.0f : -2.0f);
  }
  for_each(bytes.size(), find_squares<false, std::uint8_t>, bytes.data());
  for (const auto& d : bytes) {
    const double exact = std::pow((255.0 * d.x - (2.0 * d.y - 255)) / 255 * d.unit, 2);
    const double actual = d.high + static_cast<double>(d.low);
    if (!(actual >= 0 && std::fabs(actual - exact) <= 1e-6 * (exact + 1)))
      fail("a difference to a byte is wrong: " + std::to_string(d.y));
  }
  // A difference that float32 does not hold is not cut. One that it holds is.
  std::vector<Difference<float>> special;
  for (const auto& [x, y] :
       {std::pair(3e38f, -3e38f), std::pair(-3e38f, 3e38f), std::pair(INFINITY, 3e38f),
        std::pair(3e38f, INFINITY), std::pair(INFINITY, INFINITY), std::pair(NAN, 3e38f)})
    special.push_back({x, y, 1, 0, 0});
  special.push_back({3e38f, 0, 1, 0, 0}), special.push_back({0, 3e38f, 1, 0, 0});
  for_each(special.size(), find_squares<true, float>, special.data());
  for (std::size_t i = 0; i < special.size(); ++i)
    if (i < 6 ? std::isfinite(special[i].high) : special[i].high != 0x1p110f)
      fail("a value that is not finite, or far away: " + std::to_string(i));
}

void check_all() {
  ptx_set("anywhere", 1);
  check_squared_distances();
  check_square_roots();
  check_differences();
}

}  // namespace
}  // namespace pfgm

int main() {
  pfgm::check_all();
  std::puts("the arithmetic of the CUDA kernels is right");
}
