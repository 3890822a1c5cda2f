// The CPU kernels against plain formulas, for builds with a sanitizer: every instruction set of
// this machine, several threads in a call, and several callers. `cpu_test 7` takes one problem of
// seven, for emulators. A number without a common divisor with 2, 3 and 5 takes all types and
// weights, and 7 takes each way through the kernels.
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>

#include "api/normalised_field.h"
#include "api/watch.h"
#include "tests/groups.h"
#include "tests/problems.h"
#include "tests/screens.h"

namespace {

using namespace pfgm;

constexpr int kThreads[] = {1, 2, 3, 8};

Implementation cpu(int threads) {
  const Kernels& kernels = cpu_kernels();
  return {std::string(kernels.isa) + ", " + std::to_string(threads) + " threads",
          kernels.posterior_mean, kernels.posterior_mean_backward, threads};
}

// The mean computed without a summary of the references.
std::vector<unsigned char> without_sketch(const Implementation& plain, const Problem& problem) {
  const auto queries = static_cast<std::size_t>(problem.queries);
  std::vector<unsigned char> mean(queries * static_cast<std::size_t>(problem.features) *
                                  kSizes[static_cast<int>(problem.type)]);
  Values each(3 * queries);
  double* values = each.data();
  plain.forward(problem, {mean.data(), values, values + queries, values + 2 * queries});
  return mean;
}

// The same with a summary (sketch) of the references, which must not change a bit.
Implementation sketched(int threads) {
  Implementation plain = cpu(threads), result = plain;
  result.name += ", sketched";
  result.forward = [plain](const Problem& problem, const Forward& out) {
    const Kernels& kernels = cpu_kernels();
    const auto bytes = static_cast<std::size_t>(kernels.sketch_bytes(problem));
    if (bytes == 0) return plain.forward(problem, out);
    const std::unique_ptr<void, decltype(&std::free)> sketch(
        std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
    kernels.sketch(problem, sketch.get());
    Problem with = problem;
    with.sketch = sketch.get();
    const std::vector<unsigned char> before = without_sketch(plain, problem);
    const Status status = plain.forward(with, out);
    if (std::memcmp(before.data(), out.mean, before.size()) != 0) fail("a sketch changed the mean");
    return status;
  };
  return result;
}

// The same with a backward pass that uses what the forward pass before it kept.
Implementation keeping(int threads) {
  const Implementation plain = cpu(threads);
  Implementation result = plain;
  result.name += ", keeping";
  const auto memory = std::make_shared<std::vector<std::int64_t>>();
  result.forward = [plain, memory](const Problem& problem, const Forward& out) {
    const auto words = static_cast<std::size_t>(cpu_kernels().kept_bytes(problem)) / 8;
    memory->assign(words, 0);
    Forward keeps = out;
    if (words > 0) keeps.kept = {memory->data(), static_cast<std::int64_t>(8 * words)};
    return plain.forward(problem, keeps);
  };
  result.backward = [plain, memory](const Problem& problem, const Backward& io) {
    Backward with = io;
    if (!memory->empty() && memory->front() > 0) with.kept = {memory->data(), memory->front()};
    return plain.backward(problem, with);
  };
  return result;
}

std::vector<Case> cases() {
  // At the edges of tiles (queries 4, 6; references 64, 2048; features 16, 512), at blocks of 64
  // and 384 queries, and above 512 features, where 48 or more queries are screened.
  constexpr Index shapes[][3] = {
      {1, 1, 1},     {2, 1, 3},       {3, 2, 5},      {5, 63, 16},    {6, 64, 17},    {7, 65, 31},
      {12, 128, 33}, {13, 129, 63},   {6, 2048, 8},   {4, 5, 511},    {48, 70, 512},  {49, 65, 513},
      {48, 33, 527}, {53, 90, 528},   {7, 66, 1025},  {6, 2047, 3},   {7, 2049, 15},  {3, 4100, 2},
      {385, 6, 4},   {391, 70, 2},    {8, 4100, 3},   {65, 2050, 17}, {66, 300, 130}, {70, 200, 64},
      {386, 5, 520}, {50, 2050, 514}, {48, 400, 6000}};
  std::vector<Case> cases;
  for (const auto& [B, M, N] : shapes) {
    const bool small = B * M * N < 50000;
    for (int i = 0; i < (small ? 5 : 2); ++i) {
      const auto seed = static_cast<std::uint64_t>(cases.size());
      const auto type = seed % 2 == 0 ? Type::float32 : Type::float64;
      const double D = seed % 3 == 0 ? kInfinity : seed % 3 == 1 ? 1 : 128;
      cases.push_back({B, M, N, type, static_cast<Type>(seed % 5), D, seed % 4 < 2 ? 0 : 3, seed});
    }
  }
  return cases;
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

// References that float32 cannot hold, and squared distances that float64 cannot hold.
void check_range() {
  for (const auto& [B, N] : {std::pair<Index, Index>{3, 20}, {9, 20}, {3, 520}, {50, 520}}) {
    const auto expect = [](const Case& c, const Inputs& in, Failure failure) {
      const Results out(c);
      const Status status = cpu_kernels().posterior_mean(problem_of(c, in, 2), out.forward());
      if (status.failure != failure || (failure != Failure::none && status.row != 0))
        fail(c.text() + ": another failure than expected");
    };
    const Case mixed = {B, 70, N, Type::float32, Type::float64, 1, 0, 1};
    Inputs far(mixed);
    put(far.y.at(69, 0), 1e60);
    expect(mixed, far, Failure::none);
    for (Index j = 0; j < mixed.M; ++j) put(far.y.at(j, N - 1), 1e60);
    expect(mixed, far, Failure::range);

    // Bounds that overflow are no smaller than the padding of their row.
    const Case large = {B, 71, N, Type::float32, Type::float32, kInfinity, 0, 3};
    Inputs apart(large);
    for (Index i = 0; i < B * N; ++i) put(apart.x.at(i / N, i % N), 1e30f);
    expect(large, apart, Failure::none);

    const Case wide = {B, 70, N, Type::float64, Type::float64, 1, 0, 2};
    Inputs tiny(wide);
    for (Index i = 0; i < B * N; ++i) put(tiny.x.at(i / N, i % N), 1e-170 * tiny.xs[i]);
    for (Index i = 0; i < 70 * N; ++i) put(tiny.y.at(i / N, i % N), 1e-170 * tiny.ys[i]);
    expect(wide, tiny, Failure::none);
    for (const double radius : {0.0, 1e-170}) {
      tiny.radius.assign(B, radius);
      expect(wide, tiny, Failure::underflow);
    }
    tiny.radius.assign(B, 0);
    for (Index b = 0; b < B; ++b) std::memcpy(tiny.x.at(b, 0), tiny.y.at(b, 0), N * sizeof(double));
    expect(wide, tiny, Failure::none);
  }
}

int answers_left = 0;

// Stops the work at one place after the other, with independent and with shared blocks.
void check_stops() {
  for (const Case& c : {Case{70, 130, 20, Type::float32, Type::float32, 1, 0, 1},
                        Case{50, 130, 520, Type::float32, Type::float32, 1, 0, 2}}) {
    Inputs in(c);
    for (const int threads : {1, 2}) {
      int given_up = 0;
      for (int answers = 0; answers < 40; answers += 3) {
        answers_left = answers;
        const Watch watch([] { return answers_left-- <= 0; }, 0);
        const Matrix mean(c.type, c.B, c.N), each(Type::float64, c.B, 3);
        try {
          cpu_kernels().posterior_mean(
              problem_of(c, in, threads),
              {mean.data(), each.doubles(), each.doubles() + c.B, each.doubles() + 2 * c.B});
        } catch (const Stopped&) {
          ++given_up;
        }
      }
      if (given_up == 0) fail("nothing was given up");
      run(cpu(threads), c, in, 7);
    }
  }
}

std::vector<Step> steps() {
  // At the end of a vector, at a task's 2^15 values, and long rows that are split into panels.
  constexpr Index shapes[][2] = {{1, 1}, {3, 7}, {5, 16}, {9, 33}, {40, 1023}, {2, 65537}};
  std::vector<Step> steps;
  for (const auto& [rows, features] : shapes)
    for (unsigned bits = 0; bits < 64; bits += features > 1023 ? 5 : 1) {
      const auto bit = [bits](int i) { return (bits >> i & 1) != 0; };
      const Type type = bit(0) ? Type::float64 : Type::float32;
      steps.push_back(
          {rows, features, type, bit(1), bit(2), bit(3), bit(4), bit(5), bits, bits % 3 == 0});
    }
  return steps;
}

std::string usable_isas(std::vector<std::string>* usable) {
  std::string text;
  for (const char* isa : {"avx512vnni", "avx512", "avxvnni", "avx2", "portable"}) {
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
      for (std::size_t i = caller; i < all.size(); i += 8) run(cpu(2), all[i], *inputs[i], 7);
    });
  for (auto& caller : callers) caller.join();
}

// ---- the normalised field and its gradients --------------------------------------------------

// A row for which the field and the gradients are computed in the plainest way.
struct FieldRow {
  std::vector<double> d, upstream;
  double z, gamma, upstream_z;

  double scale() const {
    double squared = z * z;
    for (const double value : d) squared += value * value;
    return -std::sqrt(static_cast<double>(d.size())) / (std::sqrt(squared) + gamma);
  }
  // The function whose gradients are checked, by differences of a small step in one value.
  double value() const {
    const double s = scale();
    double sum = upstream_z * s * z;
    for (std::size_t k = 0; k < d.size(); ++k) sum += upstream[k] * s * d[k];
    return sum;
  }
  double derivative(double FieldRow::* of) const {
    return difference([of](FieldRow& r) -> double& { return r.*of; });
  }
  double derivative(std::size_t k) const {
    return difference([k](FieldRow& r) -> double& { return r.d[k]; });
  }

 private:
  template <class F>
  double difference(const F& of) const {
    FieldRow low = *this, high = *this;
    of(low) -= 1e-5;
    of(high) += 1e-5;
    return (high.value() - low.value()) / 2e-5;
  }
};

template <class T>
void check_field(std::int64_t rows, std::int64_t features, int threads) {
  const auto count = static_cast<std::size_t>(rows * features);
  Random random(static_cast<unsigned>(count));
  std::vector<T> d(count), upstream(count), upstream_z(rows);
  std::vector<double> z(rows);
  for (auto* values : {&d, &upstream, &upstream_z})
    for (T& value : *values) value = static_cast<T>(random.normal());
  for (double& value : z) value = random.uniform(0.1, 4);
  const Type type = sizeof(T) == sizeof(double) ? Type::float64 : Type::float32;
  std::vector<T> field_x(d), field_z(rows), grad_d(count);
  std::vector<double> grad_z(rows);
  const double gamma = 0.5;
  NormalisedField field = {type,  rows,           features, field_x.data(), features, z.data(),
                           gamma, field_x.data(), features, field_z.data(), threads};
  normalised_field(field);  // onto the difference
  field.difference = d.data();
  normalised_field_backward(
      field, {upstream.data(), features, upstream_z.data(), grad_d.data(), grad_z.data()});
  const auto same = [](double actual, double wanted, double tolerance) {
    if (!(std::fabs(actual - wanted) <= tolerance * (1 + std::fabs(wanted))))
      fail("a normalised field");
  };
  for (std::int64_t b = 0; b < rows; ++b) {
    const auto row = [&](const std::vector<T>& of) {
      return std::vector<double>(of.begin() + b * features, of.begin() + (b + 1) * features);
    };
    const FieldRow plain = {row(d), row(upstream), z[b], gamma, double{upstream_z[b]}};
    const double scale = plain.scale();
    same(double{field_z[b]}, scale * z[b], 1e-6);
    same(grad_z[b], plain.derivative(&FieldRow::z), 1e-4);
    for (std::int64_t k = 0; k < features; ++k) {
      const auto at = static_cast<std::size_t>(b * features + k);
      same(double{field_x[at]}, scale * plain.d[k], 1e-6);
      if (k % 7 == 0) same(double{grad_d[at]}, plain.derivative(static_cast<std::size_t>(k)), 1e-4);
    }
  }
}

void check_fields(int threads) {
  for (const std::int64_t features : {1, 3, 16, 33, 700}) {
    check_field<float>(5, features, threads);
    check_field<double>(3, features, threads);
  }
  check_field<float>(40, 2000, threads);
}

// The first of each `every` values.
template <class T>
std::vector<T> thinned(const std::vector<T>& all, int every) {
  std::vector<T> kept;
  for (std::size_t i = 0; i < all.size(); i += every) kept.push_back(all[i]);
  return kept;
}

}  // namespace

int main(int argc, char** argv) {
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  if (every < 1) fail("the argument is no number from 1 on");
  plain::check_grouping();
  plain::check_screens(thinned(plain::points(), every));
  std::vector<std::string> isas;
  const std::string text = usable_isas(&isas);
  const std::vector<Case> all = thinned(cases(), every);
  const std::vector<Step> all_steps = thinned(steps(), every);
  std::vector<std::unique_ptr<Inputs>> inputs;
  for (const Case& c : all) inputs.push_back(std::make_unique<Inputs>(c));
  for (std::size_t n = 0; n < isas.size(); ++n) {
    setenv("PFGM_CPU_ISA", isas[n].c_str(), 1);
    // Two of the four numbers of threads for each problem; which ones depends on the instruction
    // set.
    for (std::size_t half = 0; half < 4; half += 2) {
      const auto threads = [&](std::size_t i) { return kThreads[(i + n + half) % 4]; };
      for (std::size_t i = 0; i < all.size(); ++i) {
        const auto parts = static_cast<unsigned>(i % 8);
        if (half == 0)
          run(cpu(threads(i)), all[i], *inputs[i], 7);
        else
          run(sketched(threads(i)), all[i], *inputs[i], parts);
        if (half == 0 && all[i].N >= 512) run(keeping(threads(i)), all[i], *inputs[i], parts);
      }
      for (std::size_t i = 0; i < all_steps.size(); ++i) run(all_steps[i], threads(i));
    }
    for (const int threads : kThreads) check_fields(threads);
    run_at_once(all, inputs);
    check_failures();
    check_range();
    check_stops();
  }
  std::printf("%zu problems and %zu steps agree on%s\n", all.size(), all_steps.size(),
              text.c_str());
}
