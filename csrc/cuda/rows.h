// Rows of float32 tensors, for kernels that combine tensors elementwise, often after a sum over the
// row.
//
// Short rows share a warp; a longer row has a block. A lane holds up to kHeldValues values of every
// tensor, so a row is read once although its sum is needed first. Rows with more values than a
// block holds are read twice, in tiles. If no sum is needed, rows are split into panels instead,
// one per block. Sums have a fixed order. Here a lane is a thread of a row, and a tile what the
// lanes of a row hold at once.
#pragma once
#include <cstdint>

#include "cuda/launch.h"

namespace pfgm {

constexpr int kHeldValues = 8;      // values of one tensor in a thread's registers
constexpr int kLongLanes = 512;     // for a row that is read twice
constexpr int kPanelLanes = 128;    // for a panel
constexpr int kShortThreads = 128;  // in a block of short rows
constexpr std::int64_t kMostGridPanels = 65535;
constexpr int kSumBytes = 32 * sizeof(double) + 16;  // of shared memory for row_result

// Largest number of threads for a row held as a whole, limited by registers. `width` is the number
// of values per access.
constexpr int most_lanes(int width) { return width == 4 ? 1024 : 768; }

// The largest block of a kernel whose rows are one tile (`whole`) or several.
constexpr int most_threads(int width, bool whole) { return whole ? most_lanes(width) : kLongLanes; }

struct RowCut {
  Grid grid;    // rows along x, panels along y
  int threads;  // in a block
  int lanes;    // threads for a row: a power of two up to 32, or a block
  bool whole;   // whether a row, or a panel of it, is one tile
};

// `width` is the number of values per access. `summed` says whether the lanes of a row share a sum.
inline RowCut cut_rows(std::int64_t rows, std::int64_t features, int width, bool summed) {
  const std::int64_t wanted = (features + kHeldValues - 1) / kHeldValues;
  if (wanted <= 32) {
    int lanes = 1;
    while (lanes < wanted) lanes *= 2;
    const int together = kShortThreads / lanes;
    return {{(rows + together - 1) / together}, kShortThreads, lanes, true};
  }
  const std::int64_t panels = (wanted + kPanelLanes - 1) / kPanelLanes;
  if (!summed && panels <= kMostGridPanels) return {{rows, panels}, kPanelLanes, kPanelLanes, true};
  if (wanted > most_lanes(width)) return {{rows}, kLongLanes, kLongLanes, false};
  const int lanes = static_cast<int>((wanted + 31) / 32 * 32);
  return {{rows}, lanes, lanes, true};
}

// Whether all rows of a tensor start on a 16-byte boundary.
inline bool aligned_rows(const void* data, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % 4 == 0;
}

struct RowLane {
  std::int64_t row;
  int lane, lanes;
  bool inside;  // whether the row exists; otherwise `row` is the last one
};

__device__ inline RowLane row_lane(std::int64_t rows, int lanes) {
  const unsigned thread = threadIdx.x, width = static_cast<unsigned>(lanes);
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / width) + thread / width;
  const bool inside = row < rows;
  return {inside ? row : rows - 1, static_cast<int>(thread % width), lanes, inside};
}

// The values [start, start + count) of a row, at most as many as its lanes can hold.
struct RowTile {
  std::int64_t start;
  int count, lane, lanes;
};

__device__ inline RowTile row_tile(const RowLane& at, std::int64_t start, std::int64_t features) {
  const std::int64_t left = at.inside ? features - start : 0, most = kHeldValues * at.lanes;
  return {start, static_cast<int>(left < most ? left : most), at.lane, at.lanes};
}

// Calls body(held, access) for each access of a lane: `held` is the index of its first value in the
// lane's array, `access` the number of the access within the tile. An access has WIDTH values;
// WIDTH divides the tile's count.
template <int WIDTH, class Body>
__device__ inline void each_access(const RowTile& tile, const Body& body) {
  for (int held = 0; held < kHeldValues; held += WIDTH) {
    const int access = tile.lane + held / WIDTH * tile.lanes;
    if (access * WIDTH < tile.count) body(held, access);
  }
}

template <int WIDTH>
__device__ inline void load_tile(float (&values)[kHeldValues], const float* row,
                                 const RowTile& tile) {
  const float* const begin = row + tile.start;
  each_access<WIDTH>(tile, [&](int held, int access) {
    if constexpr (WIDTH == 4) {
      const float4 four = reinterpret_cast<const float4*>(begin)[access];
      values[held] = four.x;
      values[held + 1] = four.y;
      values[held + 2] = four.z;
      values[held + 3] = four.w;
    } else {
      values[held] = begin[access];
    }
  });
}

template <int WIDTH>
__device__ inline void store_tile(float* row, const RowTile& tile,
                                  const float (&values)[kHeldValues]) {
  float* const begin = row + tile.start;
  each_access<WIDTH>(tile, [&](int held, int access) {
    if constexpr (WIDTH == 4) {
      float4 four;
      four.x = values[held];
      four.y = values[held + 1];
      four.z = values[held + 2];
      four.w = values[held + 3];
      reinterpret_cast<float4*>(begin)[access] = four;
    } else {
      begin[access] = values[held];
    }
  });
}

__device__ inline double warp_sum(double part, int lanes) {
  for (int other = 1; other < lanes; other *= 2) part += __shfl_xor_sync(~0u, part, other);
  return part;
}

// Calls finish(sum over the lanes of a row) and returns its result to all of them. All threads call
// this, once. For a row with a block only the first warp calls finish, because there are few
// float64 units. With lanes = 1 every thread finishes its own part.
template <class Result, class Finish>
__device__ inline Result row_result(double part, int lanes, const Finish& finish) {
  static_assert(sizeof(Result) <= 16, "kSumBytes has place for 16 bytes");
  const bool block = lanes > 32, first = threadIdx.x < 32;
  double* const parts = reinterpret_cast<double*>(shared_memory());
  Result* const shared = reinterpret_cast<Result*>(parts + 32);
  part = warp_sum(part, block ? 32 : lanes);
  if (block) {
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
    __syncthreads();
    if (first) part = warp_sum(threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0, 32);
  }
  Result result = {};
  if (!block || first) result = finish(part);
  if (block) {
    if (threadIdx.x == 0) *shared = result;
    __syncthreads();
    result = *shared;
  }
  return result;
}

}  // namespace pfgm
