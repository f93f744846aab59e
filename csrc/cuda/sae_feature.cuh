// SPDX-License-Identifier: Apache-2.0
// What blocks that own features share: where their rows live, both gradients of a feature. The sum
// of squares of the gradient, for sae_gradient_square, and the folds of sums over features.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/adam.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sae_gradient.cuh"
#include "cuda/shared.cuh"

namespace sidechain::cuda {

// At most this many blocks, each with its share of b_pre_grad: the shares are small beside the
// weights, and at four blocks on each of 132 multiprocessors the blocks are still 3.9 rounds of
// them. A number of its own, not the GPU's: sums over features are sums over blocks.
constexpr int64_t kFeatureBlocks = 2048;
// The row and the share of b_pre_grad of a block up to this size live in shared memory, others in
// the workspace.
constexpr int64_t kFeatureShared = 96 * 1024;

// Where the rows of a block live and what the sums over features are gathered in.
struct FeatureLayout {
  Csc csc;
  const float* partial;  // of whole tiles of lists
  float* rows;           // [blocks, row_stride] in the workspace, nullptr = shared memory
  int64_t row_stride;
  float* b_pre_parts;    // [blocks, padded(d_in)], nullptr = not wanted
  double* square_parts;  // [blocks], of sae_gradient_square
  const AdamStep* step;
};

// Of this block: a row as long as the wider of both, which holds a strip of the encoder's gradient
// while its warp works on it, then the decoder's row; its share of b_pre_grad; and what each warp
// reads from. Lies in shared memory: its pointers would hold registers through the gathers.
struct FeatureRows {
  float *row, *b_pre;
  RowBases bases[kMaxStripWarps];
};

// By one thread.
__device__ inline void set_rows(const SaeGradientParams& p, const FeatureLayout& layout,
                                FeatureRows& rows) {
  float* const parts = layout.b_pre_parts;
  if (layout.rows == nullptr) {
    rows.row = dynamic_shared<float>();
    rows.b_pre = parts != nullptr ? rows.row + layout.row_stride : nullptr;
  } else {
    rows.row = layout.rows + blockIdx.x * layout.row_stride;
    rows.b_pre = parts != nullptr ? parts + blockIdx.x * padded(p.d_in) : nullptr;
  }
}

__device__ inline FeatureList feature_list(const FeatureLayout& layout, int64_t f) {
  const Csc& csc = layout.csc;
  return {f, csc.entries, csc.start[f], csc.start[f + 1], layout.partial};
}

// Whether the first group has an entry: its entries stand first in a list.
__device__ inline bool fired(const FeatureList& list) {
  return list.begin < list.end && list.entries[list.begin].group == 0;
}

template <int kPack>
__device__ inline float square_of(const float (&pack)[kPack]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPack; ++i) sum += pack[i] * pack[i];
  return sum;
}

// The encoder's gradient of a strip: leaves it in the row. x may come in longer packs than float32
// rows, so the lanes of the warp exchange channels: a barrier of the warp before reading and after.
template <class X, bool kWide>
__device__ inline void encoder_gradient(const SaeGradientParams& p, const FeatureList& list,
                                        int64_t c, int left, FeatureRows& rows) {
  input_sums<X, kWide>(p, list, c, left, rows.bases[threadIdx.x / 32], rows.row + c);
  __syncwarp();
}

// Leaves the decoder's gradient in the row, before projection; returns how much of w_dec it loses
// by it, the same in every thread. `scratch` as in block_sum, for two sums.
template <bool kWide>
__device__ inline float decoder_gradient(const SaeGradientParams& p, const float* w_dec,
                                         const FeatureList& list, FeatureRows& rows,
                                         float* scratch) {
  constexpr int kPack = kPackOf<float, kWide>;
  float sums[2] = {};  // <g_dec, w_dec>, |w_dec|^2
  for_each_strip(p.d_out, [&](int64_t c, int left) {
    error_sums<kWide>(p, list, c, left, rows.bases[threadIdx.x / 32], rows.row + c);
    if (!p.project) return;
    for_each_pack<kPack>(c, left, [&](int64_t at) {
      float grad[kPack], w[kPack];
      load(rows.row + at, grad);
      load(w_dec + list.f * p.d_out + at, w);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        sums[0] += grad[i] * w[i];
        sums[1] += w[i] * w[i];
      }
    });
  });
  if (!p.project) return 0.0f;
  block_sum(sums, scratch);
  return sums[1] > 0.0f ? sums[0] / sums[1] : 0.0f;
}

template <class X, bool kWide>
__global__ void __launch_bounds__(kFeatureThreads, kGatherBlocks<kWide>)
    sae_square_kernel(const __grid_constant__ SaeGradientParams p, const float* w_dec,
                      const __grid_constant__ FeatureLayout layout) {
  __shared__ float scratch[2 * kMaxStripWarps];
  __shared__ double squares[kMaxStripWarps];  // of each warp: registers are left to the gathers
  __shared__ FeatureRows rows;
  constexpr int kPack = kPackOf<float, kWide>;
  if (threadIdx.x == 0) set_rows(p, layout, rows);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = 0.0;
  __syncthreads();
  for (int64_t f = blockIdx.x; f < p.features; f += gridDim.x) {
    const FeatureList list = feature_list(layout, f);
    if (list.begin == list.end) continue;
    const float bias = p.bias ? dvalue_sum(p, list) : 0.0f;
    float part = 0.0f, dec_part = 0.0f;
    for_each_strip(p.d_in, [&](int64_t c, int left) {
      encoder_gradient<X, kWide>(p, list, c, left, rows);
      for_each_pack<kPack>(c, left, [&](int64_t at) {
        float grad[kPack];
        load(rows.row + at, grad);
        part += square_of(grad);
      });
      __syncwarp();  // the row has been read
    });
    const float along = decoder_gradient<kWide>(p, w_dec, list, rows, scratch);
    for_each_own_pack<kPack>(p.d_out, [&](int64_t at) {
      float grad[kPack], w[kPack];
      load(rows.row + at, grad);
      load(w_dec + f * p.d_out + at, w);
#pragma unroll
      for (int i = 0; i < kPack; ++i) grad[i] -= along * w[i];
      dec_part += square_of(grad);
    });
    part += dec_part;
    if (threadIdx.x == 0 && p.bias) part += bias * bias;
    part = warp_sum(part);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] += part;
    __syncthreads();  // the sums in scratch have been read
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  double sum = 0.0;
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) sum += squares[w];
  layout.square_parts[blockIdx.x] = sum;
}

constexpr int kFoldThreads = 1024, kFoldWarps = kFoldThreads / 32;

// Adds the blocks' sums of squares.
__global__ void __launch_bounds__(kFoldThreads, 1)
    sae_fold_square_kernel(const double* parts, int64_t blocks, float* out) {
  __shared__ double scratch[kFoldWarps];
  double sum[1] = {};
  for (int64_t b = threadIdx.x; b < blocks; b += kFoldThreads) sum[0] += parts[b];
  block_sum(sum, scratch);
  if (threadIdx.x == 0) *out = static_cast<float>(sum[0]);
}

// Adds the blocks' shares of b_pre_grad: a block for every 32 channels, whose warps take the shares
// in turn and are added in order.
__global__ void __launch_bounds__(kFoldThreads, 1)
    sae_fold_kernel(const float* parts, int64_t blocks, int64_t d_in, float* b_pre_grad) {
  __shared__ float sums[kFoldWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (c < d_in) {
#pragma unroll 8
    for (int64_t b = warp; b < blocks; b += kFoldWarps) {
      sum += parts[b * padded(d_in) + c];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= d_in) return;
  for (int w = 1; w < kFoldWarps; ++w) sum += sums[w][lane];
  b_pre_grad[c] = sum;
}

}  // namespace sidechain::cuda
