// The screens of cpu/byte_screen.h and cpu/line_screen.h must keep every reference within the given
// distance. Bytes are multiplied by the plain formula, which every machine runs and which takes the
// longest bytes.
#pragma once
#define PFGM_ISA plain
#include "cpu/distances.h"
#include "tests/problems.h"

namespace pfgm {
namespace plain {
namespace {

struct Points {
  std::string name;
  std::function<double(Random&, Index row, Index feature)> x, y;
  bool far_apart = false;  // screens must rule some references out
};

std::vector<Points> points() {
  std::vector<Points> all;
  const auto near = [](double offset, double spread, double noise) {
    return Points{"spread " + std::to_string(spread) + " at " + std::to_string(offset),
                  [=](Random& random, Index, Index k) {
                    return offset + spread * (0.02 * (k % 100) + noise * random.normal());
                  },
                  [=](Random& random, Index j, Index k) {
                    return offset + spread * (0.02 * (k % 100) + 0.2 * j * random.normal());
                  },
                  offset == 0 && spread == 1};
  };
  for (const double offset : {0.0, 1.0, 300.0, 1e4, 1e7})
    for (const double spread : {1.0, 0.05, 3e-3}) all.push_back(near(offset, spread, 0.3));
  for (const double scale : {1e-42, 1e-39, 1e-23, 1e-20, 1e-19, 1e12, 1e20, 1e37})
    all.push_back(near(0, scale, 0.3));
  // All values of a query lie within a few units in the last place. The middle is rounded.
  for (const double white : {1.0, -1.0, 0.5, 1 / 3.0, 1e-38})
    for (const int ulps : {1, 2, 3, 5, 127, 253}) {
      const auto value = [=](Random& random, Index, Index) {
        const auto low = static_cast<float>(white);
        float unit = std::nextafter(low, 2.0f) - low;
        return static_cast<double>(low + unit * static_cast<float>(random.below(ulps + 1)));
      };
      all.push_back({std::to_string(white) + " and " + std::to_string(ulps) + " units", value,
                     [=](Random& random, Index j, Index k) {
                       return j % 2 ? random.uniform(-1, 1) : value(random, j, k);
                     }});
    }
  const auto with = [&](const char* name, Index row, Index feature, double value) {
    const Points plain = near(0, 1, 0.3);
    const auto other = [=](const auto& of) {
      return [=](Random& random, Index i, Index k) {
        return (row < 0 || i == row) && (feature < 0 || k == feature) ? value : of(random, i, k);
      };
    };
    all.push_back({name, row < 0 ? other(plain.x) : plain.x, other(plain.y)});
  };
  for (const double huge : {1e5, 1e20, 1e38}) {
    with("one reference is huge", 40, -1, huge);
    with("a feature of one reference is huge", 40, 3, huge);
    with("one feature is huge", -1, 3, huge);
  }
  return all;
}

template <class Tested, class T>
void check_screen(const std::string& name, const Points& of, Type type, Type reference_type,
                  Index features) {
  constexpr Index queries = 50, references = 70;
  Random random(static_cast<std::uint64_t>(features));
  const Matrix x(type, queries, features), y(reference_type, references, features);
  const Values xs = x.fill([&](Index b, Index k) { return of.x(random, b, k); });
  const Values ys = y.fill([&](Index j, Index k) { return of.y(random, j, k); });
  Problem problem = {};
  problem.type = type;
  problem.reference_type = reference_type;
  problem.queries = queries;
  problem.references = references;
  problem.features = features;
  problem.threads = 2;
  Tested screen(problem, queries, references);
  const Buffer<double> bounds(queries * kStride);
  screen.set_queries(queries,
                     [&](Index b) { return static_cast<const T*>(x.data()) + b * features; });
  screen.bound(0, references, Rows{y.data(), features, reference_type},
               [&](Index b) { return bounds.at(b * kStride); });
  Index kept = 0;
  for (Index b = 0; b < queries; ++b) {
    Values squared(references);
    double nearest = kInfinity;
    for (Index j = 0; j < references; ++j) {
      for (Index k = 0; k < features; ++k) {
        const double difference = xs[b * features + k] - ys[j * features + k];
        squared[j] += difference * difference;
      }
      nearest = squared[j] < nearest ? squared[j] : nearest;
    }
    for (Index j = -1; j < references; ++j) {
      Values row(bounds.at(b * kStride), bounds.at(b * kStride) + round_up(references, kByteTile));
      const double far = j < 0 ? nearest : squared[j];
      const Index number = screen.choose(b, far, kSkipped, row.data(), references);
      Index zeros = 0;
      for (Index i = 0; i < references; ++i) {
        zeros += row[i] == 0;
        if (row[i] != 0 && squared[i] <= far) fail(name + " loses a reference: " + of.name);
      }
      if (zeros != number) fail(name + " miscounts: " + of.name);
      if (j < 0) kept += number;
    }
  }
  if (of.far_apart && kept == queries * references) fail(name + " rules nothing out: " + of.name);
}

void check_both(const Points& of, Type type, Type reference_type) {
  const Index features = of.name.size() % 2 ? 512 : 1037;
  const std::string name = std::string(kNames[static_cast<int>(reference_type)]) + " ";
  if (type == Type::float64)
    return check_screen<LineScreen<double>, double>(name + "lines", of, type, reference_type,
                                                    features);
  check_screen<LineScreen<float>, float>(name + "lines", of, type, reference_type, features);
  check_screen<FloatScreen, float>(name + "bytes", of, type, reference_type, features);
}

void check_screens(const std::vector<Points>& all) {
  for (const Points& of : all) {
    check_both(of, Type::float32, Type::float32);
    check_both(of, Type::float32, Type::float64);
    check_both(of, Type::float32, Type::bfloat16);
    check_both(of, Type::float32, Type::uint8);
    check_both(of, Type::float64, Type::float64);
  }
}

}  // namespace
}  // namespace plain
}  // namespace pfgm
#undef PFGM_ISA
