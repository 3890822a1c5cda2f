// The CPU kernels through their raw pointers against plain formulas, for builds with a sanitizer:
// every buffer has exactly its size, and outputs and the gaps between rows hold NaN beforehand.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../ode_step.h"
#include "../posterior_mean.h"

namespace {

using namespace pfgm;
using Index = std::int64_t;
using Real = long double;
using Values = std::vector<double>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::size_t kSizes[] = {4, 8, 2, 2, 1};
const char* const kNames[] = {"float32", "float64", "bfloat16", "float16", "uint8"};
constexpr int kThreads[] = {1, 2, 3, 8};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::_Exit(1);
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double uniform(double low, double high) { return low + (high - low) * unit_(engine_); }
  double normal() { return normal_(engine_); }
  Index below(Index n) { return static_cast<Index>(engine_() % static_cast<std::uint64_t>(n)); }

 private:
  std::mt19937_64 engine_;
  std::uniform_real_distribution<double> unit_;
  std::normal_distribution<double> normal_;
};

// ---- matrices -------------------------------------------------------------------------------

template <class T>
void put(void* to, T value) { std::memcpy(to, &value, sizeof value); }

// v, rounded toward zero, as an element at `to`; returns what that element means.
double encode(Type type, double v, void* to) {
  if (type == Type::float64) return put(to, v), v;
  if (type == Type::uint8) {
    const double u = std::round(std::fmin(std::fmax((v + 1) * 127.5, 0), 255));
    return put(to, static_cast<std::uint8_t>(u)), u / 127.5 - 1;
  }
  if (type == Type::float16) {
    int exponent;
    const int whole = static_cast<int>(std::frexp(std::fabs(v), &exponent) * 2048);
    if (exponent < -13 || whole == 0) return put(to, std::uint16_t{0}), 0;
    const int bits = (v < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | (whole - 1024);
    put(to, static_cast<std::uint16_t>(bits));
    return std::copysign(std::ldexp(whole, exponent - 11), v);
  }
  float value = static_cast<float>(v);
  if (type == Type::float32) return put(to, value), value;
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  put(to, static_cast<std::uint16_t>(bits >> 16));
  put(&value, bits & 0xffff0000u);
  return value;
}

struct Matrix {
  Type type;
  Index rows, columns, stride;
  std::shared_ptr<unsigned char> memory;

  Matrix(Type t, Index r, Index c, Index gap = 0) : type(t), rows(r), columns(c), stride(c + gap) {
    memory.reset(static_cast<unsigned char*>(std::malloc(bytes())), std::free);
    std::memset(memory.get(), 0xff, bytes());
  }
  Matrix copy() const {
    Matrix result(type, rows, columns, stride - columns);
    std::memcpy(result.memory.get(), memory.get(), bytes());
    return result;
  }
  std::size_t size() const { return kSizes[static_cast<int>(type)]; }
  std::size_t bytes() const { return static_cast<std::size_t>((rows - 1) * stride + columns) * size(); }
  unsigned char* at(Index i, Index k) const { return memory.get() + (i * stride + k) * size(); }
  void* data() const { return memory.get(); }
  double* doubles() const { return reinterpret_cast<double*>(memory.get()); }

  Values fill(const std::function<double(Index, Index)>& value) const {
    Values meant;
    for (Index i = 0; i < rows; ++i)
      for (Index k = 0; k < columns; ++k) meant.push_back(encode(type, value(i, k), at(i, k)));
    return meant;
  }
  double get(Index i, Index k) const {
    if (type == Type::float64) return *reinterpret_cast<double*>(at(i, k));
    return static_cast<double>(*reinterpret_cast<float*>(at(i, k)));
  }
};

double norm(const double* v, Index n) {
  double sum = 0;
  for (Index k = 0; k < n; ++k) sum += v[k] * v[k];
  return std::sqrt(sum);
}

using Allowed = std::function<double(Index row)>;

void compare(const std::string& what, const Matrix& actual, const Values& expected,
             const Allowed& allowed) {
  for (Index i = 0; i < actual.rows; ++i) {
    Values error(actual.columns);
    for (Index k = 0; k < actual.columns; ++k) {
      const double a = actual.get(i, k), e = expected[i * actual.columns + k];
      error[k] = a == e ? 0 : a - e;
    }
    const double off = norm(error.data(), actual.columns);
    if (!(off <= allowed(i)))
      fail(what + " of row " + std::to_string(i) + " is off by " + std::to_string(off) + ", allowed " +
           std::to_string(allowed(i)));
    for (unsigned char* gap = actual.at(i, actual.columns);
         i + 1 < actual.rows && gap < actual.at(i + 1, 0); ++gap)
      if (*gap != 0xff) fail(what + ": written behind row " + std::to_string(i));
  }
}

// As in tests/test_native.py: relative to the row, or to the typical row where terms cancel in it.
Allowed of_gradient(const Values& expected, Index columns, double tolerance) {
  const Index rows = static_cast<Index>(expected.size()) / columns;
  const double floor = (tolerance > 1e-8 ? 1.0 : 1e-3) * norm(expected.data(), rows * columns) /
                       std::sqrt(static_cast<double>(rows));
  return [=, &expected](Index i) {
    return tolerance * std::fmax(norm(&expected[i * columns], columns), floor);
  };
}

// ---- posterior mean -------------------------------------------------------------------------

struct Case {
  Index B, M, N;
  Type type, reference_type;
  double D;
  Index gap;
  std::uint64_t seed;

  std::string text() const {
    return std::to_string(B) + "×" + std::to_string(M) + "×" + std::to_string(N) + " " +
           kNames[static_cast<int>(type)] + " over " + kNames[static_cast<int>(reference_type)] +
           ", D = " + std::to_string(D);
  }
  // Whether a point can lie on a reference exactly.
  bool exact() const {
    return type == Type::float64 ||
           (reference_type != Type::float64 && reference_type != Type::uint8);
  }
};

struct Inputs {
  Matrix x, y, G;
  Values xs, ys, Gs, radius, g;
  Values mean, lse, grad_x, grad_radius, grad_y;  // what must come out
  double scale = 0;                               // norm of the largest reference

  explicit Inputs(const Case& c)
      : x(c.type, c.B, c.N, c.gap), y(c.reference_type, c.M, c.N, c.gap), G(c.type, c.B, c.N),
        radius(c.B), g(c.B), mean(c.B * c.N), lse(c.B), grad_x(c.B * c.N), grad_radius(c.B),
        grad_y(c.M * c.N) {
    draw(c, Random(c.seed));
    for (Index j = 0; j < c.M; ++j) scale = std::fmax(scale, norm(&ys[j * c.N], c.N));
    for (Index b = 0; b < c.B; ++b) evaluate(c, b);
  }

 private:
  void draw(const Case& c, Random random) {
    ys = y.fill([&](Index, Index) { return random.uniform(-1, 1); });
    Index from = 0, to = 0;
    double fraction = 0;
    xs = x.fill([&](Index b, Index k) {
      if (k == 0) {
        from = random.below(c.M);
        to = random.below(c.M);
        fraction = random.uniform(0, 0.5);
      }
      const double near = ys[from * c.N + k], other = ys[to * c.N + k];
      return b == 2 && c.exact() ? near : near + fraction * (other - near) + 0.2 * random.normal();
    });
    Gs = G.fill([&](Index, Index) { return random.normal(); });
    for (Index b = 0; b < c.B; ++b) {
      // The backward pass is given the mean in float32, which shows beside a smaller sigma.
      const double sigma = b == 1 ? 1e6 : std::pow(10, random.uniform(-1.3, 1));
      radius[b] = std::isinf(c.D) ? sigma : sigma * std::sqrt(c.D);
      g[b] = std::fmin(sigma * sigma, 1) * random.normal();
      if (b == 2 && c.exact()) radius[b] = g[b] = 0;
    }
  }

  void evaluate(const Case& c, Index b) {
    const double* point = &xs[b * c.N];
    const Real r = radius[b];
    std::vector<Real> squared(c.M), p(c.M);
    Real least = kInfinity, total = 0;
    for (Index j = 0; j < c.M; ++j) {
      for (Index k = 0; k < c.N; ++k) {
        const Real offset = static_cast<Real>(point[k]) - ys[j * c.N + k];
        squared[j] += offset * offset;
      }
      least = std::fmin(least, squared[j]);
    }
    const bool gaussian = std::isinf(c.D), limit = gaussian ? r == 0 : least + r * r == 0;
    const auto score = [&](Real d) {
      return gaussian ? -d / (2 * r * r) : -(c.N + static_cast<Real>(c.D)) / 2 * std::log(d + r * r);
    };
    for (Index j = 0; j < c.M; ++j)
      total += p[j] = limit ? squared[j] == least : std::exp(score(squared[j]) - score(least));
    Real mean_pull = 0;
    for (Index j = 0; j < c.M; ++j) p[j] /= total;
    for (Index k = 0; k < c.N; ++k) {
      Real sum = 0;
      for (Index j = 0; j < c.M; ++j) sum += p[j] * ys[j * c.N + k];
      mean[b * c.N + k] = static_cast<double>(sum);
      mean_pull += sum * Gs[b * c.N + k];
    }
    if (!limit) {
      lse[b] = static_cast<double>(score(least) + std::log(total));
      for (Index j = 0; j < c.M; ++j) differentiate(c, b, j, squared[j], p[j], mean_pull);
    } else {
      const Real at = gaussian ? (least == 0 ? std::log(total) : -kInfinity) : kInfinity;
      lse[b] = static_cast<double>(at);
    }
  }

  // Adds reference j's part to the gradients of query b.
  void differentiate(const Case& c, Index b, Index j, Real squared, Real p, Real mean_pull) {
    const double *point = &xs[b * c.N], *at = &ys[j * c.N], *upstream = &Gs[b * c.N];
    const Real r = radius[b];
    Real t = g[b] - mean_pull;
    for (Index k = 0; k < c.N; ++k) t += static_cast<Real>(upstream[k]) * at[k];
    const bool gaussian = std::isinf(c.D);
    const Real s = squared + r * r, factor = gaussian ? -p * t / (r * r) : -(c.N + c.D) * p * t / s;
    grad_radius[b] += static_cast<double>(gaussian ? p * t * squared / (r * r * r) : r * factor);
    for (Index k = 0; k < c.N; ++k) {
      const Real offset = static_cast<Real>(point[k]) - at[k];
      grad_x[b * c.N + k] += static_cast<double>(factor * offset);
      grad_y[j * c.N + k] += static_cast<double>(p * upstream[k] - factor * offset);
    }
  }
};

Problem problem_of(const Case& c, const Inputs& in, int threads) {
  return {c.type, c.reference_type, c.B, c.M, c.N, in.x.data(), in.x.stride, in.y.data(),
          in.y.stride, in.radius.data(), c.D, threads};
}

// `needs` has a bit for each gradient.
void run(const Case& c, const Inputs& in, int threads, unsigned needs) {
  const Kernels& kernels = cpu_kernels();
  const std::string name =
      std::string(kernels.isa) + ", " + std::to_string(threads) + " threads, " + c.text() + ": ";
  const Problem problem = problem_of(c, in, threads);
  const Matrix mean(c.type, c.B, c.N), lse(Type::float64, c.B, 1), nearest = lse.copy(),
      total = lse.copy();
  const bool wide = c.type == Type::float64;
  const double tolerance = wide ? 1e-10 : 2e-5, of_gradients = wide ? 1e-10 : 1e-4;
  if (kernels.posterior_mean(problem, {mean.data(), lse.doubles(), nearest.doubles(),
                                       total.doubles()}).failure != Failure::none)
    fail(name + "the forward pass failed");
  compare(name + "mean", mean, in.mean, [&](Index) { return tolerance * in.scale; });
  compare(name + "logsumexp", lse, in.lse,
          [&](Index b) { return tolerance * std::fmax(1, std::fabs(in.lse[b])); });

  const Matrix grad_x(c.type, c.B, c.N), grad_radius(Type::float64, c.B, 1),
      grad_y(c.type, c.M, c.N);
  const auto needed = [&](int bit) { return (needs >> bit & 1) != 0; };
  const Backward backward = {in.G.data(), in.g.data(), mean.data(), nearest.doubles(),
                             total.doubles(), needed(0) ? grad_x.data() : nullptr,
                             needed(1) ? grad_radius.doubles() : nullptr,
                             needed(2) ? grad_y.data() : nullptr};
  if (kernels.posterior_mean_backward(problem, backward).failure != Failure::none)
    fail(name + "the backward pass failed");
  const auto check = [&](const char* part, const Matrix& actual, const Values& expected) {
    compare(name + part, actual, expected, of_gradient(expected, actual.columns, of_gradients));
  };
  if (needed(0)) check("grad_x", grad_x, in.grad_x);
  if (needed(1)) check("grad_radius", grad_radius, in.grad_radius);
  if (needed(2)) check("grad_y", grad_y, in.grad_y);
}

std::vector<Case> cases() {
  // At tile edges (queries 4, 6; references 64, 2048; features 16, 512), at a block's 64 and 384
  // queries, and above 512 features, where lower bounds are found for 48 queries or more.
  constexpr Index shapes[][3] = {
      {1, 1, 1},    {2, 1, 3},    {3, 2, 5},     {5, 63, 16},  {6, 64, 17},   {7, 65, 31},
      {12, 128, 33}, {13, 129, 63}, {4, 5, 511}, {48, 70, 512}, {49, 65, 513}, {48, 33, 527},
      {53, 90, 528}, {7, 66, 1025}, {6, 2047, 3}, {6, 2048, 8}, {7, 2049, 15}, {3, 4100, 2},
      {385, 6, 4},  {391, 70, 2}, {386, 5, 520}, {50, 2050, 514}, {48, 400, 6000}};
  std::vector<Case> found;
  for (const auto& [B, M, N] : shapes) {
    const bool small = B * M * N < 50000;
    for (int i = 0; i < (small ? 5 : 2); ++i) {
      const auto seed = static_cast<std::uint64_t>(found.size());
      const auto type = seed % 2 == 0 ? Type::float32 : Type::float64;
      const double D = seed % 3 == 0 ? kInfinity : seed % 3 == 1 ? 1 : 128;
      found.push_back({B, M, N, type, static_cast<Type>(seed % 5), D, seed % 4 < 2 ? 0 : 3, seed});
    }
  }
  return found;
}

void check_failures() {
  const Case c = {9, 70, 20, Type::float32, Type::float32, 1, 0, 1};
  Inputs in(c);
  const Matrix mean(c.type, c.B, c.N), each(Type::float64, c.B, 3);
  const Forward out = {mean.data(), each.doubles(), each.doubles() + c.B, each.doubles() + 2 * c.B};
  const auto expect = [&](Failure failure, Index row) {
    const Status status = cpu_kernels().posterior_mean(problem_of(c, in, 2), out);
    if (status.failure != failure || status.row != row) fail("another failure than expected");
  };
  in.radius[8] = -1;
  expect(Failure::radius, 8);
  in.radius[8] = 1;
  put(in.x.at(7, 19), NAN);
  expect(Failure::value, 7);
}

// ---- steps ----------------------------------------------------------------------------------

struct Step {
  Index rows, features;
  Type type;
  bool field, history, mean, each, exact;
  std::uint64_t seed;
};

double stretch(const OdeStep& step, const double* slope, double field_z, double z) {
  if (z >= step.z_exp) return -z / std::fmin(field_z, -1e-5);
  const double root = std::sqrt(step.features), gamma = step.gamma;
  const double n = std::fmin(norm(slope, step.features) / root, 1 - 1e-6), rest = 1 - n * n;
  const double e = step.exact ? n * (gamma + std::sqrt(n * n * gamma * gamma + rest * z * z)) / rest
                              : gamma * n / (1 - n);
  return (std::sqrt(e * e + z * z) + gamma) / root;
}

void run(const Step& s, int threads, bool in_place) {
  Random random(s.seed);
  const Matrix x(s.type, s.rows, s.features, 3), slope(s.type, s.rows, s.features, 1),
      history(s.type, s.rows, s.features, 2), field_z(s.type, s.rows, 1),
      levels(Type::float64, 3, s.each ? s.rows : 1), mean(s.type, s.rows, s.features, 5),
      next = in_place ? x : Matrix(s.type, s.rows, s.features, 7);
  const auto draw = [&](double size) {
    return [&, size](Index, Index) { return size * random.normal(); };
  };
  const Values xs = x.fill(draw(3)), slopes = slope.fill(draw(0.5)), pasts = history.fill(draw(3));
  const Values fields = field_z.fill([&](Index, Index) { return -random.uniform(0, 1); });
  const Values level = levels.fill([&](Index i, Index) {
    return i == 2 && !s.history ? 0 : random.uniform(0, i == 0 ? 4 : 1);
  });
  const OdeStep step = {s.type, s.rows, s.features, x.data(), x.stride, slope.data(), slope.stride,
                        s.field ? field_z.data() : nullptr, s.history ? history.data() : nullptr,
                        history.stride, levels.doubles(), s.each ? 1 : 0, 5, 2, s.exact,
                        next.data(), next.stride, s.field && s.mean ? mean.data() : nullptr,
                        mean.stride, threads};
  ode_step(step);
  Values wanted, means;
  for (Index i = 0; i < s.rows; ++i) {
    const Index at = s.each ? i : 0, count = levels.columns;
    const double toward = level[count + at], blend = level[2 * count + at];
    const double t = s.field ? stretch(step, &slopes[i * s.features], fields[i], level[at]) : 0;
    for (Index k = i * s.features; k < (i + 1) * s.features; ++k) {
      means.push_back(s.field ? xs[k] + t * slopes[k] : slopes[k]);
      wanted.push_back(xs[k] + toward * (means[k] - xs[k]) + blend * (pasts[k] - xs[k]));
    }
  }
  const std::string name = "a step of " + std::to_string(s.rows) + "×" + std::to_string(s.features);
  const double tolerance = s.type == Type::float64 ? 1e-10 : 1e-5;
  compare(name, next, wanted, of_gradient(wanted, s.features, tolerance));
  if (step.mean) compare(name + ", mean", mean, means, of_gradient(means, s.features, tolerance));
}

std::vector<Step> steps() {
  // At a vector's end, a task's 2^15 values, and long rows that are cut into panels.
  constexpr Index shapes[][2] = {{1, 1}, {3, 7}, {5, 16}, {9, 33}, {40, 1023}, {2, 65537}};
  std::vector<Step> found;
  for (const auto& [rows, features] : shapes)
    for (unsigned bits = 0; bits < 64; bits += features > 1023 ? 5 : 1) {
      const auto bit = [bits](int i) { return (bits >> i & 1) != 0; };
      const Type type = bit(0) ? Type::float64 : Type::float32;
      found.push_back({rows, features, type, bit(1), bit(2), bit(3), bit(4), bit(5), bits});
    }
  return found;
}

std::string usable_isas(std::vector<std::string>* usable) {
  std::string text;
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    setenv("PFGM_CPU_ISA", isa, 1);
    try {
      usable->push_back(cpu_kernels().isa);
      text += " " + usable->back();
    } catch (const std::invalid_argument&) {
    }
  }
  return text;
}

void run_at_once(const std::vector<Case>& all, const std::vector<std::unique_ptr<Inputs>>& inputs) {
  std::vector<std::thread> callers;
  for (std::size_t caller = 0; caller < 4; ++caller)
    callers.emplace_back([&, caller] {
      for (std::size_t i = caller; i < all.size(); i += 8) run(all[i], *inputs[i], 2, 7);
    });
  for (auto& caller : callers) caller.join();
}

}  // namespace

int main() {
  std::vector<std::string> isas;
  const std::string text = usable_isas(&isas);
  const std::vector<Case> all = cases();
  const std::vector<Step> all_steps = steps();
  std::vector<std::unique_ptr<Inputs>> inputs;
  for (const Case& c : all) inputs.push_back(std::make_unique<Inputs>(c));
  for (std::size_t n = 0; n < isas.size(); ++n) {
    setenv("PFGM_CPU_ISA", isas[n].c_str(), 1);
    // Two of the four numbers of threads for each, others for each instruction set.
    for (std::size_t half = 0; half < 4; half += 2) {
      const auto threads = [&](std::size_t i) { return kThreads[(i + n + half) % 4]; };
      for (std::size_t i = 0; i < all.size(); ++i)
        run(all[i], *inputs[i], threads(i), half == 0 ? 7 : static_cast<unsigned>(i % 8));
      for (std::size_t i = 0; i < all_steps.size(); ++i)
        run(all_steps[i], threads(i), all_steps[i].seed % 3 == 0);
    }
    run_at_once(all, inputs);
    check_failures();
  }
  std::printf("%zu problems and %zu steps agree on%s\n", all.size(), all_steps.size(), text.c_str());
}
