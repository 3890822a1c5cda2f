// The CUDA kernels on the host, through the shim, against plain formulas, for builds with a
// sanitizer. The order of threads and blocks must not change a bit, nor must distances that are
// kept for the backward pass.
#include <algorithm>
#include <numeric>

#include "api/levels.h"
#include "api/normalised_field.h"
#include "cuda/centering.h"
#include "cuda/launch.h"
#include "cuda/refinement.h"
#include "cuda/squared_distances.h"
#include "host_shim/intrinsics.h"
#include "tests/problems.h"

// Under ThreadSanitizer a thread of a kernel takes ten times as long.
#ifdef __SANITIZE_THREAD__
constexpr bool kFew = true;
#else
constexpr bool kFew = false;
#endif

namespace {

using namespace pfgm;

const CudaPlace kPlace{0, 0};

// ---- the implementation ---------------------------------------------------------------------

Matrix workspace_of(const Problem& problem, bool backward, const Kept& kept) {
  const std::size_t bytes = posterior_mean_workspace_cuda(problem, kPlace, backward, kept.bytes);
  return Matrix(Type::uint8, 1, static_cast<Index>(bytes));
}

// With `keeps`, a backward pass takes the distances of the forward pass before it, if that could
// keep them.
Implementation cuda(const std::string& name, bool keeps) {
  const auto memory = std::make_shared<Matrix>(Type::uint8, 1, 1);
  const auto kept_of = [keeps, memory](const Problem& problem) {
    const Index bytes = keeps ? posterior_mean_kept_cuda(problem) : 0;
    return bytes > 0 ? Kept{memory->data(), bytes} : Kept();
  };
  const auto forward = [memory, kept_of](const Problem& problem, Forward out) {
    *memory = Matrix(Type::uint8, 1, 1 + posterior_mean_kept_cuda(problem));
    out.kept = kept_of(problem);
    const Matrix workspace = workspace_of(problem, false, out.kept);
    posterior_mean_cuda(problem, out, kPlace, {workspace.data(), workspace.bytes()});
    return Status();
  };
  const auto backward = [kept_of](const Problem& problem, Backward io) {
    io.kept = kept_of(problem);
    const Matrix workspace = workspace_of(problem, true, io.kept);
    posterior_mean_backward_cuda(problem, io, kPlace, {workspace.data(), workspace.bytes()});
    return Status();
  };
  return {name,    1e-5,     1e-5,
          forward, backward, [](const OdeStep& step) { ode_step_cuda(step, kPlace); }};
}

using Orders = std::vector<unsigned>;
const Orders kAllOrders = {0, 1, 7};  // ascending, descending, random

Orders one_of_all(std::size_t turn) { return {kAllOrders[turn % kAllOrders.size()]}; }

template <class Run>
void run_in(const Orders& orders, const Run& run) {
  const auto run_in_order = [&](unsigned order) {
    shim::set_order(order);
    return run(cuda("order " + std::to_string(order), order % 2 == 0));
  };
  const auto first = run_in_order(orders[0]);
  for (std::size_t i = 1; i < orders.size(); ++i)
    if (!run_in_order(orders[i]).same_bits(first))
      fail("order " + std::to_string(orders[i]) + " changes bits");
}

// Sets the device and the limits of blocks and chunks until the end of a scope.
struct Setting {
  Setting(int capability, int multiprocessors, const CudaLimits& limits = {}) {
    shim::set_device(multiprocessors, capability, (capability < 90 ? 163 : 227) << 10);
    limit_cuda(limits);
  }
  ~Setting() {
    shim::set_device(4, 90, 227 << 10);
    limit_cuda({});
  }
};

// ---- squared distances ----------------------------------------------------------------------

// Those of GeForce cards, in two floats, are those in float64 to 2^-45 of the
// norms, beside a reference that is far away too.
void check_squared_distances() {
  Random random(1);
  const auto power = [&](double from, double to) { return std::exp2(random.uniform(from, to)); };
  for (int i = 0; i < 20000; ++i) {
    const double scale = power(-280, 240);
    double norm = scale * power(-160, 0), squared[2] = {scale * power(-160, 0), scale};
    if (i % 7 == 0) norm = scale;  // equal norms, and distances from 0 to 4 of them
    if (i % 11 == 0) squared[0] = 0;
    if (i % 13 == 0) norm = squared[0] = squared[1] = 0;
    // Rows are multiplied by powers of two, so products lie in the middle of the range of float32.
    const double unit =
        std::exp2(std::floor(std::log2(norm > 0 ? std::sqrt(norm * scale) : scale)) -
                  std::floor(random.uniform(0, 40)));
    const ReferenceNorms<false> references(squared);
    const ReferenceNorms<true> of_geforce(squared);
    const DistanceOfQuery<false> exact(norm, unit, references);
    const DistanceOfQuery<true> tested(norm, unit, of_geforce);
    for (int e = 0; e < 2; ++e) {
      const double part = i % 3 == 0 ? 1 : random.uniform(-1, 1);
      const double product = part * std::sqrt(norm) * std::sqrt(squared[e]) / unit;
      const float high = static_cast<float>(product);
      const float2 sum = {high, static_cast<float>(product - high)};
      const double found = double_of(static_cast<std::int64_t>(tested(e, sum)));
      const double expected = double_of(static_cast<std::int64_t>(exact(e, sum)));
      if (!(std::fabs(found - expected) <= 0x1p-45 * (norm + squared[e])))
        fail("a squared distance is wrong: " + std::to_string(i));
      for (const float bad : {NAN, INFINITY, -INFINITY})
        if (tested(e, {bad, NAN}) < kInfiniteBits) fail("a distance that is not finite is lost");
    }
  }
}

// ---- centred queries ------------------------------------------------------------------------

constexpr Index kSplitRows = 3;

// The rows' two parts, their units and the scales are bit by bit what the rule says.
template <bool CENTERED>
void check_split_rows(int features, Index gap, bool rounded, float scale, float special) {
  const Index stride = features + gap, start = gap == 1 ? 1 : 0;
  const int width = static_cast<int>(round_up(features, 64)), groups = (width + 255) / 256;
  Random random(static_cast<std::uint64_t>(features));
  const auto values = [&](Index count, Index known) {
    std::vector<float> v(static_cast<std::size_t>(count));
    for (Index i = 0; i < known; ++i)
      v[static_cast<std::size_t>(i)] = scale * static_cast<float>(random.normal());
    return v;
  };
  auto x = values(start + kSplitRows * stride, start + kSplitRows * stride);
  x[static_cast<std::size_t>(start + stride + features - 1)] = special;
  auto at = values(width, features), spread = values(groups, groups),
       largest = values(groups, groups);
  for (auto* both : {&spread, &largest})
    for (float& v : *both) v = std::fabs(v);
  std::vector<float> scaled(static_cast<std::size_t>(width), NAN), scales(4, NAN);
  const auto size = static_cast<std::size_t>(kSplitRows * width);
  std::vector<std::uint16_t> high(size, 0x7bff), low(size, 0x7bff);
  std::vector<double> units(kSplitRows, NAN), norms(kSplitRows, NAN);
  const Rows<float> rows = rows_of<float>(x.data() + start, stride, kSplitRows);
  const Center center = {at.data(),     spread.data(), largest.data(), scales.data(), &scales[2],
                         scaled.data(), features,      width,          false};
  const Halves out = {high.data(), low.data(), units.data(), kSplitRows, rows, rounded};
  Stream(kPlace).launch({"split_rows", {kSplitRows}, kSplitThreads, sizeof(SplitMemory)},
                        split_rows<CENTERED>, rows, center, norms.data(), out);

  const auto most = [](float a, float b) { return std::fmax(a, std::fabs(b)); };
  const float of_y =
      scale_to(std::accumulate(spread.begin(), spread.end(), 0.0f, most), kReferencePower);
  const float of_value =
      scale_to(std::accumulate(largest.begin(), largest.end(), 0.0f, most), kValuePower);
  bool same = true;
  for (Index b = 0; b < kSplitRows; ++b) {
    std::vector<float> v(static_cast<std::size_t>(width));
    for (int f = 0; f < features; ++f)
      v[static_cast<std::size_t>(f)] =
          rows.row(b)[f] - (CENTERED ? at[static_cast<std::size_t>(f)] : 0);
    const float of_x = scale_to(std::accumulate(v.begin(), v.end(), 0.0f, most), kQueryPower);
    double norm = 0;
    for (int f = 0; f < width; ++f) {
      const auto i = static_cast<std::size_t>(b * width + f);
      const float value = v[static_cast<std::size_t>(f)] * of_x;
      const TwoHalves parts = split_halves(value, 0);
      same = same && high[i] == (parts.high & 0xffffu) && low[i] == (parts.low & 0xffffu);
      const double counted = rounded ? half_of_word(parts.high, 0) : value;
      norm += counted * counted;
    }
    const auto row = static_cast<std::size_t>(b);
    same = same && bits_of(units[row]) == bits_of(inverse_powers(of_x, of_y));
    if (!CENTERED) continue;
    norm *= inverse_powers(of_x, of_x);
    // Squares are rounded to float32; their sum is not.
    const bool near = std::fabs(norms[row] - norm) <= 0x1p-23 * norm;
    same = same && (near || (std::isnan(norms[row]) && !std::isfinite(norm)));
  }
  if (CENTERED) {
    for (std::size_t f = 0; f < scaled.size(); ++f)
      same = same && bits_of(scaled[f]) == bits_of(at[f] * of_y);
    same = same && scales == std::vector<float>{of_y, inverse_power(of_y), of_value,
                                                inverse_power(of_value)};
  }
  if (!same) fail("split_rows is wrong: " + std::to_string(features) + " features");
}

// Rows that threads hold, in whole or in part, and rows that are read twice, because they are
// misaligned.
void check_splits() {
  for (const int features : {2, 33, 64, 100, 784, 3072, 4095, 4096, 4100, 9001, 9004}) {
    for (const Index gap : {0, 1, 3, 4}) {
      check_split_rows<true>(features, gap, false, 1, 0);
      check_split_rows<true>(features, gap, true, 1, 0);
      check_split_rows<false>(features, gap, false, 1, 0);
    }
    if (kFew) break;
    for (const float scale : {0.0f, 1e-42f, 1e-20f, 1e18f, 1e37f})
      check_split_rows<true>(features, 0, false, scale, 0);
    for (const float special : {1e38f, 1e-44f, NAN, INFINITY, -INFINITY}) {
      check_split_rows<true>(features, 0, false, 1, special);
      check_split_rows<true>(features, 0, true, 1, special);
      check_split_rows<false>(features, 1, false, 1, special);
    }
  }
}

// ---- weights ----------------------------------------------------------------------------------

// NaN stays NaN where weights are rounded, also the one of GPUs, whose bits are all set.
void check_rounded_weights() {
  WeightLaw law = {};
  law.half_a_step = 0x1000u, law.kept = ~0x1fffu;
  for (const std::uint32_t bits : {0x7fffffffu, 0xffffffffu, 0x7fc00000u, 0xffc00000u})
    if (!std::isnan(law.rounded(float_of(bits)))) fail("a weight that is NaN is lost");
  for (const auto& [weight, rounded] :
       {std::pair(1.0f, 1.0f), std::pair(0x1.004p-3f, 0x1.004p-3f), std::pair(0x1.001p-3f, 0x1p-3f),
        std::pair(0x1.003p-3f, 0x1.004p-3f)})
    if (law.rounded(weight) != rounded) fail("a weight is rounded to another number");
}

// Square roots without float64, at both kinds of exponents and where the float rounds up to 2.
void check_square_roots() {
  for (int power = -1022; power < 1024; ++power)
    for (const double digits :
         {1.0, 0x1.000001p0, 0x1.6a09e6p0, 0x1.fffffep0, 0x1.fffffffffffffp0}) {
      const double v = std::ldexp(digits, power), root = std::sqrt(v);
      if (!(std::fabs(square_root64(v) - root) <= 0x1p-22 * root))
        fail("a square root is wrong: of " + std::to_string(digits) + " 2^" +
             std::to_string(power));
    }
  if (!(square_root64(0) <= 0x1p-511)) fail("the square root of 0 is not small");
}

// ---- exact differences ----------------------------------------------------------------------

// The square of a difference has the bits that the rule gives for its two floats, whichever of the
// two numbers is larger.
void check_differences() {
  Random random(2);
  for (int i = 0; i < 20000; ++i) {
    const double scale = std::exp2(random.uniform(-60, 60));
    float x = static_cast<float>(scale * random.normal());
    float y = static_cast<float>(scale * random.normal() * std::exp2(random.uniform(-40, 40)));
    if (i % 7 == 0) y = std::nextafter(x, 0.0f);
    if (i % 11 == 0) y = -x;
    if (i % 13 == 0) x = 0;
    if (i % 17 == 0) y = 0;
    const float high = x - y, of_y = high - x;
    const float rest = (x - (high - of_y)) - (y + of_y);
    const float unit = scale_to(std::fmax(std::fabs(high), 0x1p-100f), 0);
    const float expected = high * unit * (high * unit) + high * unit * (rest * (2 * unit));
    const TwoFloats found = sum_of_squares<false>(&x, &y, 1, unit, 0);
    if (bits_of(found.high) != bits_of(expected) || found.low != 0)
      fail("a difference is wrong: " + std::to_string(i));
  }
  // A difference that float32 does not hold is not cut.
  const float most = 3e38f, least = -3e38f, infinite = INFINITY, nothing = NAN;
  for (const auto& [x, y] :
       {std::pair(most, least), std::pair(least, most), std::pair(infinite, most),
        std::pair(most, infinite), std::pair(infinite, infinite), std::pair(nothing, most),
        std::pair(most, nothing)})
    for (const float unit : {0x1p-76f, 1.0f, 0x1p60f})
      if (!std::isnan(sum_of_squares<true>(&x, &y, 1, unit, 0).high))
        fail("a value that is not finite is lost");
  // One that it holds is.
  const float zero = 0;
  for (const auto& [x, y] : {std::pair(&most, &zero), std::pair(&zero, &most)})
    if (sum_of_squares<true>(x, y, 1, 1, 0).high != 0x1p110f) fail("a far value is not cut");
}

// ---- posterior mean -------------------------------------------------------------------------

struct Shape {
  Index B, M, N;
};

int problems = 0;

// In half of all problems rows do not start on 16-byte boundaries.
Case next_case(const Shape& shape, Type reference_type) {
  constexpr double dimensions[] = {1, kInfinity, 128};
  const int seed = problems++;
  const Index gap = seed % 4 < 2 ? 0 : seed % 4 - 1;
  return {shape.B,
          shape.M,
          shape.N,
          Type::float32,
          reference_type,
          dimensions[seed % 3],
          gap,
          static_cast<std::uint64_t>(seed),
          gap};
}

Type reference_type(std::size_t turn) {
  constexpr Type types[] = {Type::float32, Type::bfloat16, Type::float16, Type::uint8};
  return types[turn % 4];
}

void check(const Shape& shape, Type reference_type, const Orders& orders, unsigned needs = 7) {
  const Case c = next_case(shape, reference_type);
  const Inputs in(c);
  run_in(orders, [&](const Implementation& tested) { return run(tested, c, in, needs); });
}

void check_forward(const Shape& shape, Type reference_type, const Orders& orders) {
  const Case c = next_case(shape, reference_type);
  const Inputs in(c);
  run_in(orders, [&](const Implementation& tested) {
    const Results out(c);
    run_forward(tested, c, in, out);
    return out;
  });
}

// At the edges of tiles (queries 8, 32, 64; references 32, 64; features 4, 32, 128), and at 16
// queries and 32 features, where products replace differences.
void check_shapes() {
  const std::vector<Shape> shapes = {
      {1, 1, 1},    {8, 31, 32},   {9, 65, 97}, {15, 130, 31},  {16, 63, 33}, {17, 31, 129},
      {33, 65, 32}, {65, 63, 33},  {1, 65, 33}, {15, 65, 129},  {16, 1, 32},  {16, 65, 1},
      {33, 31, 97}, {17, 130, 97}, {65, 1, 31}, {65, 130, 129}, {2, 1100, 5}};
  std::size_t turn = 0;
  for (std::size_t i = 0; i < (kFew ? 8 : shapes.size()); ++i) {
    const std::size_t types = kFew ? 1 : shapes[i].B < 65 ? 4 : 2;
    for (std::size_t t = 0; t < types; ++t, ++turn)
      check(shapes[i], reference_type(i + t), one_of_all(turn),
            turn % 2 == 0 ? 7 : static_cast<unsigned>(turn / 2 % 8));
  }
}

void check_orders() {
  for (const Shape& shape : {Shape{3, 70, 33}, Shape{17, 130, 33}})
    check(shape, reference_type(static_cast<std::size_t>(shape.B)), kAllOrders);
}

// Tiles of 32 × 64, 64 × 64, 64 × 128 and 128 × 128 queries and references.
void check_tiles() {
  for (const int multiprocessors : {1000, 8, 4, 1}) {
    const Setting setting(multiprocessors == 4 ? 89 : 90, multiprocessors);
    check_forward({70, kFew ? 140 : 200, 97}, reference_type(multiprocessors % 4),
                  one_of_all(static_cast<std::size_t>(multiprocessors)));
  }
  // Of warpgroups, with more panels than one float adds up.
  const Setting setting(90, 1);
  check_forward({100, kFew ? 130 : 190, 452}, Type::float32, one_of_all(1));
}

// Weighted sums of warpgroups, in groups of 64 and of 128 queries. The block has all lists.
void check_shared_sums() {
  const Setting setting(90, 1);
  check_forward({258, kFew ? 70 : 130, 260}, Type::float32, one_of_all(1));
  check_forward({513, 97, 256}, Type::float32, one_of_all(2));
}

// Precision "medium", in tiles of 128 references × 128 or 256 queries, whole and with slices of the
// features.
void check_rounded_tiles() {
  const auto rounded = [](auto call) {
    return [call](Problem problem, const auto& out) {
      problem.precision = Precision::medium;
      return call(problem, out);
    };
  };
  struct Tiles {
    Shape shape;
    int multiprocessors;
  };
  for (const Tiles& tiles : {Tiles{{100, 40, 36}, 1}, Tiles{{129, 130, 68}, 1},
                             Tiles{{100, 60, 512}, 2}, Tiles{{130, 60, 516}, 2}}) {
    const Setting setting(90, tiles.multiprocessors);
    const auto [B, M, N] = tiles.shape;
    const auto seed = static_cast<std::uint64_t>(N);
    const Case c = {B, M, N, Type::float32, Type::float32, 1, 0, seed};
    const Inputs in(c);
    run_in(one_of_all(seed), [&](Implementation tested) {
      tested.mean_tolerance = 3e-3;
      tested.forward = rounded(tested.forward), tested.backward = rounded(tested.backward);
      const Results out(c);
      run_forward(tested, c, in, out);
      tested.backward(problem_of(c, in, 0), out.backward(in, 7));
      return out;
    });
  }
}

// Chunks of 128 references and blocks of a few queries; the last of each is smaller.
void check_parts() {
  const auto limits = [](Index queries) { return CudaLimits{600, 1, queries, 128}; };
  for (std::size_t i = 0; i < (kFew ? 1 : 4); ++i) {
    const Setting setting(90, 4, limits(17));
    check({kFew ? 18 : 36, kFew ? 140 : 300, 40}, reference_type(i), one_of_all(i));
  }
  const Setting setting(80, 4, limits(8));
  check({9, 140, 5}, Type::float16, kFew ? one_of_all(1) : kAllOrders);
}

// Makes one value, of x or of a reference, NaN or infinite. No index may depend on it.
void check_not_finite(const Shape& shape, bool in_x, float bad) {
  const Case c = next_case(shape, Type::float32);
  Inputs in(c);
  if (in_x)
    put(in.x.at(2, c.N - 1), bad);
  else
    put(in.y.at(c.M - 1, 0), bad);
  for (Index b = in_x ? 2 : 0; b < (in_x ? 3 : c.B); ++b) {
    in.lse[b] = NAN;
    for (Index k = 0; k < c.N; ++k) in.mean[b * c.N + k] = NAN;
  }
  run_in(one_of_all(2), [&](const Implementation& tested) {
    const Results out(c);
    run_forward(tested, c, in, out);
    tested.backward(problem_of(c, in, 0), out.backward(in, 7));
    return out;
  });
}

// ---- steps ----------------------------------------------------------------------------------

// Rows for one thread, for a part of a warp, for a block, of several tiles; panels of 1024 values.
void check_steps() {
  constexpr Index shapes[][2] = {{5, 7},   {9, 33},   {130, 8},  {2, 256},
                                 {2, 260}, {2, 1025}, {1, 6145}, {1, 8196}};
  std::size_t turn = 0;
  for (const auto& [rows, features] : shapes)
    for (unsigned bits = 0; bits < 64; bits += kFew ? 13 : features > 1000 ? 5 : 1, ++turn) {
      const auto bit = [bits](int i) { return (bits >> i & 1) != 0; };
      const Step step = {rows,   features, Type::float32, bit(0), bit(1),
                         bit(2), bit(3),   bit(4),        bits,   static_cast<Output>(turn % 4),
                         bit(5)};
      run_in(turn % 16 == 0 ? kAllOrders : one_of_all(turn),
             [&](const Implementation& tested) { return run(tested, step); });
    }
}

// ---- the field ------------------------------------------------------------------------------

struct FieldCase {
  Index rows, features;
  bool in_place;  // whether field_x overwrites the difference
  bool aligned;
  double gamma;
};

struct FieldResults {
  Matrix x, z;

  bool same_bits(const FieldResults& other) const {
    return x.same_bits(other.x) && z.same_bits(other.z);
  }
};

FieldResults run(const std::string& name, const FieldCase& c) {
  Random random(static_cast<std::uint64_t>(c.features));
  const auto rows = [&c](Index gap) {
    return Matrix(Type::float32, c.rows, c.features, c.aligned ? 4 * gap : gap);
  };
  const Matrix d = rows(1), z(Type::float64, c.rows, 1);
  const Matrix field_z(Type::float32, c.rows, 1);
  const Matrix field_x = c.in_place ? d : rows(2);
  // The first row is at its mean, where the field is 0.
  const Values ds = d.fill([&](Index i, Index) { return i == 0 ? 0 : random.normal(); });
  const Values zs = z.fill([&](Index i, Index) { return i == 0 ? 0 : random.uniform(0, 4); });
  normalised_field_cuda({Type::float32, c.rows, c.features, d.data(), d.stride, z.doubles(),
                         c.gamma, field_x.data(), field_x.stride, field_z.data(), 1},
                        kPlace);
  Values wanted_x, wanted_z;
  for (Index i = 0; i < c.rows; ++i) {
    double squared = zs[i] * zs[i];
    for (Index k = i * c.features; k < (i + 1) * c.features; ++k) squared += ds[k] * ds[k];
    const double length = std::sqrt(squared) + c.gamma;
    const double scale = length == 0 ? 0 : -std::sqrt(static_cast<double>(c.features)) / length;
    wanted_z.push_back(scale * zs[i]);
    for (Index k = i * c.features; k < (i + 1) * c.features; ++k) wanted_x.push_back(scale * ds[k]);
  }
  const std::string what =
      name + ", a field of " + std::to_string(c.rows) + "×" + std::to_string(c.features);
  compare(what, field_x, wanted_x, of_gradient(wanted_x, c.features, 1e-6));
  compare(what + ", z", field_z, wanted_z, of_gradient(wanted_z, 1, 1e-6));
  return {field_x, field_z};
}

void check_fields() {
  constexpr Index shapes[][2] = {{5, 7},   {9, 33},   {130, 8}, {2, 256},
                                 {3, 260}, {2, 6145}, {1, 8196}};
  std::size_t turn = 0;
  for (const auto& [rows, features] : shapes)
    for (int i = 0; i < (kFew ? 1 : 6); ++i, ++turn) {
      const double gamma = turn % 4 < 2 ? 0 : 5;
      const FieldCase c = {rows, features, turn % 3 != 0, turn % 2 == 0, gamma};
      run_in(turn % 5 == 0 ? kAllOrders : one_of_all(turn),
             [&](const Implementation& tested) { return run(tested.name, c); });
    }
}

// ---- levels ---------------------------------------------------------------------------------

// Three levels: a number, values of each type with a stride, and one value for all rows.
void check_levels() {
  constexpr Index kRows = 131;
  Values doubles(2 * kRows);
  std::vector<float> floats(3 * kRows);
  for (Index i = 0; i < 2 * kRows; ++i) doubles[i] = 1 + 0.01 * static_cast<double>(i);
  for (Index i = 0; i < 3 * kRows; ++i) floats[i] = 2 + 0.02f * static_cast<float>(i);
  const Level z = {0, doubles.data(), Type::float64, 2};
  const Level next = {0, floats.data(), Type::float32, 3};
  const Level first = {0, floats.data(), Type::float32, 0}, number = {7, nullptr, Type(), 0};
  const auto same = [](const std::string& what, double found, double wanted) {
    if (found != wanted) fail(what + " differs");
  };

  Values radius(kRows), found(3 * kRows);
  for (const Level& level : {z, next, first, number}) {
    expand_level_cuda(level, 0.3, kRows, radius.data(), kPlace);
    for (Index i = 0; i < kRows; ++i) {
      const Index at = i * level.stride;
      const double value = level.values == nullptr       ? level.number
                           : level.type == Type::float64 ? doubles[at]
                                                         : static_cast<double>(floats[at]);
      same("an expanded level", radius[i], value * 0.3);
    }
  }
  for (const Method method : {Method::euler, Method::heun, Method::multistep}) {
    step_levels_cuda(method, z, next, number, kRows, found.data(), kPlace);
    for (Index i = 0; i < kRows; ++i) {
      const StepLevels wanted =
          step_levels(method, doubles[2 * i], static_cast<double>(floats[3 * i]), 7);
      same("z of a step", found[i], wanted.z);
      same("toward of a step", found[kRows + i], wanted.toward);
      same("blend of a step", found[2 * kRows + i], wanted.blend);
    }
  }
}

}  // namespace

int main() {
  check_squared_distances();
  check_splits();
  check_square_roots();
  check_differences();
  check_rounded_weights();
  check_shapes();
  check_orders();
  check_tiles();
  check_shared_sums();
  check_rounded_tiles();
  check_parts();
  for (const Shape& shape : {Shape{3, 70, 33}, Shape{17, 33, 33}}) {
    check_not_finite(shape, true, NAN);  // all pairs of a query are refined
    if (kFew) break;                     // the same accesses again
    check_not_finite(shape, true, INFINITY);
    check_not_finite(shape, false, NAN);
    check_not_finite(shape, false, -INFINITY);
  }
  check_steps();
  check_fields();
  check_levels();
  std::printf("%d problems agree, and so do steps, fields and levels\n", problems);
}
