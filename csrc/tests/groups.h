// Groups of queries (cpu/groups.h), blocks and the number of threads (cpu/blocks.h).
#pragma once
#define PFGM_ISA plain
#include "cpu/blocks.h"
#include "tests/problems.h"

namespace pfgm {
namespace plain {
namespace {

const auto is_needed = [](double value) { return value != 0; };

// A group lists what any of its rows needs, in order and in segments within batches. Each row that
// needs a reference is in one group.
template <int kRows>
void check_groups(Index rows, Index references, double share) {
  Random random(static_cast<std::uint64_t>(rows));
  std::vector<Values> values(rows, Values(references));
  std::vector<int> number(rows), any(references);
  Groups<float, kRows> groups(rows);
  for (Index b = 0; b < rows; ++b) {
    for (double& value : values[b]) value = random.uniform(0, 1) < share * b / rows ? 1 : 0;
    groups.note(b, values[b].data(), references, is_needed);
  }
  groups.arrange(rows, references, 3);
  for (Index g = 0; g < groups.count(); ++g) {
    const auto& group = groups[g];
    std::vector<Index> needed;
    for (Index j = 0; j < references; ++j) {
      bool needs = false;
      for (Index q = 0; q < group.rows; ++q) needs |= values[group.row[q]][j] != 0;
      if (needs) needed.push_back(j), any[j] = 1;
    }
    if (needed != std::vector<Index>(group.index, group.index + group.length))
      fail("a group lists other references than its rows need");
    Index at = 0;
    for (Index s = 0; s < group.segments; ++s) {
      const auto [begin, end] = group.segment[s];
      if (begin != at || end - begin > kSegment ||
          group.index[begin] / kBatch != group.index[end - 1] / kBatch)
        fail("a segment is not a part of one batch");
      at = end;
    }
    if (at != group.length) fail("segments leave references out");
    for (Index q = 0; q < group.rows; ++q) ++number[group.row[q]];
  }
  for (Index b = 0; b < rows; ++b) {
    const bool is_empty = values[b] == Values(references);
    if (number[b] != (is_empty ? 0 : 1)) fail("a row is not in one group");
  }
  for (Index j = 0; j < references; ++j)
    if (groups.needed(j) != (any[j] != 0)) fail("a reference is wrongly needed");
}

// Rows of two kinds in turn, with equally many references each: a group has one kind.
void check_alike() {
  constexpr Index rows = 2 * kBucket, references = kChunk;
  Groups<float, 6> groups(rows);
  for (Index b = 0; b < rows; ++b) {
    Values values(references);
    for (Index j = b % 2; j < references; j += 2) values[j] = 1;
    groups.note(b, values.data(), references, is_needed);
  }
  groups.arrange(rows, references, 1);
  for (Index g = 0; g < groups.count(); ++g)
    if (groups[g].length != references / 2) fail("rows with different lists share a group");
}

// Every block rounds all references again, so 128 images of 3 × 128 × 128 values are one block.
void check_block() {
  Problem problem = {};
  problem.queries = 128;
  problem.features = 3 * 128 * 128;
  if (block_size<float>(problem) != 128) fail("128 large images are several blocks");
}

void check_threads() {
  const auto threads = [](Index features, Index references) {
    Problem problem = {};
    problem.queries = 64;
    problem.references = references;
    problem.features = features;
    problem.threads = 16;
    return with_threads(problem, 64, references).threads;
  };
  if (threads(64, 1) != 1 || threads(64, 128) != 1 || threads(64, 512) != 4 ||
      threads(64, 1 << 20) != 16 || threads(512, 64) != 4 || threads(512, 512) != 16)
    fail("threads have too little work");
}

void check_grouping() {
  for (const double share : {0.0, 0.05, 1.0, 1.9}) {
    check_groups<6>(50, kChunk, share);
    check_groups<3>(7, kChunk - 65, share);
    check_groups<4>(1, 3, share);
  }
  check_alike();
  check_block();
  check_threads();
}

}  // namespace
}  // namespace plain
}  // namespace pfgm
#undef PFGM_ISA
