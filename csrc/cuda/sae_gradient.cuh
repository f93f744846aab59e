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

constexpr int kFeatureThreads = 256;

// dvalue (x[row] - b_pre), for the channels of one pack.
template <class X, int kWidth>
struct InputRows {
  const X* x;
  int64_t row;
  float b_pre[kWidth];

  __device__ InputRows(const SaeGradientParams& p, int64_t c)
      : x(static_cast<const X*>(p.x)), row(p.x_row), b_pre{} {
    if (p.b_pre == nullptr) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) b_pre[i] = p.b_pre[c + i];
  }
  __device__ float scale(const CscEntry& e) const { return e.dvalue; }
  __device__ void load(const CscEntry& e, int64_t c, float (&out)[kWidth]) const {
    cuda::load(x + e.row * row + c, out);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] -= b_pre[i];
  }
};

// value error[level, row]; which level depends on the feature alone.
struct ErrorRows {
  const CodeGroup* groups;
  int32_t level;

  __device__ ErrorRows(const SaeGradientParams& p, int64_t f) : groups(p.groups), level(0) {
    while (level + 1 < p.prefix_count && f + p.first_feature >= p.prefixes[level]) ++level;
  }
  __device__ float scale(const CscEntry& e) const { return e.value; }
  template <int kWidth>
  __device__ void load(const CscEntry& e, int64_t c, float (&out)[kWidth]) const {
    const CodeGroup& g = groups[e.group];
    cuda::load(g.error + level * g.error_level + e.row * g.error_row + c, out);
  }
};

// Sums of whole tiles: [tiles, padded(d_in) + padded(d_out)].
__host__ __device__ inline int64_t partial_stride(const SaeGradientParams& p) {
  return padded(p.d_in) + padded(p.d_out);
}

template <class X, int kWidth>
__global__ void __launch_bounds__(kFeatureThreads, 2)
    sae_tiles_kernel(const __grid_constant__ SaeGradientParams p, Csc csc, float* partial) {
  const int64_t f = tile_owner(csc, p.features, blockIdx.x);
  if (f < 0) return;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * kListTile, end = begin + kListTile;
  float* const enc = partial + blockIdx.x * partial_stride(p);
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kWidth;
  for (int64_t c = first; c < p.d_in; c += stride) {
    float sum[kWidth] = {};
    add_entries(csc.entries, begin, end, InputRows<X, kWidth>(p, c), c, sum);
    store(enc + c, sum);
  }
  const ErrorRows error(p, f);
  float* const dec = enc + padded(p.d_in);
  for (int64_t c = first; c < p.d_out; c += stride) {
    float sum[kWidth] = {};
    add_entries(csc.entries, begin, end, error, c, sum);
    store(dec + c, sum);
  }
}

// What the block knows of the feature it owns.
struct FeatureSums {
  float bias;   // sum of dvalues
  float along;  // of the projection: the gradient of w_dec loses along w_dec
};

// Leaves the gradients in enc [d_in] and dec [d_out] (a thread touches only its own channels) and
// returns what every thread has to know. `scratch` as in block_sum, for three sums.
template <class X, int kWidth>
__device__ inline FeatureSums feature_gradient(const SaeGradientParams& p, const float* w_dec,
                                               const Csc& csc, const float* partial, int64_t f,
                                               float* enc, float* dec, float* scratch) {
  const int32_t begin = csc.start[f], end = csc.start[f + 1];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kWidth;
  for (int64_t c = first; c < p.d_in; c += stride) {
    float sum[kWidth] = {};
    add_list(csc, begin, end, InputRows<X, kWidth>(p, c), partial, partial_stride(p), c, c, sum);
    store(enc + c, sum);
  }
  float sums[3] = {};  // dvalues, <g_dec, w_dec>, |w_dec|^2
  const ErrorRows error(p, f);
  for (int64_t c = first; c < p.d_out; c += stride) {
    float sum[kWidth] = {}, w[kWidth];
    add_list(csc, begin, end, error, partial, partial_stride(p), padded(p.d_in) + c, c, sum);
    store(dec + c, sum);
    if (!p.project) continue;
    load(w_dec + f * p.d_out + c, w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sums[1] += sum[i] * w[i];
      sums[2] += w[i] * w[i];
    }
  }
  for (int32_t e = begin + static_cast<int32_t>(threadIdx.x); e < end; e += blockDim.x) {
    sums[0] += csc.entries[e].dvalue;
  }
  block_sum(sums, scratch);
  return {sums[0], sums[2] > 0.0f ? sums[1] / sums[2] : 0.0f};
}

}  // namespace sidechain::cuda
