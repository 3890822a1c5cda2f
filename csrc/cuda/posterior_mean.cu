// The posterior mean and its gradients on CUDA devices.
//
// Queries are split into blocks and references into chunks, which bounds the workspace. A chunk
// goes through distances or differences, then refine (cuda/distances.h), weigh (cuda/weights.h),
// weighted_sum and merge (cuda/weighted_sums.h). For few queries, from sm_90 on, one pass over the
// references does all of this (cuda/single_pass.h). Launches depend on shapes alone. Nothing waits
// for the device, and CUDA graphs can capture the launches.
#include <cmath>

#include "api/posterior_mean.h"
#include "cuda/launch.h"
#include "cuda/single_pass.h"
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
  Index stretches, stretch_words;     // of the sums over a chunk
  bool few;  // few queries or features would leave matrix units mostly idle
};

Partition partition_of(const Problem& problem, int multiprocessors) {
  Partition partition;
  const Index fitting = larger(kSumRows, limits.parts / problem.features);
  partition.queries = smaller(problem.queries, smaller(limits.queries, fitting));
  const Index most = round_up(larger(limits.pairs / partition.queries, 128), 128);
  partition.references = smaller(problem.references, smaller(most, limits.references));
  partition.stride = round_up(partition.references, 32);
  partition.few = partition.queries < 16 || problem.features < kPanel;
  // Two blocks per multiprocessor, if memory and the length of a list allow.
  const Index tiles =
      divide_up(problem.features, kSumFeatures) * divide_up(partition.queries, kSumRows);
  const Index words = partition.stride / 32;
  const Index wanted = smaller(divide_up(2 * multiprocessors, tiles),
                               larger(1, limits.parts / (partition.queries * problem.features)));
  const Index stretches =
      larger(smaller(wanted, divide_up(words, 4)), divide_up(words, kStretchWords));
  partition.stretch_words = divide_up(words, stretches);
  partition.stretches = divide_up(words, partition.stretch_words);
  return partition;
}

double weight_floor(const Problem& problem, double extra_cutoff = 0) {
  return std::exp(-kWeightCutoff - extra_cutoff) / static_cast<double>(problem.references);
}

// One pass in clusters. One tile must hold all queries, so that each reference is read once, and
// there must be enough features to split. `clusters` is how many run at once; 0 if one pass is not
// possible.
struct SinglePass {
  Index tile = 0;  // queries that the tile holds
  Launch shape = {};
  Index clusters = 0, stretches = 0, stretch = 0;
};

constexpr Index kPassFeatures = 512;  // fewer features do not use the single pass

template <class R, int QUERIES>
SinglePass pass_in_tile(const Problem& problem, const Stream& stream) {
  using Memory = PassMemory<R, QUERIES>;
  SinglePass pass;
  const int architecture = stream.architecture("single_pass", single_pass<R, QUERIES>);
  if (architecture < 90 || architecture >= 120) return pass;  // the kernel is empty there
  const Index cluster = divide_up(problem.features, Memory::kSlice);
  if (cluster > kPassCluster<QUERIES>) return pass;
  pass.tile = QUERIES;
  pass.shape = {"single_pass", {cluster}, kPassThreads, sizeof(Memory), static_cast<int>(cluster)};
  const Index clusters = stream.resident_clusters(pass.shape, single_pass<R, QUERIES>);
  // Some parts of a device may be too small for a cluster. If many multiprocessors stay idle, two
  // passes are faster.
  if (4 * clusters * cluster < 3 * stream.multiprocessors()) return pass;
  pass.clusters = clusters;
  const Index stretches =
      smaller(smaller(pass.clusters, kMostPasses), divide_up(problem.references, 4 * kPassTile));
  pass.stretch = round_up(divide_up(problem.references, stretches), kPassTile);
  pass.stretches = divide_up(problem.references, pass.stretch);
  pass.shape.grid.x = cluster * pass.stretches;
  return pass;
}

template <class R>
SinglePass single_pass_of(const Problem& problem, const Stream& stream) {
  if (problem.queries < 16 || problem.features < kPassFeatures || stream.float64_cost() > 4)
    return {};
  if (problem.queries <= 64) return pass_in_tile<R, 64>(problem, stream);
  if (problem.queries <= 128) return pass_in_tile<R, 128>(problem, stream);
  return {};
}

template <class R>
class Calculation {
 public:
  Calculation(const Problem& problem, const Stream& stream, const CudaWorkspace& workspace,
              bool backward)
      : problem_(problem),
        stream_(stream),
        arena_(workspace),
        partition_(partition_of(problem, stream.multiprocessors())),
        features_(static_cast<int>(problem.features)),
        law_(weight_law(problem, !partition_.few)) {
    if (!backward) pass_ = single_pass_of<R>(problem, stream);
    if (pass_.clusters > 0) {
      const Index rows = pass_.stretches * problem.queries;
      passes_.sums = arena_.take<float>(rows * problem.features);
      passes_.nearest = arena_.take<double>(rows);
      passes_.total = arena_.take<double>(rows);
      return;
    }
    const Index pairs = partition_.queries * partition_.stride;
    pairs_.stride = partition_.stride;
    pairs_.squared = arena_.take<double>(pairs);
    pairs_.lowest =
        arena_.take<float>(partition_.queries * divide_up(partition_.references, kTileReferences));
    pairs_.norms = arena_.take<float>(partition_.queries);
    pairs_.projected = backward ? arena_.take<double>(pairs) : nullptr;
    weights_.weight = arena_.take<float>(pairs);
    weights_.live = arena_.take<std::uint32_t>(pairs / 32);
    share_ = backward ? nullptr : arena_.take<float>(partition_.queries);
    carry_ = backward ? nullptr : arena_.take<float>(partition_.queries);
    parts_ = arena_.take<float>(partition_.stretches * partition_.queries * problem.features);
    if (!backward) return;
    probability_ = arena_.take<float>(pairs);
    scaled_ = arena_.take<float>(pairs);
    for (double** each : {&moments_.projection, &moments_.mass, &moments_.moment, &moments_.sum,
                          &moments_.exact_sum, &moments_.unit, &spare_})
      *each = arena_.take<double>(partition_.queries);
  }

  std::size_t workspace() const { return arena_.used(); }

  void forward(const Forward& out) {
    if (pass_.clusters > 0) return pass_.tile == 64 ? in_one_pass<64>(out) : in_one_pass<128>(out);
    const double floor = weight_floor(problem_);
    for (first_ = 0; first_ < problem_.queries; first_ += partition_.queries) {
      const QueryStates state = {out.nearest + first_, out.total + first_, out.logsumexp + first_};
      float* mean = static_cast<float*>(out.mean) + first_ * problem_.features;
      for (begin_ = 0; begin_ < problem_.references; begin_ += partition_.references) {
        measure(begin_ == 0 ? nullptr : state.nearest, {});
        run("weigh", {queries()}, kQueryThreads, kScratch, weigh, law_, radius(), pairs_,
            references(), floor, begin_ == 0, state, weights_, share_, carry_);
        sum(share_);
        run("merge", {queries(), divide_up(features_, kMergeThreads)}, kMergeThreads, 0, merge,
            mean, parts_, carry_, features_, stretches(), begin_ == 0);
      }
    }
  }

  void backward(const Backward& io) {
    for (first_ = 0; first_ < problem_.queries; first_ += partition_.queries) {
      const bool one = partition_.references == problem_.references;
      for (begin_ = 0; begin_ < problem_.references; begin_ += partition_.references) {
        measure(io.nearest + first_, upstream(io));
        run("pull", {queries()}, kQueryThreads, kScratch, pull, law_, radius(), io.nearest + first_,
            io.total + first_, pairs_, references(), gradient_floor(), begin_ == 0, moments_);
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
  int stretches() const {
    return static_cast<int>(divide_up(divide_up(references(), 32), partition_.stretch_words));
  }
  const double* radius() const { return problem_.radius + first_; }
  Rows<float> x() const {
    const float* rows = static_cast<const float*>(problem_.x) + first_ * problem_.x_stride;
    return rows_of<float>(rows, problem_.x_stride, queries());
  }
  Rows<R> y() const {
    const R* rows = static_cast<const R*>(problem_.y) + begin_ * problem_.y_stride;
    return rows_of<R>(rows, problem_.y_stride, references());
  }
  Rows<float> upstream(const Backward& io) const {
    const float* rows = static_cast<const float*>(io.grad_mean) + first_ * problem_.features;
    return rows_of<float>(rows, problem_.features, queries());
  }
  double gradient_floor() const { return weight_floor(problem_, kGradientCutoff); }

  template <int QUERIES>
  void in_one_pass(const Forward& out) const {
    const Rows<float> x = rows_of<float>(problem_.x, problem_.x_stride, problem_.queries);
    const Rows<R> y = rows_of<R>(problem_.y, problem_.y_stride, problem_.references);
    // A power of two, so that it rounds nothing.
    const float shrink = std::ldexp(1.0f, -std::ilogb(static_cast<double>(pass_.stretch)) - 1);
    stream_.launch(pass_.shape, single_pass<R, QUERIES>, x, y, features_, problem_.radius, law_,
                   weight_floor(problem_), pass_.shape.cluster, static_cast<int>(pass_.stretch),
                   shrink, passes_);
    run("merge_passes", {problem_.queries, divide_up(features_, kMostPasses)}, kMostPasses,
        sizeof(double) * (kMostPasses + kMostPasses / 32), merge_passes, law_, problem_.radius,
        passes_, static_cast<int>(pass_.stretches), shrink, features_,
        static_cast<float*>(out.mean), QueryStates{out.nearest, out.total, out.logsumexp});
  }

  // Distances of the block and the chunk, exact where it matters, and G·y if there is a G.
  // `nearest` is the smallest distance so far, or null.
  void measure(const double* nearest, const Rows<float>& upstream) {
    pairs_.tiles = static_cast<int>(divide_up(references(), kTileReferences));
    pair_products<false>(x());
    if (upstream.at) pair_products<true>(upstream);
    const Index block_tiles = larger(kMinRefineTiles, divide_up(pairs_.tiles, kMaxRefineBlocks));
    run("refine", {divide_up(pairs_.tiles, block_tiles), queries()}, kRefineThreads,
        8 * kRefineThreads / 32, refine<R>, x(), upstream, y(), features_, radius(), nearest, law_,
        pairs_, static_cast<int>(block_tiles));
  }

  template <bool PROJECT>
  void pair_products(const Rows<float>& rows) {
    if (partition_.few)
      run("differences", tiles(8), 256, sizeof(TileMemory<R, 8>), differences<R, PROJECT>, rows,
          y(), features_, pairs_);
    else if (queries() <= 32 || tiles(64).x * tiles(64).y < 2 * stream_.multiprocessors())
      run("distances", tiles(32), 128, sizeof(TileMemory<R, 32>), distances<R, 32, PROJECT>, rows,
          y(), features_, pairs_);
    else
      run("distances", tiles(64), 128, sizeof(TileMemory<R, 64>), distances<R, 64, PROJECT>, rows,
          y(), features_, pairs_);
  }

  Grid tiles(int rows) const { return {pairs_.tiles, divide_up(queries(), rows)}; }

  // parts = share Σ w y.
  void sum(const float* share) const {
    const Grid grid = {divide_up(features_, kSumFeatures), divide_up(queries(), kSumRows),
                       stretches()};
    run("weighted_sum", grid, kSumThreads, sizeof(SumMemory<R>), weighted_sum<R>, y(), features_,
        weights_, partition_.stride, static_cast<int>(queries()), share,
        static_cast<int>(partition_.stretch_words), parts_);
  }

  void differentiate(const Backward& io) {
    const bool first_chunk = begin_ == 0;
    const bool last_chunk = begin_ + references() == problem_.references;
    const Coefficients coefficients = {weights_, io.grad_y ? probability_ : nullptr, scaled_};
    Moments moments = moments_;
    moments.grad_radius = io.grad_radius ? io.grad_radius + first_ : spare_;
    run("find_coefficients", {queries()}, kQueryThreads, kScratch, find_coefficients, law_,
        radius(), io.nearest + first_, io.total + first_, io.grad_logsumexp + first_, pairs_,
        references(), gradient_floor(), first_chunk, moments, coefficients);
    if (io.grad_x) {
      const Index at = first_ * problem_.features;
      sum(nullptr);
      run("merge_gradient", {queries(), divide_up(features_, kMergeThreads)}, kMergeThreads, 0,
          merge_gradient, static_cast<float*>(io.grad_x) + at, parts_, x(),
          static_cast<const float*>(io.mean) + at, moments, features_, stretches(), first_chunk,
          last_chunk);
    }
    if (io.grad_y) {
      const Grid grid = {divide_up(features_, kSumFeatures), divide_up(references(), kSumRows)};
      run("reference_gradient", grid, kSumThreads, sizeof(SumMemory<float>), reference_gradient<R>,
          upstream(io), x(), y(), features_, coefficients, partition_.stride, first_ == 0,
          static_cast<float*>(io.grad_y) + begin_ * problem_.features);
    }
  }

  const Problem& problem_;
  const Stream& stream_;
  Arena arena_;
  const Partition partition_;
  const int features_;
  const WeightLaw law_;
  SinglePass pass_;
  PassResults passes_ = {};
  Pairs pairs_ = {};
  ChunkWeights weights_ = {};
  float *share_ = nullptr, *carry_ = nullptr, *parts_ = nullptr;
  float *probability_ = nullptr, *scaled_ = nullptr;
  double* spare_ = nullptr;
  Moments moments_ = {};
  Index first_ = 0, begin_ = 0;  // first query of the block, first reference of the chunk
};

// Calls `call` with a value of the references' type.
template <class Call>
void with_type(Type type, Call call) {
  switch (type) {
    case Type::float32:
      return call(float{});
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
    Stream({device, 0}).architecture("merge", merge);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

std::size_t posterior_mean_workspace_cuda(const Problem& problem, const CudaPlace& place,
                                          bool backward) {
  const Stream stream(place);
  std::size_t bytes = 0;
  with_type(problem.reference_type, [&](auto value) {
    using R = decltype(value);
    bytes = Calculation<R>(problem, stream, CudaWorkspace{}, backward).workspace();
  });
  return bytes;
}

void posterior_mean_cuda(const Problem& problem, const Forward& out, const CudaPlace& place,
                         const CudaWorkspace& workspace) {
  const Stream stream(place);
  with_type(problem.reference_type, [&](auto value) {
    using R = decltype(value);
    Calculation<R>(problem, stream, workspace, false).forward(out);
  });
}

void posterior_mean_backward_cuda(const Problem& problem, const Backward& io,
                                  const CudaPlace& place, const CudaWorkspace& workspace) {
  const Stream stream(place);
  with_type(problem.reference_type, [&](auto value) {
    using R = decltype(value);
    Calculation<R>(problem, stream, workspace, true).backward(io);
  });
}

}  // namespace pfgm
