// The posterior mean and its gradients on CUDA devices.
//
// Queries are split into blocks and references into chunks, which bounds the workspace
// (cuda/plan.h, cuda/workspace.h). A chunk goes through distances (cuda/distances.h, of data
// centred by cuda/centering.h) or differences, finish_distances if blocks of distances share out
// the features, find_limits and refine (cuda/refinement.h), weigh (cuda/weights.h), list_references
// (cuda/lists.h), weighted_sum (cuda/weighted_sums.h) and merge (cuda/merging.h). distances and
// weighted_sum have a main loop each (cuda/warp_products.h, cuda/warp_sums.h). The backward pass
// (cuda/coefficients.h, reference_gradient.h) takes the distances that the forward pass kept, or
// computes them again.
// Launches depend on shapes, the device and whether distances are kept. Nothing waits for the
// device, and CUDA graphs can capture the launches.
#include <cmath>
#include <limits>
#include <type_traits>

#include "api/posterior_mean.h"
#include "cuda/centering.h"
#include "cuda/coefficients.h"
#include "cuda/differences.h"
#include "cuda/distances.h"
#include "cuda/launch.h"
#include "cuda/lists.h"
#include "cuda/merging.h"
#include "cuda/reference_gradient.h"
#include "cuda/refinement.h"
#include "cuda/weighted_sums.h"
#include "cuda/weights.h"
#include "cuda/workspace.h"

namespace pfgm {
namespace {

// A weight below e^-kWeightCutoff / M of the sum of weights becomes zero. M such weights together
// are smaller than the rounding of a float32 result. So it does not matter that the sum of weights
// has those of some tiles, but not of the tiles that weigh skips. A gradient multiplies p_j by (y_j
// − mean)²/s, which may be large; there the cutoff is kGradientCutoff nats lower.
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

Device device_of(const Stream& stream) { return {stream.multiprocessors(), stream.major()}; }

WeightLaw weight_law(const Problem& problem, const Plan& plan) {
  return weight_law(problem, !plan.few, plan.backward || plan.keeps,
                    plan.device.major < 9 ? kEarlierBias : kBias);
}

// Queries of the present block, or references of the present chunk.
struct Range {
  Index first;
  int count;
};

// The launches of a pass. R is the element type of the references.
template <class R>
class Launches {
 public:
  Launches(const Problem& problem, const Stream& stream, const Plan& plan, const Workspace& arrays)
      : problem_(problem),
        stream_(stream),
        plan_(plan),
        law_(weight_law(problem, plan)),
        arrays_(arrays) {
    arrays_.center.excess = plan.few ? 0 : kExcess<R>;
  }

  void forward(const Forward& out) {
    find_references_center();
    each_block([&] {
      const QueryStates state = {out.nearest + block_.first, out.total + block_.first,
                                 out.logsumexp + block_.first};
      split<true>(x(), arrays_.x);
      each_chunk([&] {
        measure(first_chunk() ? nullptr : state.nearest);
        // Weights are divided by it, so that their sum is at most 1.
        const float divisor = std::ldexp(1.0f, std::ilogb(static_cast<double>(chunk_.count)) + 1);
        find_weights(divisor, state);
        if (plan_.halves)
          sum<true>(divisor);
        else
          sum<false>(divisor);
        merge_chunk(static_cast<float*>(out.mean) + block_.first * problem_.features, divisor,
                    state);
      });
    });
  }

  void backward(const Backward& io) {
    if (plan_.measures()) find_references_center();
    each_block([&] {
      // With one chunk, the forward pass measured without a nearest distance. Without one here too,
      // distances are the same to the bit.
      const bool one = plan_.references == problem_.references;
      const double* const nearest = one ? nullptr : io.nearest + block_.first;
      if (plan_.measures()) split<true>(x(), arrays_.x);
      split<false>(block_rows(io.grad_mean), arrays_.upstream);
      each_chunk([&] {
        if (plan_.measures()) measure(nearest);
        project(io);
        run("pull", {block_.count, arrays_.sums.pieces}, kQueryThreads, sizeof(PullMemory), pull,
            law_, radius(), io.nearest + block_.first, io.total + block_.first, arrays_.pairs,
            chunk_.count, gradient_floor(), first_chunk(), arrays_.moments);
      });
      each_chunk([&] {
        if (!one) {
          measure(nearest);
          project(io);
        }
        find_gradients(io);
      });
    });
  }

 private:
  template <class Kernel, class... Arguments>
  void run(const char* name, Grid grid, int threads, std::size_t shared, Kernel* kernel,
           Arguments... arguments) const {
    stream_.launch({name, grid, threads, shared}, kernel, arguments...);
  }

  // ---- blocks and chunks ----------------------------------------------------------------------

  template <class Body>
  void each_block(const Body& body) {
    for (Index first = 0; first < problem_.queries; first += plan_.queries) {
      block_ = {first, static_cast<int>(smaller(plan_.queries, problem_.queries - first))};
      arrays_.parts.queries = block_.count;
      body();
    }
  }

  template <class Body>
  void each_chunk(const Body& body) {
    for (Index first = 0; first < problem_.references; first += plan_.references) {
      chunk_ = {first, static_cast<int>(smaller(plan_.references, problem_.references - first))};
      arrays_.pairs.tiles = static_cast<int>(divide_up(chunk_.count, kTileReferences));
      // Each block of weigh, pull and find_coefficients takes a piece of the chunk.
      arrays_.sums.pieces = static_cast<int>(divide_up(chunk_.count, arrays_.sums.size));
      body();
    }
  }

  bool first_chunk() const { return chunk_.first == 0; }
  bool last_chunk() const { return chunk_.first + chunk_.count == problem_.references; }

  const double* radius() const { return problem_.radius + block_.first; }
  Rows<float> x() const {
    const float* rows = static_cast<const float*>(problem_.x) + block_.first * problem_.x_stride;
    return rows_of<float>(rows, problem_.x_stride, block_.count);
  }
  Rows<R> y() const {
    const R* rows = static_cast<const R*>(problem_.y) + chunk_.first * problem_.y_stride;
    return rows_of<R>(rows, problem_.y_stride, chunk_.count);
  }
  // The block's rows of a contiguous tensor.
  Rows<float> block_rows(const void* values) const {
    const float* rows = static_cast<const float*>(values) + block_.first * problem_.features;
    return rows_of<float>(rows, problem_.features, block_.count);
  }
  double gradient_floor() const { return weight_floor(problem_, kGradientCutoff); }

  // Blocks for tiles of the pairs.
  Grid tiles(int rows, int references) const {
    return {divide_up(chunk_.count, references), divide_up(block_.count, rows)};
  }

  // ---- distances ------------------------------------------------------------------------------

  // The centre of all references, or of as many as an int counts.
  void find_references_center() const {
    if (plan_.few) return;
    const Index count = smaller(problem_.references, std::numeric_limits<int>::max());
    const Rows<R> y = rows_of<R>(problem_.y, problem_.y_stride, count);
    run("find_center", {divide_up(plan_.width(), kCenterThreads)}, kCenterThreads,
        sizeof(float) * kCenterThreads / 32, find_center<R>, y, arrays_.center);
  }

  // Splits the block's queries, which are CENTERED, or its G into float16 parts.
  template <bool CENTERED>
  void split(const Rows<float>& rows, Halves& halves) {
    if (plan_.few) return;
    halves.rows = rows.count, halves.whole = rows;
    run("split_rows", {rows.count}, kSplitThreads, sizeof(SplitMemory), split_rows<CENTERED>, rows,
        arrays_.center, arrays_.pairs.norms, halves);
  }

  // Distances of the block and the chunk, exact where it matters. `nearest` is the smallest
  // distance so far; null means none.
  void measure(const double* nearest) const {
    if (plan_.few)
      find_differences<false>(x(), x());
    else
      find_products<false>(arrays_.x);
    // With few tiles more warps would be idle.
    if (arrays_.pairs.tiles > 32)
      limit_distances<8>(nearest);
    else
      limit_distances<4>(nearest);
    const Index most = divide_up(static_cast<Index>(block_.count) * chunk_.count, kRefineWarps);
    run("refine", {smaller(kRefineBlocks * plan_.device.multiprocessors, most)}, kRefineThreads, 0,
        refine<R>, x(), y(), plan_.features, arrays_.units, arrays_.pairs);
  }

  // G·y of the block and the chunk, up to a constant for each query.
  void project(const Backward& io) const {
    if (plan_.few)
      find_differences<true>(block_rows(io.mean), block_rows(io.grad_mean));
    else
      find_products<true>(arrays_.upstream);
  }

  template <int WARPS>
  void limit_distances(const double* nearest) const {
    const float width = static_cast<float>(std::sqrt(static_cast<double>(plan_.features)));
    const auto kernel = plan_.few ? find_limits<false, WARPS> : find_limits<true, WARPS>;
    run("find_limits", {block_.count}, 32 * WARPS, LimitMemory<WARPS>::bytes(arrays_.pairs.tiles),
        kernel, law_, radius(), nearest, arrays_.pairs, chunk_.count, width, arrays_.center.scale,
        arrays_.units);
  }

  template <bool PROJECT>
  void find_differences(const Rows<float>& rows, const Rows<float>& upstream) const {
    run("differences", tiles(8, kTileReferences), 256, sizeof(DifferenceMemory<R, PROJECT>),
        differences<R, PROJECT>, rows, upstream, y(), plan_.features, arrays_.pairs);
  }

  // With the tiles that the plan chooses for so many pairs.
  template <bool PROJECT>
  void find_products(const Halves& rows) const {
    const Tiling tiling = plan_.tiling(block_.count, chunk_.count, arrays_.room);
    if (tiling.queries == 32) return find_with<WarpProducts<R, 32, 64>, PROJECT>(rows, tiling);
    if (tiling.queries == 64) return find_with<WarpProducts<R, 64, 64>, PROJECT>(rows, tiling);
    find_with<WarpProducts<R, 128, 128>, PROJECT>(rows, tiling);
  }

  template <class Loop, bool PROJECT>
  void find_with(const Halves& rows, const Tiling& tiling) const {
    Grid grid = tiles(Loop::kQueries, Loop::kReferences);
    const auto find = [&](auto* kernel, const Slices& sums) {
      run("distances", grid, Loop::kThreads, sizeof(TileMemory<Loop>), kernel, rows, y(),
          arrays_.center, arrays_.pairs, sums);
    };
    if (tiling.slices == 1)
      return find(distances < Loop, PROJECT ? Target::projections : Target::distances >, Slices{});
    const Index trips = divide_up(plan_.features, Loop::kFeatures);
    Slices sums = arrays_.slices;
    sums.stride = round_up(chunk_.count, kPanel);
    sums.trips = static_cast<int>(divide_up(trips, tiling.slices));
    sums.count = static_cast<int>(divide_up(trips, sums.trips));
    sums.squares =
        reinterpret_cast<double*>(sums.products + sums.count * block_.count * sums.stride);
    grid.z = sums.count;
    find(distances<Loop, Target::slice>, sums);
    run("finish_distances", tiles(kFinishWarps * kFinishQueries, kTileReferences), kFinishThreads,
        0, finish_distances<R, PROJECT>, rows, y(), arrays_.center, arrays_.pairs, sums);
  }

  // ---- weights and their sums -----------------------------------------------------------------

  void find_weights(float divisor, const QueryStates& state) const {
    const double floor = problem_.difference ? difference_floor(problem_) : weight_floor(problem_);
    const bool halves = plan_.halves;
    run("weigh", {block_.count, arrays_.sums.pieces}, kQueryThreads, sizeof(WeighMemory),
        halves ? weigh<true> : weigh<false>, law_, radius(), arrays_.pairs, chunk_.count, floor,
        halves ? kWeightUnit : 1 / divisor, first_chunk(), state, arrays_.weights, arrays_.sums);
  }

  // The parts of Σ w y / divisor. The order of the queries, if there is one, is found for the first
  // chunk and kept: for the others it can only make lists longer.
  template <bool HALVES>
  void sum(float divisor) const {
    int* const order = block_.count > kSumRows ? arrays_.order : nullptr;
    if (order && first_chunk())
      run("order_queries", {divide_up(block_.count, kRankedQueries)}, kQueryThreads,
          sizeof(int) * static_cast<std::size_t>(block_.count), order_queries, arrays_.sums,
          block_.count, order);
    const Index groups = divide_up(block_.count, kSumRows),
                panels = divide_up(chunk_.count, kPanel);
    run("list_references", {groups * list_shares(groups, panels)}, kListThreads,
        ListMemory::bytes(chunk_.count), list_references<HALVES>, arrays_.weights, order,
        chunk_.count, arrays_.lists, arrays_.parts);
    run("weighted_sum",
        {divide_up(plan_.features, kSumFeatures), groups, divide_up(panels, plan_.part_panels)},
        kSumThreads, sizeof(typename WarpSums<R, HALVES>::Memory), weighted_sum<R, HALVES>, y(),
        plan_.features, arrays_.center.value_scale, 1 / (kWeightUnit * divisor), order,
        arrays_.lists, arrays_.parts);
  }

  // Blocks that share out the list of a group. Each of them finds the whole list: the more there
  // are, the longer this takes, and the shorter the gathering. None has more than kGatheredPanels.
  Index list_shares(Index groups, Index panels) const {
    const Index wanted = smaller(panels, 2 * plan_.device.multiprocessors / groups);
    return larger(wanted, 1 + divide_up(panels, kGatheredPanels));
  }

  // Merges the sums of the chunk with the result of earlier ones, which may not be aligned.
  void merge_chunk(float* out, float divisor, const QueryStates& state) const {
    if (problem_.difference)
      merge_differences(out, divisor, state);
    else if (plan_.features % 4 == 0 && reinterpret_cast<std::uintptr_t>(out) % 16 == 0)
      merge_parts<4>(out, divisor, state);
    else
      merge_parts<1>(out, divisor, state);
  }

  template <int WIDTH>
  void merge_parts(float* mean, float divisor, const QueryStates& state) const {
    run("merge", {block_.count, divide_up(plan_.features, WIDTH * kMergeThreads)}, kMergeThreads, 0,
        merge<WIDTH>, law_, radius(), mean, arrays_.parts, arrays_.sums, divisor, plan_.features,
        first_chunk(), state);
  }

  void merge_differences(float* difference, float divisor, const QueryStates& state) const {
    run("merge_difference", {block_.count, divide_up(plan_.features, kMergeFeatures)},
        kMergeThreads, sizeof(MergeMemory), merge_difference<R>, law_, radius(), x(), y(),
        difference, arrays_.parts, arrays_.weights, plan_.stride, plan_.halves,
        plan_.halves ? 1 / kWeightUnit : divisor, arrays_.sums, divisor, plan_.features,
        first_chunk(), state);
  }

  // ---- gradients ------------------------------------------------------------------------------

  void find_gradients(const Backward& io) {
    Moments& moments = arrays_.moments;
    moments.grad_radius = io.grad_radius ? io.grad_radius + block_.first : arrays_.spare;
    const double* const nearest = io.nearest + block_.first;
    const double* const gradient = io.grad_logsumexp + block_.first;
    const auto kernel = io.grad_y ? find_coefficients<true> : find_coefficients<false>;
    run("find_coefficients", {block_.count, arrays_.sums.pieces}, kQueryThreads,
        sizeof(CoefficientMemory), kernel, law_, radius(), nearest, io.total + block_.first,
        gradient, arrays_.pairs, chunk_.count, gradient_floor(), first_chunk(), moments,
        arrays_.coefficients);
    if (last_chunk())
      run("finish_moments", {divide_up(block_.count, kMomentThreads)}, kMomentThreads, 0,
          finish_moments, law_, radius(), nearest, gradient, block_.count, moments);
    if (io.grad_x) find_query_gradient(io, nearest);
    if (io.grad_y) find_reference_gradient(io);
  }

  void find_query_gradient(const Backward& io, const double* nearest) {
    const Index at = block_.first * problem_.features;
    sum<false>(1);
    run("merge_gradient", {block_.count, divide_up(plan_.features, kMergeFeatures)}, kMergeThreads,
        sizeof(MergeMemory), merge_gradient<R>, law_, radius(), nearest, x(), block_rows(io.mean),
        y(), static_cast<float*>(io.grad_x) + at, arrays_.parts, arrays_.weights, plan_.stride,
        arrays_.sums, arrays_.moments, plan_.features, first_chunk(), last_chunk());
  }

  void find_reference_gradient(const Backward& io) const {
    const Grid grid = {divide_up(plan_.features, kSumFeatures), divide_up(chunk_.count, kSumRows)};
    run("reference_gradient", grid, kSumThreads, sizeof(GradientMemory), reference_gradient<R>,
        block_rows(io.grad_mean), x(), y(), plan_.features, arrays_.coefficients, plan_.stride,
        block_.first == 0, static_cast<float*>(io.grad_y) + chunk_.first * problem_.features);
  }

  const Problem& problem_;
  const Stream& stream_;
  const Plan& plan_;
  const WeightLaw law_;
  Workspace arrays_;
  Range block_ = {}, chunk_ = {};
};

// Calls `call` with a value of the type of the references.
template <class Call>
void with_type(const Problem& problem, const Call& call) {
  switch (problem.reference_type) {
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

// Calls call(launches) with the launches of a pass.
template <class Call>
void launch(const Problem& problem, const CudaStream& caller_stream, const CudaWorkspace& memory,
            bool backward, const Kept& kept, const Call& call) {
  const Stream stream(caller_stream);
  const Plan chosen_plan = plan(problem, device_of(stream), backward, kept.bytes > 0);
  Arena arena(memory.at, memory.bytes);
  const Workspace workspace(arena, kept, problem, chosen_plan);
  with_type(problem, [&](auto value) {
    Launches<decltype(value)> launches(problem, stream, chosen_plan, workspace);
    call(launches);
  });
}

}  // namespace

void limit_cuda(const CudaLimits& to) { limits = to; }

std::string cuda_problem(int device) {
  try {
    Stream({device, 0}).check("merge", merge<4>);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

std::int64_t posterior_mean_kept_cuda(const Problem& problem) { return kept_bytes(problem); }

std::size_t posterior_mean_workspace_cuda(const Problem& problem, const CudaStream& caller_stream,
                                          bool backward, std::int64_t kept) {
  const Stream stream(caller_stream);
  Arena counted(nullptr, 0);
  Workspace(counted, {nullptr, kept}, problem,
            plan(problem, device_of(stream), backward, kept > 0));
  return counted.used();
}

void posterior_mean_cuda(const Problem& problem, const Forward& out,
                         const CudaStream& caller_stream, const CudaWorkspace& workspace) {
  launch(problem, caller_stream, workspace, false, out.kept,
         [&](auto& launches) { launches.forward(out); });
}

void posterior_mean_backward_cuda(const Problem& problem, const Backward& io,
                                  const CudaStream& caller_stream, const CudaWorkspace& workspace) {
  launch(problem, caller_stream, workspace, true, io.kept,
         [&](auto& launches) { launches.backward(io); });
}

}  // namespace pfgm
