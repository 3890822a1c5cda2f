// The posterior mean and its gradients on the CPU, compiled once per instruction set (PFGM_ISA).
//
// Queries are split into blocks and references into chunks, which bounds the workspace
// (cpu/forward.h, cpu/backward.h). With few features all that is one pass over rows of float32
// (cpu/dense_rows.h), except for float64, few queries and the gradients of the references.
#include "api/posterior_mean.h"

#include "cpu/backward.h"
#include "cpu/cancelled_rows.h"
#include "cpu/dense_gradients.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

template <class T, class F>
auto with_reference_type(Type type, const F& f) {
  switch (type) {
    case Type::float32:
      return f(T(), float());
    case Type::float64:
      return f(T(), double());
    case Type::bfloat16:
      return f(T(), BFloat16());
    case Type::float16:
      return f(T(), Float16());
    case Type::uint8:
      return f(T(), std::uint8_t());
  }
  std::abort();
}

template <class F>
auto with_types(const Problem& problem, const F& f) {
  return problem.type == Type::float64 ? with_reference_type<double>(problem.reference_type, f)
                                       : with_reference_type<float>(problem.reference_type, f);
}

// Whether the sketch, if there is one, is of the references.
bool sketch_fits(const Problem& problem) {
  return !problem.sketch || with_types(problem, [&](auto t, auto r) {
    return Screen<decltype(t), decltype(r)>::is_sketch_of(problem);
  });
}

Status run_forward(const Problem& call, const Forward& out) {
  if (!sketch_fits(call)) return {Failure::sketch, 0};
  const Problem problem = with_threads(call, call.queries, call.references);
  return with_types(problem, [&](auto t, auto r) {
    if constexpr (std::is_same_v<decltype(t), float>)
      if (problem.difference && out.mean && !out.sums)
        return difference_pass<decltype(r)>(problem, out);
    return forward_pass<decltype(t), decltype(r)>(problem, out);
  });
}

Status run_backward(const Problem& call, const Backward& io) {
  if (!sketch_fits(call)) return {Failure::sketch, 0};
  const Problem problem = with_threads(call, call.queries, call.references);
  return with_types(problem, [&](auto t, auto r) {
    Backward rest = io;
    if (is_dense<decltype(t)>(problem) && (io.grad_x || io.grad_radius || io.moments)) {
      const Status status = dense_backward<decltype(r)>(problem, io);
      if (status.failure != Failure::none || !io.grad_y) return status;
      rest.grad_x = nullptr;
      rest.grad_radius = nullptr;
    }
    return by_blocks(problem, rest.grad_y == nullptr, [&](const Problem& block, Index first) {
      return backward<decltype(t), decltype(r)>(block, outputs_from(first, problem, rest));
    });
  });
}

Status run_pulls(const Problem& call, const Backward& io) {
  if (!sketch_fits(call)) return {Failure::sketch, 0};
  const Problem problem = with_threads(call, call.queries, call.references);
  return with_types(problem, [&](auto t, auto r) {
    if (is_dense<decltype(t)>(problem)) return dense_pulls<decltype(r)>(problem, io);
    return by_blocks(problem, true, [&](const Problem& block, Index first) {
      return all_pulls<decltype(t), decltype(r)>(block, outputs_from(first, problem, io));
    });
  });
}

bool any_steep(const Problem& problem, const Backward& io) {
  bool steep = false;
  with_types(problem, [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    const WeightLaw law = weight_law<T>(problem);
    for (Index b = 0; b < problem.queries && !steep; ++b)
      steep = query_is_steep<T, R>(problem, io, law, b);
    return Status();
  });
  return steep;
}

std::int64_t chunk_rows(std::int64_t features, Type reference_type) {
  Problem problem = {};
  problem.features = features;
  Index rows = 0;
  with_reference_type<float>(reference_type, [&](auto, auto r) {
    const Index chunk = chunk_size<decltype(r)>(problem);
    rows = chunk;
    // The kernels for few features have other chunks.
    while (features < kListedFeatures && rows % dense_chunk(problem) != 0) rows += chunk;
    return Status();
  });
  return rows;
}

std::int64_t sketch_bytes(const Problem& problem) {
  if (problem.features < kListedFeatures) return 0;
  return with_types(problem, [&](auto t, auto r) {
    return Screen<decltype(t), decltype(r)>::sketch_bytes(problem.references, problem.features);
  });
}

Status run_sketch(const Problem& problem, void* out) {
  return with_types(problem, [&](auto t, auto r) {
    using R = decltype(r);
    const auto y = [&](Index j) { return static_cast<const R*>(problem.y) + j * problem.y_stride; };
    const Screen<decltype(t), R> screen(problem, 0, 0);
    if (!screen) return Status{Failure::memory, 0};
    screen.sketch(y, out);
    return Status();
  });
}

std::int64_t kept_bytes(const Problem& problem) {
  if (problem.features < kListedFeatures) return 0;
  return with_types(problem, [&](auto, auto r) {
    return KeptDistances::most_bytes(problem, chunk_size<decltype(r)>(problem));
  });
}

}  // namespace

#define PFGM_TEXT_(name) #name
#define PFGM_TEXT(name) PFGM_TEXT_(name)
extern const Kernels kernels;
const Kernels kernels = {PFGM_TEXT(PFGM_ISA), run_forward,  run_backward, run_pulls, any_steep,
                         chunk_rows,          sketch_bytes, run_sketch,   kept_bytes};

}  // namespace PFGM_ISA
}  // namespace pfgm
