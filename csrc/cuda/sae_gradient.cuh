// SPDX-License-Identifier: Apache-2.0
// Gradients of one feature of a sparse autoencoder: sums over its list of rows of x and of the
// error. Contract: SaeGradientParams in csrc/include/sidechain/sae_update.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/feature_rows.cuh"
#include "cuda/vec.cuh"
#include "sidechain/sae_update.h"

namespace sidechain::cuda {

constexpr int kFeatureThreads = 32 * kMaxStripWarps;
// Blocks of the most threads that a multiprocessor holds at least: 80 registers a thread, which is
// five blocks of the five warps at d = 1,280; the narrow kernels would spill at that.
template <bool kWide>
constexpr int kGatherBlocks = kWide ? 3 : 2;

// Elements of a pack: 16 bytes where every row allows it, one otherwise.
template <class T, bool kWide>
constexpr int kPackOf = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;

// dvalue (x[row] - b_pre) for the strip at c.
template <class X, bool kWide>
struct InputRows : RowsOf<X, kPackOf<X, kWide>> {
  float b_pre[kLaneChannels];

  __device__ InputRows(const SaeGradientParams& p, int64_t c, int left) : b_pre{} {
    constexpr int kPack = kPackOf<X, kWide>;
    if (p.b_pre == nullptr) return;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int at = lane_channel<kPack>(i / kPack) + i % kPack;
      if (at < left) b_pre[i] = p.b_pre[c + at];
    }
  }
  static __device__ float scale(const CscEntry& e) { return e.dvalue; }
  static __device__ int group_of(const CscEntry&) { return 0; }
  __device__ float shift(int i) const { return b_pre[i]; }
};

// value error[level, row] of the entry's group.
template <bool kWide>
struct ErrorRows : RowsOf<float, kPackOf<float, kWide>> {
  static __device__ float scale(const CscEntry& e) { return e.value; }
  // What is read behind the list may name anything.
  static __device__ int group_of(const CscEntry& e) { return e.group & (kMaxCodeGroups - 1); }
  __device__ float shift(int) const { return 0.0f; }
};
static_assert((kMaxCodeGroups & (kMaxCodeGroups - 1)) == 0);

// A feature with its list and the sums of whole tiles, rows [padded(d_in) + padded(d_out) + 4]: of
// x, of the error, of the dvalues.
struct FeatureList {
  int64_t f;
  const CscEntry* entries;
  int32_t begin, end;
  const float* partial;  // nullptr = add entry by entry
};

__host__ __device__ inline int64_t partial_stride(const SaeGradientParams& p) {
  return padded(p.d_in) + padded(p.d_out) + 4;
}

// Leaves in slot the gradient of the encoder for the strip at c.
template <class X, bool kWide>
__device__ inline void input_sums(const SaeGradientParams& p, const FeatureList& list, int64_t c,
                                  int left, RowBases& bases, float* slot) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    const RowBase base = row_base(static_cast<const X*>(p.x) + c, p.x_row);
    bases.group[0] = base;
  }
  __syncwarp();
  const float* const tiles = list.partial != nullptr ? list.partial + c : nullptr;
  add_list(list.entries, list.begin, list.end, InputRows<X, kWide>(p, c, left), bases, left, tiles,
           partial_stride(p), slot);
}

// The same of the decoder, before projection; which level of the errors counts depends on the
// feature alone.
template <bool kWide>
__device__ inline void error_sums(const SaeGradientParams& p, const FeatureList& list, int64_t c,
                                  int left, RowBases& bases, float* slot) {
  int32_t level = 0;
  while (level + 1 < p.prefix_count && list.f + p.first_feature >= p.prefixes[level]) ++level;
  __syncwarp();
  const int32_t lane = threadIdx.x % 32;
  if (lane < kMaxCodeGroups) {
    const CodeGroup& g = p.groups[lane < p.group_count ? lane : 0];
    const RowBase base = row_base(g.error + level * g.error_level + c, g.error_row);
    bases.group[lane] = base;
  }
  __syncwarp();
  const float* const tiles = list.partial != nullptr ? list.partial + padded(p.d_in) + c : nullptr;
  add_list(list.entries, list.begin, list.end, ErrorRows<kWide>(), bases, left, tiles,
           partial_stride(p), slot);
}

// Sum of the dvalues of the list, the same in every lane of every warp.
__device__ inline float dvalue_sum(const SaeGradientParams& p, const FeatureList& list) {
  const int32_t lane = threadIdx.x % 32;
  const ListTiles tiles = list_tiles(list.begin, list.end);
  const bool tiled = list.partial != nullptr && tiles.first < tiles.end;
  const int32_t head = tiled ? tiles.first * kListTile : list.end;
  float sum = 0.0f;
  for (int32_t e = list.begin + lane; e < head; e += 32) sum += list.entries[e].dvalue;
  if (tiled) {
    const float* const sums = list.partial + partial_stride(p) - 4;
    for (int32_t t = tiles.first + lane; t < tiles.end; t += 32) {
      sum += sums[t * partial_stride(p)];
    }
    for (int32_t e = tiles.end * kListTile + lane; e < list.end; e += 32) {
      sum += list.entries[e].dvalue;
    }
  }
  return warp_sum(sum);
}

// Sums of whole tiles; the warps take the strips of x and those of the error in turn.
template <class X, bool kWide>
__global__ void __launch_bounds__(kFeatureThreads, kGatherBlocks<kWide>)
    sae_tiles_kernel(const __grid_constant__ SaeGradientParams p, Csc csc, float* partial) {
  __shared__ __align__(16) float slots[kMaxStripWarps][kStrip];
  __shared__ RowBases bases[kMaxStripWarps];
  const int warp = threadIdx.x / 32;
  float* const slot = slots[warp];
  const int64_t f = tile_owner(csc, p.features, blockIdx.x);
  if (f < 0) return;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * kListTile;
  const FeatureList list = {f, csc.entries, begin, begin + kListTile, nullptr};
  float* const sums = partial + blockIdx.x * partial_stride(p);
  const auto write = [&](float* to, int left) {
    __syncwarp();
    for (int i = threadIdx.x % 32; i < left; i += 32) to[i] = slot[i];
    __syncwarp();
  };
  for_each_strip(p.d_in, [&](int64_t c, int left) {
    input_sums<X, kWide>(p, list, c, left, bases[warp], slot);
    write(sums + c, left);
  });
  for_each_strip(p.d_out, [&](int64_t c, int left) {
    error_sums<kWide>(p, list, c, left, bases[warp], slot);
    write(sums + padded(p.d_in) + c, left);
  });
  const float dvalues = dvalue_sum(p, list);
  if (threadIdx.x == 0) sums[partial_stride(p) - 4] = dvalues;
}

}  // namespace sidechain::cuda
