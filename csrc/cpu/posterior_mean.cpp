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

template <class F>
auto with_type(const Problem& problem, const F& f) {
  return problem.type == Type::float64 ? f(double()) : f(float());
}

// Whether the sketch, if there is one, is of the references.
bool sketch_fits(const Problem& problem) {
  return !problem.sketch ||
         with_type(problem, [&](auto t) { return Screen<decltype(t)>::is_sketch_of(problem); });
}

Status run_forward(const Problem& call, const Forward& out) {
  if (!sketch_fits(call)) return {Failure::sketch, 0};
  const Problem problem = with_threads(call, call.queries, call.references);
  if (problem.type == Type::float64) return forward_pass<double>(problem, out);
  const bool again = problem.difference && out.mean && !out.sums;
  return again ? difference_pass(problem, out) : forward_pass<float>(problem, out);
}

Status run_backward(const Problem& call, const Backward& io) {
  if (!sketch_fits(call)) return {Failure::sketch, 0};
  const Problem problem = with_threads(call, call.queries, call.references);
  Backward rest = io;
  if (is_dense(problem) && (io.grad_x || io.grad_radius || io.moments)) {
    const Status status = dense_backward(problem, io);
    if (status.failure != Failure::none || !io.grad_y) return status;
    rest.grad_x = nullptr;
    rest.grad_radius = nullptr;
  }
  return with_type(problem, [&](auto t) {
    return by_blocks(problem, rest.grad_y == nullptr, [&](const Problem& block, Index first) {
      return backward<decltype(t)>(block, outputs_from(first, problem, rest));
    });
  });
}

Status run_pulls(const Problem& call, const Backward& io) {
  if (!sketch_fits(call)) return {Failure::sketch, 0};
  const Problem problem = with_threads(call, call.queries, call.references);
  if (is_dense(problem)) return dense_pulls(problem, io);
  return with_type(problem, [&](auto t) {
    return by_blocks(problem, true, [&](const Problem& block, Index first) {
      return all_pulls<decltype(t)>(block, outputs_from(first, problem, io));
    });
  });
}

bool any_ill_conditioned(const Problem& problem, const Backward& io) {
  return with_type(problem, [&](auto t) {
    using T = decltype(t);
    const WeightLaw law = weight_law<T>(problem);
    for (Index b = 0; b < problem.queries; ++b)
      if (query_is_ill_conditioned<T>(problem, io, law, b)) return true;
    return false;
  });
}

std::int64_t chunk_rows(std::int64_t features, Type reference_type) {
  Problem problem = {};
  problem.features = features;
  problem.reference_type = reference_type;
  const Index chunk = chunk_size(problem);
  Index rows = chunk;
  // The kernels for few features have other chunks.
  while (features < kListedFeatures && rows % dense_chunk(problem) != 0) rows += chunk;
  return rows;
}

std::int64_t sketch_bytes(const Problem& problem) {
  if (problem.features < kListedFeatures) return 0;
  return with_type(problem, [&](auto t) { return Screen<decltype(t)>::sketch_bytes(problem); });
}

Status run_sketch(const Problem& problem, void* out) {
  return with_type(problem, [&](auto t) {
    const Screen<decltype(t)> screen(problem, 0, 0);
    if (!screen) return Status{Failure::memory, 0};
    screen.sketch(references_of(problem), out);
    return Status();
  });
}

std::int64_t kept_bytes(const Problem& problem) {
  if (problem.features < kListedFeatures) return 0;
  return KeptDistances::most_bytes(problem, chunk_size(problem));
}

}  // namespace

#define PFGM_TEXT_(name) #name
#define PFGM_TEXT(name) PFGM_TEXT_(name)
extern const Kernels kernels;
const Kernels kernels = {PFGM_TEXT(PFGM_ISA), run_forward,         run_backward,
                         run_pulls,           any_ill_conditioned, chunk_rows,
                         sketch_bytes,        run_sketch,          kept_bytes};

}  // namespace PFGM_ISA
}  // namespace pfgm
