// The squared distances that count, kept by the forward pass so that the backward pass need not
// compute them again.
//
// The memory holds a header, a list for each query and chunk, and the pairs of each list: the
// squared distances, then the numbers of the references within the chunk. Threads add lists in any
// order. If the memory is too small, nothing is kept.
#pragma once
#include "cpu/weights.h"

namespace pfgm {
namespace PFGM_ISA {
namespace {

constexpr Index kMaxKeptBytes = 40 << 20;

class KeptDistances {
 public:
  // `memory` may be null: then nothing is kept.
  KeptDistances(const Problem& problem, void* memory, Index bytes, Index chunk)
      : problem_(problem),
        memory_(static_cast<char*>(memory)),
        bytes_(bytes),
        chunk_(chunk),
        chunks_(divide_up(problem.references, chunk)) {}

  explicit operator bool() const { return memory_ != nullptr; }

  // The memory that holds every pair, at most kMaxKeptBytes.
  static Index most_bytes(const Problem& problem, Index chunk) {
    const Index lists = problem.queries * divide_up(problem.references, chunk);
    const double pairs = static_cast<double>(problem.queries) * problem.references;
    const double all = sizeof(Header) + lists * (sizeof(List) + kAlignment) + pairs * kPairBytes;
    return all < kMaxKeptBytes ? static_cast<Index>(all) / kAlignment * kAlignment : kMaxKeptBytes;
  }

  // The memory has at least 8 bytes.
  void start() {
    if (!memory_) return;
    const Index lists = problem_.queries * chunks_;
    used_ = static_cast<Index>(sizeof(Header) + lists * sizeof(List));
    header().used = 0;
    if (used_ > bytes_) {
      memory_ = nullptr;
      return;
    }
    header() = {0, problem_.queries, problem_.references, problem_.features};
    std::memset(memory_ + sizeof(Header), 0, lists * sizeof(List));
  }

  // Keeps the squared distances up to `limit` of a row.
  void add(Index query, Index first_reference, const double* squared, Index count, double limit) {
    Index number = 0;
    for (Index j = 0; j < count; ++j) number += squared[j] <= limit;
    const Index begin = __atomic_fetch_add(&used_, bytes_of(number), __ATOMIC_RELAXED);
    if (begin + bytes_of(number) > bytes_) return;
    list(query, first_reference) = {begin, number};
    auto* values = reinterpret_cast<double*>(memory_ + begin);
    auto* numbers = reinterpret_cast<Number*>(values + number);
    for (Index j = 0, i = 0; i < number; ++j)
      if (squared[j] <= limit) {
        values[i] = squared[j];
        numbers[i++] = static_cast<Number>(j);
      }
  }

  // Writes the header. Without it there is nothing to read.
  void finish() {
    if (memory_ && used_ <= bytes_) header().used = used_;
  }

  // Whether the memory holds the distances of this problem.
  bool is_of(const Problem& problem) const {
    if (bytes_ < static_cast<Index>(sizeof(Header))) return false;
    const Header& stored = header();
    return stored.used == bytes_ && stored.queries == problem.queries &&
           stored.references == problem.references && stored.features == problem.features;
  }

  // Writes the kept distances of a row, and `skipped` where none is kept. Returns their number.
  Index read(Index query, Index first_reference, double skipped, double* squared,
             Index count) const {
    for (Index j = 0; j < padded_count(count); ++j) squared[j] = skipped;
    const List& kept = list(query, first_reference);
    const auto* values = reinterpret_cast<const double*>(memory_ + kept.begin);
    const auto* numbers = reinterpret_cast<const Number*>(values + kept.count);
    for (Index i = 0; i < kept.count; ++i) squared[numbers[i]] = values[i];
    return kept.count;
  }

 private:
  using Number = std::uint16_t;
  static constexpr Index kAlignment = sizeof(double), kPairBytes = sizeof(double) + sizeof(Number);
  static_assert(kChunk <= 1 << 16, "a number within a chunk fits 16 bits");

  struct Header {
    Index used, queries, references, features;  // bytes that are used; 0 if they did not suffice
  };
  struct List {
    Index begin, count;
  };

  static Index bytes_of(Index pairs) { return round_up(pairs * kPairBytes, kAlignment); }
  Header& header() const { return *reinterpret_cast<Header*>(memory_); }
  List& list(Index query, Index first_reference) const {
    return reinterpret_cast<List*>(memory_ +
                                   sizeof(Header))[query * chunks_ + first_reference / chunk_];
  }

  const Problem& problem_;
  char* memory_;
  const Index bytes_, chunk_, chunks_;
  Index used_ = 0;
};

}  // namespace
}  // namespace PFGM_ISA
}  // namespace pfgm
