// Blocks of queries: how many are in one, which threads take them, and what may fail in one.
#pragma once
#include <vector>

#include "cpu/distances.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kMaxBlock = 384;   // queries in a block; a multiple of every kTileQueries
constexpr Index kSmallBlock = 64;  // queries in a block if features are few: every thread gets one
// Bytes of queries and sums in a block. Every block screens all references again, so it should not
// hold few queries where features are many: of 49152 features it holds 168.
constexpr Index kMaxStateBytes = 96 << 20;

template <class T>
Index block_size(const Problem& problem) {
  if (problem.features < kListedFeatures) return smaller(problem.queries, kSmallBlock);
  const Index fitting = kMaxStateBytes / (problem.features * (sizeof(double) + sizeof(T)));
  const Index whole = fitting / kTileQueries * kTileQueries;
  return smaller(problem.queries, smaller(kMaxBlock, larger(whole, kTileQueries)));
}

// Address of the index-th element of a float32 or float64 array.
template <class Void>
Void* at(Void* array, Index index, Type type) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  const Index size = type == Type::float64 ? sizeof(double) : sizeof(float);
  return static_cast<Byte*>(array) + index * size;
}

// The most threads with a workspace of their own, at most 6 MB each.
constexpr int kMaxIndependentThreads = 8;

// The work (queries × references × features) for which a thread is woken. With less, waking it and
// waiting for it costs more than it saves.
constexpr double kThreadWork = 1 << 19;

// The problem with no more threads than get kThreadWork each, where threads wait for each other
// after every `queries` × `references` pairs.
Problem with_threads(Problem problem, Index queries, Index references) {
  const double size = static_cast<double>(smaller(queries, problem.queries)) *
                      static_cast<double>(smaller(references, problem.references)) *
                      static_cast<double>(problem.features);
  const double most = size / kThreadWork;
  if (most < problem.threads) problem.threads = most < 1 ? 1 : static_cast<int>(most);
  return problem;
}

// Calls run(problem, first) for all queries, once or in blocks; `first` is the index of the first
// query of that problem. With few features most steps are too short to share between threads.
// Instead each thread takes whole blocks of queries through all steps. This needs blocks that are
// `independent`: no two write to the same result, as they do to the gradient of the references. The
// blocks are the same either way, so the results are the same to the bit.
template <class F>
Status by_blocks(const Problem& problem, bool independent, const F& run) {
  const Index blocks = divide_up(problem.queries, kSmallBlock);
  if (problem.features >= kListedFeatures) return run(problem, 0);
  const bool share_blocks =
      problem.threads > 1 && problem.threads <= kMaxIndependentThreads && problem.threads <= blocks;
  if (!independent || !share_blocks) return run(with_threads(problem, kSmallBlock, kChunk), 0);
  std::vector<Status> statuses(blocks);
  parallel(blocks, problem.threads, [&](Index task, int) {
    Problem block = problem;
    const Index first = task * kSmallBlock;
    block.threads = 1;
    block.queries = smaller(kSmallBlock, problem.queries - first);
    block.x = at(problem.x, first * problem.x_stride, problem.type);
    block.radius += first;
    statuses[task] = run(block, first);
    statuses[task].row += first;
  });
  for (const Status& status : statuses)
    if (status.failure != Failure::none) return status;
  return {};
}

Forward outputs_from(Index first, const Problem& problem, Forward out) {
  if (out.mean) out.mean = at(out.mean, first * problem.features, problem.type);
  if (out.logsumexp) out.logsumexp += first;
  if (out.nearest) out.nearest += first;
  if (out.total) out.total += first;
  if (out.sums) out.sums += first * problem.features;
  return out;
}

Backward outputs_from(Index first, const Problem& problem, Backward io) {
  io.grad_mean = at(io.grad_mean, first * problem.features, problem.type);
  io.grad_logsumexp += first;
  io.mean = at(io.mean, first * problem.features, problem.type);
  io.nearest += first;
  io.total += first;
  if (io.grad_x) io.grad_x = at(io.grad_x, first * problem.features, problem.type);
  if (io.grad_radius) io.grad_radius += first;
  if (io.sums) io.sums += first * problem.features;
  if (io.moments) io.moments += first;
  if (io.pulls) io.pulls += 2 * first;
  return io;
}

// Fails with the first query whose nearest distance is missing or stands for a failure. Called
// after each chunk.
Status check_states(const QueryState* states, Index count, Index first) {
  for (Index b = 0; b < count; ++b)
    if (!(is_distance(states[b].nearest) && states[b].nearest < kSkipped))
      return {failure_of(states[b].nearest), first + b};
  return {};
}

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
