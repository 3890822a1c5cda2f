// The posterior mean and its gradients on CUDA devices.
//
// Queries are split into blocks and references into chunks, which bounds the workspace. A chunk
// goes through distances (cuda/distances.h, of data centred by cuda/centering.h) or differences,
// find_limits and refine (cuda/refinement.h), weigh (cuda/weights.h), list_references
// (cuda/lists.h), weighted_sum and merge (cuda/weighted_sums.h). Launches depend on shapes and the
// device alone. Nothing waits for the device, and CUDA graphs can capture the launches.
#include <cmath>
#include <type_traits>

#include "api/posterior_mean.h"
#include "cuda/launch.h"
#include "cuda/weighted_sums.h"

namespace pfgm {
namespace {

CudaLimits limits;

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

// How a problem is split.
struct Partition {
  Index queries, references, stride;  // of a block and a chunk; distance between rows of pairs
  Index parts, part_panels;           // of the sums over a chunk; panels of references in a part
  Index piece;                        // references that a block of weigh takes
  bool few;     // few queries or features would leave matrix units mostly idle
  bool halves;  // whether weighted sums multiply float16 parts
};

Partition partition_of(const Problem& problem, int multiprocessors, bool backward) {
  Partition partition;
  const Index fitting =
      smaller(limits.queries, larger(kSumRows, limits.parts / 2 / problem.features));
  // Blocks of nearly equal size: a last one of few queries would read all references for these.
  // Large ones have whole tiles.
  const Index blocks = larger(1, divide_up(problem.queries, fitting));
  const Index part = larger(1, divide_up(problem.queries, blocks));
  partition.queries = smaller(round_up(part, fitting < 128 ? 1 : kSumRows),
                              smaller(larger(1, problem.queries), fitting));
  const Index pairs = backward ? limits.pairs / 2 : limits.pairs;
  const Index most = 128 * larger(pairs / partition.queries / 128, 1);
  const Index most_parts = larger(1, limits.parts / (partition.queries * problem.features));
  partition.references = smaller(smaller(problem.references, most),
                                 smaller(limits.references, most_parts * kPartPanels * kPanel));
  partition.stride = round_up(partition.references, 32);
  partition.few = partition.queries < 16 || problem.features < kPanel;
  // Weights below 2^-39 have no halves. Together they must not matter.
  partition.halves = !partition.few && problem.references <= limits.halved;
  // Small parts share the work out evenly, large ones leave fewer partial sums.
  const Index tiles =
      divide_up(problem.features, kSumFeatures) * divide_up(partition.queries, kSumRows);
  const Index panels = partition.stride / kPanel;
  const Index even = divide_up(panels * tiles, 4 * multiprocessors);
  partition.part_panels =
      larger(smaller(larger(even, kFewestPanels), kMostPanels), divide_up(panels, most_parts));
  partition.parts = divide_up(panels, partition.part_panels);
  // Each block of weigh finds the nearest reference, so large pieces are cheaper if there are still
  // four blocks per multiprocessor.
  const Index least = divide_up(partition.references, kPiece);
  const Index together = partition.queries * least / (4 * multiprocessors);
  partition.piece = kPiece * smaller(larger(1, together), least);
  return partition;
}

double weight_floor(const Problem& problem, double extra_cutoff = 0) {
  return std::exp(-kWeightCutoff - extra_cutoff) / static_cast<double>(problem.references);
}

// The type by which kernels read references that they do not multiply in float16.
template <class R>
using Stored = std::conditional_t<kRounded<R>, float, R>;

template <class R>
class Calculation {
 public:
  Calculation(const Problem& problem, const Stream& stream, const CudaWorkspace& workspace,
              bool backward)
      : problem_(problem),
        stream_(stream),
        arena_(workspace),
        partition_(partition_of(problem, stream.multiprocessors(), backward)),
        features_(static_cast<int>(problem.features)),
        law_(weight_law(problem, !partition_.few, kRounded<R> && !partition_.few)) {
    const Index queries = partition_.queries, pairs = queries * partition_.stride;
    const Index tiles = divide_up(partition_.references, kTileReferences);
    if (pairs > kMostPairs) throw std::invalid_argument("posterior_mean: too many pairs at once");
    pairs_.stride = partition_.stride;
    pairs_.squared = arena_.take<double>(pairs);
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
    parts_.sums = arena_.take<float>(partition_.parts * queries * problem.features);
    parts_.counts = arena_.take<int>(queries);
    const Index groups = divide_up(queries, kSumRows);
    lists_.listed = arena_.take<int>(groups * partition_.stride);
    lists_.counts = arena_.take<int>(groups);
    lists_.stride = partition_.stride;
    parts_.panels = static_cast<int>(partition_.part_panels);
    if (!partition_.few) {
      const Index width = round_up(problem.features, 2 * kPanel);
      center_.features = features_, center_.width = static_cast<int>(width);
      center_.scattered = kRounded<R>;
      center_.at = arena_.take<float>(width);
      center_.scaled = arena_.take<float>(width);
      center_.spread = arena_.take<float>(divide_up(width, kCenterThreads));
      center_.largest = arena_.take<float>(divide_up(width, kCenterThreads));
      center_.scale = arena_.take<float>(2);
      center_.value_scale = arena_.take<float>(2);
      x_halves_ = take_halves(width);
      x_halves_.rounded = kRounded<R>;
      if (backward) upstream_halves_ = take_halves(width);
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
    for (double** each : {&moments_.projection, &moments_.mass, &moments_.moment, &moments_.sum})
      *each = arena_.take<double>(queries * pieces);
    for (double** each : {&moments_.total, &moments_.exact_sum, &moments_.unit, &spare_})
      *each = arena_.take<double>(queries);
    moments_.pieces = static_cast<int>(pieces);
    moments_.size = sums_.size;
  }

  std::size_t workspace() const { return arena_.used(); }

  void forward(const Forward& out) {
    find_references_center();
    const double floor = weight_floor(problem_);
    for (first_ = 0; first_ < problem_.queries; first_ += partition_.queries) {
      const QueryStates state = {out.nearest + first_, out.total + first_, out.logsumexp + first_};
      float* mean = static_cast<float*>(out.mean) + first_ * problem_.features;
      split(x(), {});
      for (begin_ = 0; begin_ < problem_.references; begin_ += partition_.references) {
        const bool first_chunk = begin_ == 0;
        measure(first_chunk ? nullptr : state.nearest, {});
        sums_.pieces = pieces();
        // Divided by it, a sum of weights is at most 1.
        const float divisor = std::ldexp(1.0f, std::ilogb(static_cast<double>(references())) + 1);
        const bool halves = partition_.halves;
        const auto kernel = halves ? (law_.gaussian ? weigh<true, true> : weigh<true, false>)
                                   : (law_.gaussian ? weigh<false, true> : weigh<false, false>);
        run("weigh", {queries(), sums_.pieces}, kQueryThreads, sizeof(WeighMemory), kernel, law_,
            radius(), pairs_, references(), floor, halves ? kWeightUnit : 1 / divisor, first_chunk,
            state, weights_, sums_);
        list(first_chunk);
        if (halves)
          sum<true>(divisor);
        else
          sum<false>(divisor);
        if (features_ % 4 == 0 && reinterpret_cast<std::uintptr_t>(out.mean) % 16 == 0)
          merge_parts<4>(mean, divisor, first_chunk, state);
        else
          merge_parts<1>(mean, divisor, first_chunk, state);
      }
    }
  }

  void backward(const Backward& io) {
    find_references_center();
    for (first_ = 0; first_ < problem_.queries; first_ += partition_.queries) {
      const bool one = partition_.references == problem_.references;
      split(x(), upstream(io));
      for (begin_ = 0; begin_ < problem_.references; begin_ += partition_.references) {
        measure(io.nearest + first_, upstream(io));
        run("pull", {queries(), pieces()}, kQueryThreads, kScratch, pull, law_, radius(),
            io.nearest + first_, io.total + first_, pairs_, references(), gradient_floor(),
            begin_ == 0, moments_);
      }
      for (begin_ = 0; begin_ < problem_.references; begin_ += partition_.references) {
        if (!one) measure(io.nearest + first_, upstream(io));
        differentiate(io);
      }
    }
  }

 private:
  static constexpr std::size_t kScratch = 8 * kQueryThreads / 32;

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

  Halves take_halves(Index width) {
    const Index count = partition_.queries * width;
    Halves halves = {};
    halves.high = arena_.take<std::uint16_t>(count);
    halves.low = arena_.take<std::uint16_t>(count);
    halves.units = arena_.take<double>(partition_.queries);
    return halves;
  }

  // The centre of all references.
  void find_references_center() const {
    if (partition_.few) return;
    using T = Stored<R>;
    const Rows<T> y = rows_of<T>(problem_.y, problem_.y_stride, problem_.references);
    run("find_center", {divide_up(center_.width, kCenterThreads)}, kCenterThreads,
        sizeof(float) * kCenterThreads / 32, find_center<T>, y, center_);
  }

  // The parts of the block's queries, and of G if there is a G.
  void split(const Rows<float>& x, const Rows<float>& upstream) {
    if (partition_.few) return;
    x_halves_.rows = upstream_halves_.rows = x.count;
    run("split_rows", {x.count}, kSplitThreads, kScratch, split_rows<true>, x, center_,
        pairs_.norms, x_halves_);
    if (upstream.at)
      run("split_rows", {x.count}, kSplitThreads, kScratch, split_rows<false>, upstream, center_,
          pairs_.norms, upstream_halves_);
  }

  // Distances of the block and the chunk, exact where it matters, and G·y, up to a number for each
  // query, if there is a G. `nearest` is the smallest distance so far, or null.
  void measure(const double* nearest, const Rows<float>& upstream) {
    pairs_.tiles = static_cast<int>(divide_up(references(), kTileReferences));
    if (partition_.few) {
      find_differences<false>(x());
      if (upstream.at) find_differences<true>(upstream);
    } else {
      find_products<false>(x_halves_);
      if (upstream.at) find_products<true>(upstream_halves_);
    }
    // Few tiles give few warps work.
    if (pairs_.tiles > 32)
      limit_distances<8>(nearest);
    else
      limit_distances<4>(nearest);
    const Index most = divide_up(queries() * references(), kRefineWarps);
    run("refine", {smaller(stream_.multiprocessors(), most)}, kRefineThreads, 0, refine<Stored<R>>,
        x(), upstream, y(), partition_.few ? nullptr : center_.at, features_, units_, pairs_);
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

  // The tiles that take least time, by their predicted times: 5 to 8 to 12 to 22, in rounds of the
  // busiest multiprocessor; with one product in place of three 5 to 7 to 15 to 18. Larger tiles
  // read each value less often.
  template <bool PROJECT>
  void find_products(const Halves& rows) const {
    constexpr bool kOne = kRounded<R>;
    const Index small = 5 * rounds(32, 64), medium = (kOne ? 7 : 8) * rounds(64, 64),
                large = (kOne ? 15 : 12) * rounds(64, 128),
                largest = (kOne ? 18 : 22) * rounds(128, 128);
    const Index least = smaller(medium, smaller(large, largest));
    if (queries() <= 32 || small < least) return find_products<PROJECT, 32, 64>(rows);
    if (medium < smaller(large, largest)) return find_products<PROJECT, 64, 64>(rows);
    if (large <= largest) return find_products<PROJECT, 64, 128>(rows);
    find_products<PROJECT, 128, 128>(rows);
  }

  template <bool PROJECT, int QUERIES, int REFERENCES>
  void find_products(const Halves& rows) const {
    run("distances", tiles(QUERIES, REFERENCES), kDistanceThreads,
        sizeof(DistanceMemory<R, QUERIES, REFERENCES>), distances<R, QUERIES, REFERENCES, PROJECT>,
        rows, y<R>(), center_, pairs_);
  }

  // How many blocks the busiest multiprocessor has.
  Index rounds(int queries, int references) const {
    const Grid grid = tiles(queries, references);
    return divide_up(grid.x * grid.y, stream_.multiprocessors());
  }

  Grid tiles(int rows, int references) const {
    return {divide_up(this->references(), references), divide_up(queries(), rows)};
  }

  // Pieces of the chunk that blocks of weigh, pull and find_coefficients take.
  int pieces() const { return static_cast<int>(divide_up(references(), sums_.size)); }

  // The references that groups of queries need. The order of the queries, if there is one, is found
  // for the first chunk. In the others it only decides how long the lists are.
  void list(bool first_chunk) {
    parts_.queries = static_cast<int>(queries());
    const bool ordered = order() && first_chunk;
    if (ordered && queries() > kListThreads)
      run("order_queries", {divide_up(queries(), kRankedQueries)}, kQueryThreads,
          sizeof(int) * static_cast<std::size_t>(queries()), order_queries, sums_, parts_.queries,
          order_);
    const auto kernel =
        ordered && queries() <= kListThreads ? list_references<true> : list_references<false>;
    run("list_references", {divide_up(queries(), kSumRows)}, kListThreads, sizeof(ListMemory),
        kernel, weights_.live, sums_, order(), references(), lists_, parts_);
  }

  int* order() const { return queries() > kSumRows ? order_ : nullptr; }

  // The parts of Σ w y / divisor.
  template <bool HALVES>
  void sum(float divisor) const {
    const Grid grid = {divide_up(features_, kSumFeatures), divide_up(queries(), kSumRows),
                       divide_up(divide_up(references(), kPanel), parts_.panels)};
    using T = std::conditional_t<HALVES, R, Stored<R>>;
    run("weighted_sum", grid, kSumThreads, sizeof(SumMemory<T>), weighted_sum<T, HALVES>, y<T>(),
        features_, center_.value_scale, weights_, 1 / (kWeightUnit * divisor), order(), lists_,
        parts_);
  }

  template <int WIDTH>
  void merge_parts(float* mean, float divisor, bool first_chunk, const QueryStates& state) const {
    run("merge", {queries(), divide_up(features_, WIDTH * kMergeThreads)}, kMergeThreads, 0,
        merge<WIDTH>, law_, radius(), mean, parts_, sums_, divisor, features_, first_chunk, state);
  }

  void differentiate(const Backward& io) {
    const bool first_chunk = begin_ == 0;
    const bool last_chunk = begin_ + references() == problem_.references;
    const Coefficients coefficients = {weights_, sums_.live, io.grad_y ? probability_ : nullptr,
                                       scaled_};
    const double *nearest = io.nearest + first_, *gradient = io.grad_logsumexp + first_;
    moments_.grad_radius = io.grad_radius ? io.grad_radius + first_ : spare_;
    sums_.pieces = pieces();
    run("find_coefficients", {queries(), sums_.pieces}, kQueryThreads, kScratch, find_coefficients,
        law_, radius(), nearest, io.total + first_, gradient, pairs_, references(),
        gradient_floor(), first_chunk, moments_, coefficients);
    if (last_chunk)
      run("finish_moments", {divide_up(queries(), kQueryThreads)}, kQueryThreads, 0, finish_moments,
          law_, radius(), nearest, gradient, static_cast<int>(queries()), moments_);
    if (io.grad_x) {
      const Index at = first_ * problem_.features;
      list(first_chunk);
      sum<false>(1);
      run("merge_gradient", {queries(), divide_up(features_, kMergeThreads)}, kMergeThreads, 0,
          merge_gradient, static_cast<float*>(io.grad_x) + at, parts_, x(),
          static_cast<const float*>(io.mean) + at, moments_, features_, first_chunk, last_chunk);
    }
    if (io.grad_y) {
      const Grid grid = {divide_up(features_, kSumFeatures), divide_up(references(), kSumRows)};
      run("reference_gradient", grid, kSumThreads, sizeof(SumMemory<float>),
          reference_gradient<Stored<R>>, upstream(io), x(), y(), features_, coefficients,
          partition_.stride, first_ == 0,
          static_cast<float*>(io.grad_y) + begin_ * problem_.features);
    }
  }

  const Problem& problem_;
  const Stream& stream_;
  Arena arena_;
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

std::size_t posterior_mean_workspace_cuda(const Problem& problem, const CudaPlace& place,
                                          bool backward) {
  const Stream stream(place);
  std::size_t bytes = 0;
  with_type(problem, [&](auto value) {
    using R = decltype(value);
    bytes = Calculation<R>(problem, stream, CudaWorkspace{}, backward).workspace();
  });
  return bytes;
}

void posterior_mean_cuda(const Problem& problem, const Forward& out, const CudaPlace& place,
                         const CudaWorkspace& workspace) {
  const Stream stream(place);
  with_type(problem, [&](auto value) {
    using R = decltype(value);
    Calculation<R>(problem, stream, workspace, false).forward(out);
  });
}

void posterior_mean_backward_cuda(const Problem& problem, const Backward& io,
                                  const CudaPlace& place, const CudaWorkspace& workspace) {
  const Stream stream(place);
  with_type(problem, [&](auto value) {
    using R = decltype(value);
    Calculation<R>(problem, stream, workspace, true).backward(io);
  });
}

}  // namespace pfgm
