// Problems for tests of the kernels through raw pointers: inputs, results of plain formulas, and
// comparisons. Every buffer has exactly the size it needs. Outputs and gaps between rows hold NaN
// beforehand.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "api/ode_step.h"
#include "api/posterior_mean.h"

namespace pfgm {
namespace {

using Index = std::int64_t;
using Real = long double;
using Values = std::vector<double>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::size_t kSizes[] = {4, 8, 2, 2, 1};
const char* const kNames[] = {"float32", "float64", "bfloat16", "float16", "uint8"};

// A way to compute the posterior mean and its gradients.
struct Implementation {
  std::string name;
  std::function<Status(const Problem&, const Forward&)> forward;
  std::function<Status(const Problem&, const Backward&)> backward;
  int threads = 0;
};

[[noreturn]] inline void fail(const std::string& what) {
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
void put(void* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// Writes v, rounded toward zero, as an element to `to`. Returns the value of that element.
inline double encode(Type type, double v, void* to) {
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
  std::size_t size() const { return kSizes[static_cast<int>(type)]; }
  std::size_t bytes() const {
    return static_cast<std::size_t>((rows - 1) * stride + columns) * size();
  }
  unsigned char* at(Index i, Index k) const {
    return memory.get() + (i * stride + k) * static_cast<Index>(size());
  }
  void* data() const { return at(0, 0); }
  double* doubles() const { return reinterpret_cast<double*>(data()); }

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

inline double norm(const double* v, Index n) {
  double sum = 0;
  for (Index k = 0; k < n; ++k) sum += v[k] * v[k];
  return std::sqrt(sum);
}

using Allowed = std::function<double(Index row)>;

inline void compare(const std::string& what, const Matrix& actual, const Values& expected,
                    const Allowed& allowed) {
  for (Index i = 0; i < actual.rows; ++i) {
    Values error(actual.columns);
    for (Index k = 0; k < actual.columns; ++k) {
      const double a = actual.get(i, k), e = expected[i * actual.columns + k];
      error[k] = a == e || (std::isnan(a) && std::isnan(e)) ? 0 : a - e;
    }
    const double off = norm(error.data(), actual.columns);
    if (!(off <= allowed(i)))
      fail(what + " of row " + std::to_string(i) + " is off by " + std::to_string(off) +
           ", allowed " + std::to_string(allowed(i)));
    for (unsigned char* gap = actual.at(i, actual.columns);
         i + 1 < actual.rows && gap < actual.at(i + 1, 0); ++gap)
      if (*gap != 0xff) fail(what + ": written behind row " + std::to_string(i));
  }
}

// As in tests/backends/test_native.py: relative to the row, or to a typical row if terms cancel.
inline Allowed relative_to_rows(const Values& expected, Index columns, double tolerance) {
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
  // Whether a point can lie exactly on a reference.
  bool exact() const {
    return type == Type::float64 ||
           (reference_type != Type::float64 && reference_type != Type::uint8);
  }
};

struct Inputs {
  Matrix x, y, G;
  Values xs, ys, Gs, radius, g;
  Values mean, lse, grad_x, grad_radius, grad_y;  // expected results
  double scale = 0;                               // norm of the largest reference

  explicit Inputs(const Case& c)
      : x(c.type, c.B, c.N, c.gap),
        y(c.reference_type, c.M, c.N, c.gap),
        G(c.type, c.B, c.N),
        radius(c.B),
        g(c.B),
        mean(c.B * c.N),
        lse(c.B),
        grad_x(c.B * c.N),
        grad_radius(c.B),
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
      // The backward pass gets the mean in float32; its rounding is visible beside a smaller sigma.
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
      return gaussian ? -d / (2 * r * r)
                      : -(c.N + static_cast<Real>(c.D)) / 2 * std::log(d + r * r);
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

  // Adds the part of reference j to the gradients of query b.
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

inline Problem problem_of(const Case& c, const Inputs& in, int threads) {
  return {c.type,      c.reference_type, c.B, c.M,    c.N, in.x.data(), in.x.stride, in.y.data(),
          in.y.stride, in.radius.data(), c.D, threads};
}

struct Results {
  Matrix mean, lse, nearest, total, grad_x, grad_radius, grad_y;

  explicit Results(const Case& c)
      : mean(c.type, c.B, c.N),
        lse(Type::float64, c.B, 1),
        nearest(Type::float64, c.B, 1),
        total(Type::float64, c.B, 1),
        grad_x(c.type, c.B, c.N),
        grad_radius(Type::float64, c.B, 1),
        grad_y(c.type, c.M, c.N) {}
  Forward forward() const {
    return {mean.data(), lse.doubles(), nearest.doubles(), total.doubles()};
  }
  // `needs` has one bit per gradient.
  Backward backward(const Inputs& in, unsigned needs) const {
    return {in.G.data(),
            in.g.data(),
            mean.data(),
            nearest.doubles(),
            total.doubles(),
            needs & 1 ? grad_x.data() : nullptr,
            needs & 2 ? grad_radius.doubles() : nullptr,
            needs & 4 ? grad_y.data() : nullptr};
  }
};

inline void run_forward(const Implementation& tested, const Case& c, const Inputs& in,
                        const Results& out) {
  const std::string name = tested.name + ", " + c.text() + ": ";
  const double tolerance = c.type == Type::float64 ? 1e-10 : 2e-5;
  const Problem problem = problem_of(c, in, tested.threads);
  if (tested.forward(problem, out.forward()).failure != Failure::none)
    fail(name + "the forward pass failed");
  compare(name + "mean", out.mean, in.mean, [&](Index) { return tolerance * in.scale; });
  compare(name + "logsumexp", out.lse, in.lse,
          [&](Index b) { return tolerance * std::fmax(1, std::fabs(in.lse[b])); });
}

inline void run_backward(const Implementation& tested, const Case& c, const Inputs& in,
                         unsigned needs, const Results& out) {
  const std::string name = tested.name + ", " + c.text() + ": ";
  const double tolerance = c.type == Type::float64 ? 1e-10 : 1e-4;
  const Problem problem = problem_of(c, in, tested.threads);
  if (tested.backward(problem, out.backward(in, needs)).failure != Failure::none)
    fail(name + "the backward pass failed");
  const auto check = [&](const char* part, const Matrix& actual, const Values& expected) {
    compare(name + part, actual, expected, relative_to_rows(expected, actual.columns, tolerance));
  };
  if (needs & 1) check("grad_x", out.grad_x, in.grad_x);
  if (needs & 2) check("grad_radius", out.grad_radius, in.grad_radius);
  if (needs & 4) check("grad_y", out.grad_y, in.grad_y);
}

inline void run(const Implementation& tested, const Case& c, const Inputs& in, unsigned needs) {
  const Results out(c);
  run_forward(tested, c, in, out);
  run_backward(tested, c, in, needs, out);
}

// ---- steps ----------------------------------------------------------------------------------

struct Step {
  Index rows, features;
  Type type;
  bool field, history, mean, each, exact;
  std::uint64_t seed;
  bool in_place;  // whether `next` overwrites x
};

inline double mean_factor(const OdeStep& step, const double* slope, double field_z, double z) {
  if (z >= step.z_exp) return -z / std::fmin(field_z, -1e-5);
  const double root = std::sqrt(step.features), gamma = step.gamma;
  const double n = std::fmin(norm(slope, step.features) / root, 1 - 1e-6), rest = 1 - n * n;
  const double e = step.exact ? n * (gamma + std::sqrt(n * n * gamma * gamma + rest * z * z)) / rest
                              : gamma * n / (1 - n);
  return (std::sqrt(e * e + z * z) + gamma) / root;
}

inline void run(const Step& s, int threads) {
  Random random(s.seed);
  const auto rows = [&s](Index gap) { return Matrix(s.type, s.rows, s.features, gap); };
  const Matrix x = rows(3), slope = rows(1), history = rows(2), mean = rows(5);
  const Matrix field_z(s.type, s.rows, 1), levels(Type::float64, 3, s.each ? s.rows : 1);
  const Matrix next = s.in_place ? x : rows(7);
  const auto draw = [&](double size) {
    return [&, size](Index, Index) { return size * random.normal(); };
  };
  const Values xs = x.fill(draw(3)), slopes = slope.fill(draw(0.5)), pasts = history.fill(draw(3));
  const Values fields = field_z.fill([&](Index, Index) { return -random.uniform(0, 1); });
  const Values level = levels.fill(
      [&](Index i, Index) { return i == 2 && !s.history ? 0 : random.uniform(0, i == 0 ? 4 : 1); });
  const OdeStep step = {s.type,
                        s.rows,
                        s.features,
                        x.data(),
                        x.stride,
                        slope.data(),
                        slope.stride,
                        s.field ? field_z.data() : nullptr,
                        s.history ? history.data() : nullptr,
                        history.stride,
                        levels.doubles(),
                        s.each ? 1 : 0,
                        5,
                        2,
                        s.exact,
                        next.data(),
                        next.stride,
                        s.field && s.mean ? mean.data() : nullptr,
                        mean.stride,
                        threads};
  ode_step(step);
  Values wanted, means;
  for (Index i = 0; i < s.rows; ++i) {
    const Index at = s.each ? i : 0, count = levels.columns;
    const double toward = level[count + at], blend = level[2 * count + at];
    const double t = s.field ? mean_factor(step, &slopes[i * s.features], fields[i], level[at]) : 0;
    for (Index k = i * s.features; k < (i + 1) * s.features; ++k) {
      means.push_back(s.field ? xs[k] + t * slopes[k] : slopes[k]);
      wanted.push_back(xs[k] + toward * (means[k] - xs[k]) + blend * (pasts[k] - xs[k]));
    }
  }
  const std::string name = std::string(cpu_kernels().isa) + ", " + std::to_string(threads) +
                           " threads, a step of " + std::to_string(s.rows) + "×" +
                           std::to_string(s.features);
  const double tolerance = s.type == Type::float64 ? 1e-10 : 1e-5;
  compare(name, next, wanted, relative_to_rows(wanted, s.features, tolerance));
  if (step.mean)
    compare(name + ", mean", mean, means, relative_to_rows(means, s.features, tolerance));
}

}  // namespace
}  // namespace pfgm
