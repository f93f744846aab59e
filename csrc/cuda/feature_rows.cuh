// SPDX-License-Identifier: Apache-2.0
// Sums of matrix rows over the list of a feature, shared by what owns features: gradients of the
// decoder and of whole autoencoders.
//
// Feature use is skewed: the hottest fires in half of all rows. Whole tiles of kListTile sorted
// entries that belong to one feature are therefore summed by a block of their own first, and the
// owner adds the tiles in order; where they lie depends on the data alone. At most one tile on
// either end of a list is left to the owner.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/csc.cuh"
#include "cuda/vec.cuh"

namespace sidechain::cuda {

constexpr int kListTile = 512;

// Whole tiles of a list: [first, end) where first < end.
struct ListTiles {
  int32_t first, end;
};
__device__ inline ListTiles list_tiles(int32_t begin, int32_t end) {
  return {(begin + kListTile - 1) / kListTile, end / kListTile};
}

// The list that holds the whole tile, -1 where none does.
__device__ inline int64_t tile_owner(const Csc& csc, int64_t lists, int64_t tile) {
  const int64_t begin = tile * kListTile, end = begin + kListTile;
  if (end > csc.start[lists]) return -1;
  const uint32_t first = csc.keys[begin];
  return first == csc.keys[end - 1] ? static_cast<int64_t>(first) : -1;
}

// acc += sum rows.scale(entry) * rows.load(entry, c) over entries [begin, end), in runs of kRun
// whose sums are added up: long lists lose less to rounding.
constexpr int32_t kRun = 32;

template <int kWidth, class Rows>
__device__ inline void add_entries(const CscEntry* entries, int32_t begin, int32_t end,
                                   const Rows& rows, int64_t c, float (&acc)[kWidth]) {
  for (int32_t run = begin; run < end; run += kRun) {
    float sum[kWidth] = {};
    const int32_t stop = min(run + kRun, end);
#pragma unroll 4
    for (int32_t e = run; e < stop; ++e) {
      const CscEntry entry = entries[e];
      float value[kWidth];
      rows.load(entry, c, value);
      const float scale = rows.scale(entry);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += scale * value[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) acc[i] += sum[i];
  }
}

// The same over the list of a feature, whole tiles read from partial + tile * stride + at.
template <int kWidth, class Rows>
__device__ inline void add_list(const Csc& csc, int32_t begin, int32_t end, const Rows& rows,
                                const float* partial, int64_t stride, int64_t at, int64_t c,
                                float (&acc)[kWidth]) {
  const ListTiles tiles = list_tiles(begin, end);
  if (tiles.first >= tiles.end) return add_entries(csc.entries, begin, end, rows, c, acc);
  add_entries(csc.entries, begin, tiles.first * kListTile, rows, c, acc);
  for (int32_t tile = tiles.first; tile < tiles.end; ++tile) {
    float sum[kWidth];
    load(partial + tile * stride + at, sum);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) acc[i] += sum[i];
  }
  add_entries(csc.entries, tiles.end * kListTile, end, rows, c, acc);
}

// Tiles of lists that can be whole.
inline int64_t list_tile_count(const CscSource& s) { return csc_capacity(s) / kListTile; }

// Rounds row widths up so that packs of rows one behind the other stay aligned.
__host__ __device__ inline int64_t padded(int64_t width) { return (width + 3) / 4 * 4; }

}  // namespace sidechain::cuda
