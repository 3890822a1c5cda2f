// The posterior mean and its gradients on CUDA devices.
//
// Queries are split into blocks and references into chunks, which bounds the workspace. A chunk
// goes through distances (cuda/distances.h, warpgroup_distances.h, of data centred by
// cuda/centering.h) or differences, finish_distances if blocks of distances share out the features,
// find_limits and refine (cuda/refinement.h), weigh (cuda/weights.h), list_references
// (cuda/lists.h), weighted_sum and merge (cuda/weighted_sums.h). warpgroup_sum
// (cuda/warpgroup_sums.h) takes the place of weighted_sum where products are asynchronous. The
// backward pass takes the distances that the forward pass kept, or finds them again. Launches
// depend on shapes, the device and whether distances are kept. Nothing waits for the device, and
// CUDA graphs can capture the launches.
#include <cmath>
#include <limits>
#include <type_traits>

#include "api/posterior_mean.h"
#include "cuda/arrays.h"
#include "cuda/centering.h"
#include "cuda/coefficients.h"
#include "cuda/launch.h"
#include "cuda/lists.h"
#include "cuda/merging.h"
#include "cuda/partition.h"
#include "cuda/reference_gradient.h"
#include "cuda/refinement.h"
#include "cuda/warpgroup_distances.h"
#include "cuda/warpgroup_sums.h"
#include "cuda/weighted_sums.h"
#include "cuda/weights.h"

namespace pfgm {
namespace {

// Hands out pieces of the workspace; without a workspace it only counts bytes.
class Arena {
 public:
  explicit Arena(const CudaWorkspace& given)
      : base_(static_cast<char*>(given.at)), bytes_(given.bytes) {}
  template <class T>
  T* take(Index count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += static_cast<std::size_t>(round_up(count * static_cast<Index>(sizeof(T)), 256));
    if (base_ && used_ > bytes_) throw std::runtime_error("posterior_mean: workspace is too small");
    return piece;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t bytes_, used_ = 0;
};

// What the backward pass can take from the forward pass: the squared distances, and the centre of
// the references if products are centred.
struct Lasting {
  double* squared;  // (queries, stride)
  Center center;

  Lasting(Arena& arena, Index queries, Index references, Index features)
      : squared(arena.take<double>(queries * round_up(references, 32))), center() {
    if (are_few(queries, features)) return;
    const Index width = round_up(features, 2 * kPanel), groups = divide_up(width, kCenterThreads);
    center.features = static_cast<int>(features), center.width = static_cast<int>(width);
    center.at = arena.take<float>(width);
    center.scaled = arena.take<float>(width);
    center.spread = arena.take<float>(groups);
    center.largest = arena.take<float>(groups);
    center.scale = arena.take<float>(2);
    center.value_scale = arena.take<float>(2);
  }
};

// A weight below e^-kWeightCutoff / M of the sum of weights becomes zero. M such weights together
// are smaller than the rounding of a float32 result. So it does not matter that the sum has those
// of some tiles, and not those of tiles that weigh leaves out. A gradient multiplies p_j by (y_j −
// mean)²/s, which may be large; there the cutoff is kGradientCutoff nats lower.
constexpr double kWeightCutoff = 16, kGradientCutoff = 8;

double weight_floor(const Problem& problem, double extra_cutoff = 0) {
  return std::exp(-kWeightCutoff - extra_cutoff) / static_cast<double>(problem.references);
}

// The same for x − mean, in which a weight counts by the distance of its reference, relative to
// that of the nearest: (s/s₀)^½ w = w^(1 − 1/(N + D)), where D is finite. exp(−80) is a normal
// float32.
double difference_floor(const Problem& problem) {
  const double power = static_cast<double>(problem.features) + problem.dimensions;
  const double part = std::fmax(1 - 1 / power, 0.1);  // 1 at D = ∞
  return std::fmax(std::pow(weight_floor(problem), 1 / part), std::exp(-80.0));
}

// The type by which kernels read references that they do not multiply in float16.
template <class R>
using Stored = std::conditional_t<kRounded<R>, float, R>;

// Whether sums over references of this type have kernels for large groups of queries. Those of
// shorter types gain less, or their registers spill.
template <class R> constexpr bool kLargeGroups = sizeof(R) == sizeof(float);

template <class R>
class Calculation {
 public:
  // If the workspace is only counted, it has no address, and `kept` has only its size.
  Calculation(const Problem& problem, const Stream& stream, const CudaWorkspace& workspace,
              bool backward, const Kept& kept)
      : problem_(problem),
        stream_(stream),
        measures_(!backward || kept.bytes == 0),
        arena_(workspace),
        geforce_(stream.geforce(find_center<Stored<R>>)),
        warpgroups_(stream.warpgroups(find_center<Stored<R>>)),
        partition_(partition_of(
            problem,
            bounds_of(problem,
                      backward ? limits.pairs : pairs_of_chunk(stream.l2_cache(), geforce_)),
            stream.multiprocessors(), backward, large_groups(), is_asynchronous(), kRounded<R>,
            costs())),
        features_(static_cast<int>(problem.features)),
        law_(weight_law(problem, !partition_.few, kRounded<R> && !partition_.few,
                        is_asynchronous() && !kRounded<R> && !partition_.few,
                        backward || kept.bytes > 0, stream.major() < 9 ? kEarlierBias : kBias)) {
    const Index queries = partition_.queries, pairs = queries * partition_.stride;
    const Index tiles = divide_up(partition_.references, kTileReferences);
    const Index gathered = round_up(queries, most_rows()) * partition_.stride;
    if (larger(pairs, gathered) > kMostPairs)
      throw std::invalid_argument("posterior_mean: too many pairs at once");
    if (kept.bytes != 0 && kept.bytes != posterior_mean_kept_cuda(problem))
      throw std::invalid_argument("what the forward pass kept is of another problem");
    Arena keeping({kept.at, static_cast<std::size_t>(kept.bytes)});
    const Lasting lasting(kept.bytes > 0 ? keeping : arena_, queries, partition_.references,
                          problem.features);
    center_ = lasting.center;
    pairs_.stride = partition_.stride;
    pairs_.squared = lasting.squared;
    pairs_.projected = backward ? arena_.take<float>(pairs) : nullptr;
    pairs_.lowest = arena_.take<double>(queries * tiles);
    pairs_.reach = arena_.take<double>(tiles);
    pairs_.norms = arena_.take<double>(queries);
    pairs_.listed = arena_.take<unsigned>(1);
    units_ = arena_.take<float>(queries);
    weights_.weight = arena_.take<float>(pairs);
    // Weights are made after all distances of a chunk, from which on the list is not needed.
    pairs_.list = reinterpret_cast<unsigned*>(weights_.weight);
    weights_.live = arena_.take<std::uint32_t>(pairs / 32);
    room_ = partition_.parts * queries * problem.features;
    if (!partition_.few) room_ = larger(room_, size_of_slices());
    // Slices do not take the room of shares, which only the forward pass has: both passes must have
    // the same slices.
    const Index of_shares = partition_.shares.parts * queries * problem.features;
    parts_.sums = arena_.take<float>(larger(room_, of_shares));
    // Weighted sums are made after all distances of a chunk, from which on its slices are not
    // needed.
    slices_.products = parts_.sums;
    const Index slices = divide_up(problem.features, kShareFeatures);
    parts_.counts = arena_.take<int>(queries * (partition_.shares.rows > 0 ? slices : 1));
    // There is room for small groups, of which there are more.
    const Index groups = divide_up(queries, kSumRows);
    lists_.listed = arena_.take<int>(groups * partition_.stride);
    lists_.counts = arena_.take<int>(groups);
    // Weights are gathered after they are made, from which on the distances are not needed unless
    // they are kept. Distances of few queries take less memory than gathered weights.
    const bool apart = kept.bytes > 0 || gathered > 2 * pairs;
    lists_.weights =
        apart ? arena_.take<float>(gathered) : reinterpret_cast<float*>(pairs_.squared);
    lists_.stride = partition_.stride;
    if (!partition_.few) {
      center_.scattered = kRounded<R> || geforce_;
      center_.excess = kExcess<R>;
      if (measures_) x_halves_ = take_halves();
      x_halves_.rounded = kRounded<R>;
      if (backward) upstream_halves_ = take_halves();
    }
    order_ = queries > kSumRows ? arena_.take<int>(queries) : nullptr;
    sums_.size = static_cast<int>(partition_.piece);
    const Index pieces = divide_up(partition_.references, partition_.piece);
    sums_.live = arena_.take<int>(queries * pieces);
    if (!backward) {
      sums_.sum = arena_.take<float>(queries * pieces);
      sums_.closest = arena_.take<double>(queries);
      sums_.kept = arena_.take<double>(queries);
      return;
    }
    probability_ = arena_.take<float>(pairs);
    scaled_ = arena_.take<float>(pairs);
    for (double** each : {&moments_.projection, &moments_.mass, &moments_.moment, &moments_.sum,
                          &moments_.chunk_sum, &moments_.squares})
      *each = arena_.take<double>(queries * pieces);
    for (double** each : {&moments_.total, &moments_.exact_sum, &moments_.unit, &spare_})
      *each = arena_.take<double>(queries);
    moments_.pieces = static_cast<int>(pieces);
    moments_.size = sums_.size;
  }

  std::size_t workspace() const { return arena_.used(); }

  void forward(const Forward& out) {
    find_references_center();
    const double floor = problem_.difference ? difference_floor(problem_) : weight_floor(problem_);
    for (first_ = 0; first_ < problem_.queries; first_ += partition_.queries) {
      const QueryStates state = {out.nearest + first_, out.total + first_, out.logsumexp + first_};
      float* mean = static_cast<float*>(out.mean) + first_ * problem_.features;
      split<true>(x(), x_halves_);
      for (begin_ = 0; begin_ < problem_.references; begin_ += partition_.references) {
        const bool first_chunk = begin_ == 0;
        measure(first_chunk ? nullptr : state.nearest);
        sums_.pieces = pieces();
        // Divided by it, a sum of weights is at most 1.
        const float divisor = std::ldexp(1.0f, std::ilogb(static_cast<double>(references())) + 1);
        const bool halves = partition_.halves;
        const auto kernel = halves ? (law_.gaussian ? weigh<true, true> : weigh<true, false>)
                                   : (law_.gaussian ? weigh<false, true> : weigh<false, false>);
        run("weigh", {queries(), sums_.pieces}, kQueryThreads, sizeof(WeighMemory), kernel, law_,
            radius(), pairs_, references(), floor, halves ? kWeightUnit : 1 / divisor, first_chunk,
            state, weights_, sums_);
        if (halves)
          sum<true>(first_chunk, divisor);
        else
          sum<false>(first_chunk, divisor);
        if (problem_.difference)
          merge_differences(mean, divisor, first_chunk, state);
        else if (features_ % 4 == 0 && reinterpret_cast<std::uintptr_t>(out.mean) % 16 == 0)
          merge_parts<4>(mean, divisor, first_chunk, state);
        else
          merge_parts<1>(mean, divisor, first_chunk, state);
      }
    }
  }

  void backward(const Backward& io) {
    if (measures_) find_references_center();
    for (first_ = 0; first_ < problem_.queries; first_ += partition_.queries) {
      // A forward pass over one chunk, too, knew no nearest reference before. Without it the
      // distances here are the same to the bit.
      const bool one = partition_.references == problem_.references;
      const double* nearest = one ? nullptr : io.nearest + first_;
      if (measures_) split<true>(x(), x_halves_);
      split<false>(upstream(io), upstream_halves_);
      for (begin_ = 0; begin_ < problem_.references; begin_ += partition_.references) {
        if (measures_) measure(nearest);
        project(upstream(io));
        run("pull", {queries(), pieces()}, kQueryThreads, sizeof(PullMemory),
            law_.gaussian ? pull<true> : pull<false>, law_, radius(), io.nearest + first_,
            io.total + first_, pairs_, references(), gradient_floor(), begin_ == 0, moments_);
      }
      for (begin_ = 0; begin_ < problem_.references; begin_ += partition_.references) {
        if (!one) {
          measure(nearest);
          project(upstream(io));
        }
        differentiate(io);
      }
    }
  }

 private:
  // Numbers that the slices of a whole block and chunk take.
  Index size_of_slices() const {
    const Index queries = partition_.queries, references = partition_.references;
    const Index slices = tiling(queries, references, true, limits.parts).slices;
    return slices > 1 ? slices * slice_size(queries, references, kRounded<R>) : 0;
  }

  template <class Kernel, class... Arguments>
  void run(const char* name, Grid grid, int threads, std::size_t shared, Kernel* kernel,
           Arguments... arguments) const {
    stream_.launch({name, grid, threads, shared}, kernel, arguments...);
  }

  Index queries() const { return smaller(partition_.queries, problem_.queries - first_); }
  int references() const {
    return static_cast<int>(smaller(partition_.references, problem_.references - begin_));
  }
  const double* radius() const { return problem_.radius + first_; }
  Rows<float> x() const {
    const float* rows = static_cast<const float*>(problem_.x) + first_ * problem_.x_stride;
    return rows_of<float>(rows, problem_.x_stride, queries());
  }
  template <class T = Stored<R>>
  Rows<T> y() const {
    const T* rows = static_cast<const T*>(problem_.y) + begin_ * problem_.y_stride;
    return rows_of<T>(rows, problem_.y_stride, references());
  }
  Rows<float> upstream(const Backward& io) const {
    const float* rows = static_cast<const float*>(io.grad_mean) + first_ * problem_.features;
    return rows_of<float>(rows, problem_.features, queries());
  }
  double gradient_floor() const { return weight_floor(problem_, kGradientCutoff); }

  Halves take_halves() {
    const Index count = partition_.queries * center_.width;
    Halves halves = {};
    halves.high = arena_.take<std::uint16_t>(count);
    halves.low = arena_.take<std::uint16_t>(count);
    halves.units = arena_.take<double>(partition_.queries);
    return halves;
  }

  // The centre of all references, or of as many as an int counts.
  void find_references_center() const {
    if (partition_.few) return;
    using T = Stored<R>;
    const Index count = smaller(problem_.references, std::numeric_limits<int>::max());
    const Rows<T> y = rows_of<T>(problem_.y, problem_.y_stride, count);
    run("find_center", {divide_up(center_.width, kCenterThreads)}, kCenterThreads,
        sizeof(float) * kCenterThreads / 32, find_center<T>, y, center_);
  }

  // The parts of the block's queries, which are CENTERED, or of its G.
  template <bool CENTERED>
  void split(const Rows<float>& rows, Halves& halves) {
    if (partition_.few) return;
    halves.rows = rows.count, halves.whole = rows;
    run("split_rows", {rows.count}, kSplitThreads, sizeof(SplitMemory), split_rows<CENTERED>, rows,
        center_, pairs_.norms, halves);
  }

  // Distances of the block and the chunk, exact where it matters. `nearest` is the smallest
  // distance so far, or null.
  void measure(const double* nearest) {
    pairs_.tiles = static_cast<int>(divide_up(references(), kTileReferences));
    if (partition_.few)
      find_differences<false>(x());
    else
      find_products<false>(x_halves_);
    // Few tiles give few warps work.
    if (pairs_.tiles > 32)
      limit_distances<8>(nearest);
    else
      limit_distances<4>(nearest);
    const Index most = divide_up(queries() * references(), kRefineWarps);
    run("refine", {smaller(kRefineBlocks * stream_.multiprocessors(), most)}, kRefineThreads, 0,
        refine<Stored<R>>, x(), y(), features_, units_, pairs_);
  }

  // G·y of the block and the chunk, up to a number for each query.
  void project(const Rows<float>& upstream) const {
    if (partition_.few)
      find_differences<true>(upstream);
    else
      find_products<true>(upstream_halves_);
  }

  template <int WARPS>
  void limit_distances(const double* nearest) const {
    const float width = static_cast<float>(std::sqrt(static_cast<double>(features_)));
    const auto kernel = partition_.few ? find_limits<false, WARPS> : find_limits<true, WARPS>;
    run("find_limits", {queries()}, 32 * WARPS, LimitMemory<WARPS>::bytes(pairs_.tiles), kernel,
        law_, radius(), nearest, pairs_, references(), width, center_.scale, units_);
  }

  template <bool PROJECT>
  void find_differences(const Rows<float>& rows) const {
    using T = Stored<R>;
    run("differences", tiles(8, kTileReferences), 256, sizeof(DifferenceMemory<T>),
        differences<T, PROJECT>, rows, y(), features_, pairs_);
  }

  template <bool PROJECT>
  void find_products(const Halves& rows) const {
    const Tiling found = tiling(queries(), references(), y().aligned, room_);
    if (found.queries == 32) return find_products<PROJECT, 32, 64>(rows, found.slices);
    if (found.references == 64) return find_products<PROJECT, 64, 64>(rows, found.slices);
    if (found.queries == 64) return find_products<PROJECT, 64, 128>(rows, found.slices);
    if constexpr (sizeof(R) == sizeof(float)) {
      if (warpgroups_) return find_in_warpgroups<PROJECT>(rows, found);
    }
    find_products<PROJECT, 128, 128>(rows, found.slices);
  }

  template <bool PROJECT>
  void find_in_warpgroups(const Halves& rows, const Tiling& found) const {
    if constexpr (kRounded<R>) {
      if (found.queries == 256) return find_in_warpgroups<PROJECT, 256, 128>(rows, found.slices);
    } else {
      if (found.references == 192) return find_in_warpgroups<PROJECT, 128, 192>(rows, found.slices);
    }
    find_in_warpgroups<PROJECT, 128, 128>(rows, found.slices);
  }

  template <bool PROJECT, int QUERIES, int REFERENCES>
  void find_in_warpgroups(const Halves& rows, Index slices) const {
    find_products<PROJECT, WarpgroupMemory<R, QUERIES, REFERENCES>>(
        rows, slices, warpgroup_distances<R, QUERIES, REFERENCES, PROJECT, false>,
        warpgroup_distances<R, QUERIES, REFERENCES, false, true>);
  }

  template <bool PROJECT, int QUERIES, int REFERENCES>
  void find_products(const Halves& rows, Index slices) const {
    if (geforce_)
      find_products<PROJECT, QUERIES, REFERENCES, true>(rows, slices);
    else
      find_products<PROJECT, QUERIES, REFERENCES, false>(rows, slices);
  }

  template <bool PROJECT, int QUERIES, int REFERENCES, bool GEFORCE>
  void find_products(const Halves& rows, Index slices) const {
    find_products<PROJECT, DistanceMemory<R, QUERIES, REFERENCES>>(
        rows, slices, distances<R, QUERIES, REFERENCES, GEFORCE, PROJECT, false>,
        distances<R, QUERIES, REFERENCES, GEFORCE, false, true>);
  }

  template <bool PROJECT, class Memory, class Kernel>
  void find_products(const Halves& rows, Index slices, Kernel* whole, Kernel* sliced) const {
    Grid grid = tiles(Memory::kQueries, Memory::kReferences);
    if (slices == 1) {
      run("distances", grid, Memory::kThreads, sizeof(Memory), whole, rows, y<R>(), center_, pairs_,
          Slices{});
      return;
    }
    const Index trips = divide_up(features_, Memory::kFeatures);
    Slices sums = slices_;
    sums.stride = round_up(references(), kPanel);
    sums.trips = static_cast<int>(divide_up(trips, slices));
    sums.count = static_cast<int>(divide_up(trips, sums.trips));
    sums.squares = reinterpret_cast<double*>(static_cast<SliceSum<R>*>(sums.products) +
                                             sums.count * queries() * sums.stride);
    grid.z = sums.count;
    run("distances", grid, Memory::kThreads, sizeof(Memory), sliced, rows, y<R>(), center_, pairs_,
        sums);
    run("finish_distances", tiles(kFinishWarps * kFinishQueries, kTileReferences), kFinishThreads,
        0, geforce_ ? finish_distances<R, true, PROJECT> : finish_distances<R, false, PROJECT>,
        rows, y<R>(), center_, pairs_, sums);
  }

  // Whether large groups of queries are predicted to be faster, if there is enough work. Elsewhere
  // the sums wait for matrix units, to which a longer list gives more work.
  bool large_groups() const {
    if (!kLargeGroups<R> || geforce_) return false;
    return kRounded<R> || warpgroups_;
  }
  // Queries of the largest groups of the sums.
  Index most_rows() const { return larger(partition_.rows, partition_.shares.rows); }

  // Whether products of the large tiles, and of the sums of many queries, are asynchronous. These
  // take aligned rows alone. One float adds up several panels of such a tile, unless references are
  // Rounded.
  bool is_asynchronous() const { return sizeof(R) == sizeof(float) && warpgroups_; }
  const TilingCosts& costs() const {
    if (is_asynchronous()) return kRounded<R> ? kRoundedWarpgroupCosts : kWarpgroupCosts;
    if (geforce_) return kRounded<R> ? kRoundedGeforceCosts : kGeforceCosts;
    return kRounded<R> ? kRoundedCosts : kCosts;
  }
  Tiling tiling(Index queries, Index references, bool aligned, Index room) const {
    const bool small = queries * center_.width < Index{1} << 31;  // 32 bits count its values
    const bool large = !is_asynchronous() || (aligned && small && takes_warpgroups());
    const int most_queries = large ? kLargestTile : 64;
    return tiling_of(queries, references, features_, stream_.multiprocessors(), kRounded<R>,
                     costs(), most_queries, room);
  }

  Grid tiles(int rows, int references) const {
    return {divide_up(this->references(), references), divide_up(queries(), rows)};
  }

  // Pieces of the chunk that blocks of weigh, pull and find_coefficients take.
  int pieces() const { return static_cast<int>(divide_up(references(), sums_.size)); }

  // The references that groups of queries need, and their weights. The order of the queries, if
  // there is one, is found for the first chunk. In the others it only decides how long the lists
  // are.
  template <int ROWS, bool HALVES, bool OPERANDS>
  void list(bool first_chunk) {
    constexpr int kThreads = kListThreads<ROWS>;
    int* const order = order_of<ROWS>();
    parts_.queries = static_cast<int>(queries());
    const bool ordered = order && first_chunk, uneven = order && queries() <= kThreads;
    if (ordered && !uneven)
      run("order_queries", {divide_up(queries(), kRankedQueries)}, kQueryThreads,
          sizeof(int) * static_cast<std::size_t>(queries()), order_queries, sums_, parts_.queries,
          order);
    const auto kernel = !uneven   ? list_references<ROWS, false, false, HALVES, OPERANDS>
                        : ordered ? list_references<ROWS, true, true, HALVES, OPERANDS>
                                  : list_references<ROWS, true, false, HALVES, OPERANDS>;
    const Index groups = divide_up(queries(), ROWS), panels = divide_up(references(), kPanel);
    const Index wanted = smaller(blocks_of_lists(groups, uneven), groups * panels);
    // So many that no share has more than kGatheredPanels.
    const Index blocks = larger(wanted, groups * (1 + divide_up(panels, kGatheredPanels)));
    run("list_references", {uneven ? blocks : blocks / groups * groups}, kThreads,
        ListMemory<ROWS>::bytes(references()), kernel, weights_, sums_, order, references(), lists_,
        parts_);
  }

  // Blocks that share out the lists, as many on each multiprocessor. Each of them finds the whole
  // list of its group. The time of this grows with their number, and the time in which the lists
  // are gathered becomes shorter. If shares are even, the longest list decides that time. 24 is the
  // best constant by predicted times.
  Index blocks_of_lists(Index groups, bool uneven) const {
    Index each = 1;  // of a multiprocessor
    while (!uneven && each * each * stream_.multiprocessors() < 24 * groups) ++each;
    return each * stream_.multiprocessors();
  }

  // The order of the queries, or null if there is one group.
  template <int ROWS>
  int* order_of() const {
    return queries() > ROWS ? order_ : nullptr;
  }

  // The parts of Σ w y / divisor.
  template <bool HALVES>
  void sum(bool first_chunk, float divisor) {
    if constexpr (HALVES && kLargeGroups<R>) {
      const int shared = y().aligned && takes_warpgroups() ? partition_.shares.rows : 0;
      if (shared == kLargestSumRows) return sum_shares<kLargestSumRows>(first_chunk, divisor);
      if (shared == kLargeSumRows) return sum_shares<kLargeSumRows>(first_chunk, divisor);
      if (partition_.rows == kLargeSumRows)
        return sum_groups<kLargeSumRows, true>(first_chunk, divisor);
    }
    sum_groups<kSumRows, HALVES>(first_chunk, divisor);
  }

  template <int ROWS, bool HALVES>
  void sum_groups(bool first_chunk, float divisor) {
    using T = std::conditional_t<HALVES, R, Stored<R>>;
    parts_.slices = 1, parts_.panels = static_cast<int>(partition_.part_panels);
    list<ROWS, HALVES, false>(first_chunk);
    const Grid grid = {divide_up(features_, kSumFeatures), divide_up(queries(), ROWS),
                       divide_up(divide_up(references(), kPanel), parts_.panels)};
    run("weighted_sum", grid, kSumThreads, sizeof(SumMemory<T, ROWS>),
        weighted_sum<T, ROWS, HALVES>, y<T>(), features_, center_.value_scale,
        1 / (kWeightUnit * divisor), order_of<ROWS>(), lists_, parts_);
  }

  template <int ROWS>
  void sum_shares(bool first_chunk, float divisor) {
    parts_.slices = static_cast<int>(divide_up(features_, kShareFeatures));
    parts_.panels = static_cast<int>(partition_.shares.least);
    list<ROWS, true, true>(first_chunk);
    using Memory = ShareMemory<R, ROWS>;
    run("weighted_sum", {partition_.shares.blocks}, Memory::kThreads, sizeof(Memory),
        warpgroup_sum<R, ROWS>, y<R>(), features_, center_.value_scale, 1 / (kWeightUnit * divisor),
        order_of<ROWS>(), lists_, parts_);
  }

  template <int WIDTH>
  void merge_parts(float* mean, float divisor, bool first_chunk, const QueryStates& state) const {
    run("merge", {queries(), divide_up(features_, WIDTH * kMergeThreads)}, kMergeThreads, 0,
        merge<WIDTH>, law_, radius(), mean, parts_, sums_, divisor, features_, first_chunk, state);
  }

  void merge_differences(float* difference, float divisor, bool first_chunk,
                         const QueryStates& state) const {
    using T = Stored<R>;
    run("merge_difference", {queries(), divide_up(features_, kMergeFeatures)}, kMergeThreads,
        sizeof(MergeMemory), merge_difference<T>, law_, radius(), x(), y(), difference, parts_,
        weights_, partition_.stride, partition_.halves,
        partition_.halves ? 1 / kWeightUnit : divisor, sums_, divisor, features_, first_chunk,
        state);
  }

  void differentiate(const Backward& io) {
    const bool first_chunk = begin_ == 0;
    const bool last_chunk = begin_ + references() == problem_.references;
    const Coefficients coefficients = {weights_, sums_.live, probability_, scaled_};
    const double *nearest = io.nearest + first_, *gradient = io.grad_logsumexp + first_;
    moments_.grad_radius = io.grad_radius ? io.grad_radius + first_ : spare_;
    sums_.pieces = pieces();
    const auto kernel =
        io.grad_y
            ? (law_.gaussian ? find_coefficients<true, true> : find_coefficients<false, true>)
            : (law_.gaussian ? find_coefficients<true, false> : find_coefficients<false, false>);
    run("find_coefficients", {queries(), sums_.pieces}, kQueryThreads, sizeof(CoefficientMemory),
        kernel, law_, radius(), nearest, io.total + first_, gradient, pairs_, references(),
        gradient_floor(), first_chunk, moments_, coefficients);
    if (last_chunk)
      run("finish_moments", {divide_up(queries(), kMomentThreads)}, kMomentThreads, 0,
          finish_moments, law_, radius(), nearest, gradient, static_cast<int>(queries()), moments_);
    if (io.grad_x) {
      const Index at = first_ * problem_.features;
      sum<false>(first_chunk, 1);
      using T = Stored<R>;
      run("merge_gradient", {queries(), divide_up(features_, kMergeFeatures)}, kMergeThreads,
          sizeof(MergeMemory), merge_gradient<T>, law_, radius(), nearest, x(), y(),
          static_cast<float*>(io.grad_x) + at, static_cast<const float*>(io.mean) + at, parts_,
          weights_, partition_.stride, sums_, moments_, features_, first_chunk, last_chunk);
    }
    if (io.grad_y) {
      const Grid grid = {divide_up(features_, kSumFeatures), divide_up(references(), kSumRows)};
      run("reference_gradient", grid, kSumThreads, sizeof(GradientMemory),
          reference_gradient<Stored<R>>, upstream(io), x(), y(), features_, coefficients,
          partition_.stride, first_ == 0,
          static_cast<float*>(io.grad_y) + begin_ * problem_.features);
    }
  }

  const Problem& problem_;
  const Stream& stream_;
  const bool measures_;  // whether distances are found, and not taken from the forward pass
  Arena arena_;
  const bool geforce_, warpgroups_;  // of the device and its code
  const Partition partition_;
  const int features_;
  const WeightLaw law_;
  Center center_ = {};
  Halves x_halves_ = {}, upstream_halves_ = {};
  Pairs pairs_ = {};
  float* units_ = nullptr;
  ChunkWeights weights_ = {};
  PieceSums sums_ = {};
  int* order_ = nullptr;
  Lists lists_ = {};
  Parts parts_ = {};
  Slices slices_ = {};
  Index room_ = 0;  // numbers of parts_.sums that slices may take
  float *probability_ = nullptr, *scaled_ = nullptr;
  double* spare_ = nullptr;
  Moments moments_ = {};
  Index first_ = 0, begin_ = 0;  // first query of the block, first reference of the chunk
};

// Calls `call` with a value of the type by which kernels take the references. In precision "medium"
// shorter types are computed as in "high".
template <class Call>
void with_type(const Problem& problem, Call call) {
  switch (problem.reference_type) {
    case Type::float32:
      return problem.precision == Precision::medium ? call(Rounded{}) : call(float{});
    case Type::bfloat16:
      return call(BFloat16{});
    case Type::float16:
      return call(Float16{});
    case Type::uint8:
      return call(std::uint8_t{});
    default:
      throw std::invalid_argument("references of this type are not computed on CUDA devices");
  }
}

}  // namespace

void limit_cuda(const CudaLimits& to) { limits = to; }

std::string cuda_problem(int device) {
  try {
    Stream({device, 0}).architecture("merge", merge<4>);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

std::int64_t posterior_mean_kept_cuda(const Problem& problem) {
  const Bounds most = bounds_of(problem, least_pairs());
  if (most.queries != problem.queries || most.references < problem.references) return 0;
  Arena counted{CudaWorkspace{}};
  Lasting(counted, problem.queries, problem.references, problem.features);
  return static_cast<std::int64_t>(counted.used());
}

std::size_t posterior_mean_workspace_cuda(const Problem& problem, const CudaPlace& place,
                                          bool backward, std::int64_t kept) {
  const Stream stream(place);
  std::size_t bytes = 0;
  with_type(problem, [&](auto value) {
    using R = decltype(value);
    const Kept of_size = {nullptr, kept};
    bytes = Calculation<R>(problem, stream, CudaWorkspace{}, backward, of_size).workspace();
  });
  return bytes;
}

void posterior_mean_cuda(const Problem& problem, const Forward& out, const CudaPlace& place,
                         const CudaWorkspace& workspace) {
  const Stream stream(place);
  with_type(problem, [&](auto value) {
    using R = decltype(value);
    Calculation<R>(problem, stream, workspace, false, out.kept).forward(out);
  });
}

void posterior_mean_backward_cuda(const Problem& problem, const Backward& io,
                                  const CudaPlace& place, const CudaWorkspace& workspace) {
  const Stream stream(place);
  with_type(problem, [&](auto value) {
    using R = decltype(value);
    Calculation<R>(problem, stream, workspace, true, io.kept).backward(io);
  });
}

}  // namespace pfgm
