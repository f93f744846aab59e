// SPDX-License-Identifier: Apache-2.0
// sae_update_ on CUDA. Contract: csrc/include/sidechain/sae_update.h; every pointer lies on the
// device.
//
// A block owns a feature at a time: it sums the gradients of its rows over the feature's list,
// projects, takes Adam's step and writes weights, moments and copies once; no gradient tensor
// exists. Per parameter 24 bytes move with float32 moments, beside the gathers of x and the error
// (nnz (d_in + d_out) elements, most from the second-level cache). Blocks take the features in turn
// by a fixed number of blocks, so that sums over features (b_pre_grad, grad_square) do not depend
// on scheduling.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/adam.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sae_gradient.cuh"
#include "cuda/shared.cuh"

namespace sidechain::cuda {

// Enough blocks to fill 132 multiprocessors about four times over, few enough that their shares of
// b_pre_grad are small beside the weights.
constexpr int64_t kFeatureBlocks = 1024;
// Gradients of a feature up to this size live in shared memory, others in the workspace.
constexpr int64_t kFeatureShared = 96 * 1024;
constexpr int kFeatureWarps = kFeatureThreads / 32;

// Where the rows of a block live and what the sums over features are gathered in.
struct FeatureLayout {
  Csc csc;
  const float* partial;  // whole tiles of lists
  float* rows;           // [blocks, row_stride] in the workspace, nullptr = shared memory
  int64_t row_stride;
  float* b_pre_parts;    // [blocks, padded(d_in)], nullptr = not wanted
  double* square_parts;  // [blocks], nullptr = not wanted
  const AdamStep* step;
};

// The rows of this block: gradients and its share of b_pre_grad.
struct FeatureRows {
  float *enc, *dec, *b_pre;
};

__device__ inline FeatureRows feature_rows(const SaeGradientParams& p,
                                           const FeatureLayout& layout) {
  float* const rows = layout.rows != nullptr ? layout.rows + blockIdx.x * layout.row_stride
                                             : dynamic_shared<float>();
  float* const b_pre =
      layout.b_pre_parts != nullptr ? layout.b_pre_parts + blockIdx.x * padded(p.d_in) : nullptr;
  return {rows, rows + padded(p.d_in), b_pre};
}

// Entries of the first group stand first in a list.
__device__ inline int32_t fired_entries(const Csc& csc, int64_t f) {
  int32_t low = csc.start[f], high = csc.start[f + 1];
  const int32_t begin = low;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (csc.entries[middle].group == 0) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - begin;
}

// Sum of squares of this thread's channels of the gradient.
template <int kWidth>
__device__ inline float gradient_square(const SaeGradientParams& p, const float* w_dec, int64_t f,
                                        const FeatureRows& rows, float along) {
  float square = 0.0f;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kWidth;
  for (int64_t c = first; c < p.d_in; c += stride) {
    float g[kWidth];
    load(rows.enc + c, g);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) square += g[i] * g[i];
  }
  for (int64_t c = first; c < p.d_out; c += stride) {
    float g[kWidth], w[kWidth];
    load(rows.dec + c, g);
    load(w_dec + f * p.d_out + c, w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      g[i] -= along * w[i];
      square += g[i] * g[i];
    }
  }
  return square;
}

// A matrix of the state with what moves it.
struct AdamMatrix {
  float* weight;
  void *mean, *square, *copy;
  Dtype moments, copy_dtype;
  int64_t width;
};

// Adam's step of the elements at c of row f; returns the new weights in `weight`.
template <int kWidth>
__device__ inline void adam_pack(const AdamMatrix& m, const AdamStep& a, const AdamWake& wake,
                                 int64_t f, int64_t c, uint32_t noise, const float (&grad)[kWidth],
                                 float (&weight)[kWidth]) {
  const int64_t at = f * m.width + c;
  float mean[kWidth], square[kWidth];
  load_moments(m.mean, m.moments, at, mean);
  load_moments(m.square, m.moments, at, square);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    weight[i] = adam_element(a, wake, weight[i], a.clip * grad[i], &mean[i], &square[i]);
  }
  store_moments(m.mean, m.moments, at, mean, noise + static_cast<uint32_t>(c), 0);
  store_moments(m.square, m.moments, at, square, noise + static_cast<uint32_t>(c), 1);
}

template <int kWidth>
__device__ inline void write_weight(const AdamMatrix& m, int64_t f, int64_t c,
                                    const float (&weight)[kWidth]) {
  const int64_t at = f * m.width + c;
  store(m.weight + at, weight);
  if (m.copy != nullptr) store_as(m.copy, m.copy_dtype, at, true, weight);
}

__device__ inline uint32_t row_noise(const AdamStep& a, int64_t key) {
  return mix_bits(a.noise ^ static_cast<uint32_t>(key));
}

template <int kWidth>
__device__ inline void update_encoder(const SaeUpdateParams& p, const AdamStep& a,
                                      const AdamWake& wake, int64_t f, const FeatureRows& rows,
                                      float bias) {
  const SaeState& s = p.state;
  const AdamMatrix m = {s.w_enc,   s.enc_mean,       s.enc_square,   p.enc_copy,
                        s.moments, p.enc_copy_dtype, p.gradient.d_in};
  const uint32_t noise = row_noise(a, 2 * (f + p.gradient.first_feature));
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kWidth; c < m.width;
       c += static_cast<int64_t>(blockDim.x) * kWidth) {
    float weight[kWidth], grad[kWidth];
    load(m.weight + f * m.width + c, weight);
    load(rows.enc + c, grad);
    if (rows.b_pre != nullptr) {
      float share[kWidth];
      load(rows.b_pre + c, share);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) share[i] -= bias * weight[i];
      store(rows.b_pre + c, share);
    }
    adam_pack(m, a, wake, f, c, noise, grad, weight);
    write_weight(m, f, c, weight);
  }
}

// The new row waits in rows.dec until its norm is known. `scratch` as in block_sum.
template <int kWidth>
__device__ inline void update_decoder(const SaeUpdateParams& p, const AdamStep& a,
                                      const AdamWake& wake, int64_t f, const FeatureRows& rows,
                                      float along, float* scratch) {
  const SaeState& s = p.state;
  const AdamMatrix m = {s.w_dec,   s.dec_mean,       s.dec_square,    p.dec_copy,
                        s.moments, p.dec_copy_dtype, p.gradient.d_out};
  const uint32_t noise = row_noise(a, 2 * (f + p.gradient.first_feature) + 1);
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kWidth;
  float norm[1] = {};
  for (int64_t c = first; c < m.width; c += stride) {
    float weight[kWidth], grad[kWidth];
    load(m.weight + f * m.width + c, weight);
    load(rows.dec + c, grad);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grad[i] -= along * weight[i];
    adam_pack(m, a, wake, f, c, noise, grad, weight);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) norm[0] += weight[i] * weight[i];
    if (p.unit_norm) {
      store(rows.dec + c, weight);
    } else {
      write_weight(m, f, c, weight);
    }
  }
  if (!p.unit_norm) return;
  block_sum(norm, scratch);
  const float length = norm[0] != 0.0f ? sqrtf(norm[0]) : 1.0f;
  for (int64_t c = first; c < m.width; c += stride) {
    float weight[kWidth];
    load(rows.dec + c, weight);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) weight[i] /= length;
    write_weight(m, f, c, weight);
  }
}

// The numbers of a feature, by one thread.
__device__ inline void update_numbers(const SaeUpdateParams& p, const AdamStep& a,
                                      const AdamWake& wake, int64_t f, float bias) {
  const SaeState& s = p.state;
  if (s.b_enc != nullptr) {
    const AdamWake whole = {wake.mean, wake.square, 1.0f};  // a bias does not decay
    float mean = s.bias_mean[f], square = s.bias_square[f];
    s.b_enc[f] = adam_element(a, whole, s.b_enc[f], a.clip * bias, &mean, &square);
    s.bias_mean[f] = mean;
    s.bias_square[f] = square;
  }
  if (p.row_step != nullptr) p.row_step[f] = a.step;
}

// This block's share of the sums over features.
__device__ inline void finish_square(double square, const FeatureLayout& layout, double* scratch) {
  double sum[1] = {square};
  block_sum(sum, scratch);
  if (threadIdx.x == 0) layout.square_parts[blockIdx.x] = sum[0];
}

template <class X, int kWidth>
__global__ void __launch_bounds__(kFeatureThreads, 2)
    sae_update_kernel(const __grid_constant__ SaeUpdateParams p,
                      const __grid_constant__ FeatureLayout layout) {
  __shared__ float scratch[2][3 * kFeatureWarps];  // two, so that one barrier parts two sums
  __shared__ double square_scratch[kFeatureWarps];
  const SaeGradientParams& g = p.gradient;
  const FeatureRows rows = feature_rows(g, layout);
  const AdamStep a = *layout.step;
  if (rows.b_pre != nullptr) {
    const float zero[kWidth] = {};
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * kWidth; c < g.d_in;
         c += static_cast<int64_t>(blockDim.x) * kWidth) {
      store(rows.b_pre + c, zero);
    }
  }
  double square = 0.0;
  for (int64_t f = blockIdx.x; f < g.features; f += gridDim.x) {
    const bool active = layout.csc.start[f] < layout.csc.start[f + 1];
    if (p.row_step != nullptr && !active) continue;
    const FeatureSums sums = feature_gradient<X, kWidth>(
        g, p.state.w_dec, layout.csc, layout.partial, f, rows.enc, rows.dec, scratch[0]);
    if (layout.square_parts != nullptr) {
      square += gradient_square<kWidth>(g, p.state.w_dec, f, rows, sums.along);
      if (threadIdx.x == 0 && g.bias) square += sums.bias * sums.bias;
    }
    int64_t waited = 1;
    if (p.row_step != nullptr) waited = max(a.step - p.row_step[f], int64_t{1});
    const AdamWake wake = adam_wake(a, waited);
    update_encoder<kWidth>(p, a, wake, f, rows, sums.bias);
    update_decoder<kWidth>(p, a, wake, f, rows, sums.along, scratch[1]);
    __syncthreads();  // all threads have read row_step, and the sums in scratch
    if (threadIdx.x == 0) {
      update_numbers(p, a, wake, f, sums.bias);
      const int32_t fired = fired_entries(layout.csc, f);
      if (p.last_fired != nullptr && fired > 0) p.last_fired[f] = a.step;
      if (p.fire_count != nullptr) p.fire_count[f] += fired;
    }
  }
  if (layout.square_parts != nullptr) finish_square(square, layout, square_scratch);
}

template <class X, int kWidth>
__global__ void __launch_bounds__(kFeatureThreads, 2)
    sae_square_kernel(const __grid_constant__ SaeGradientParams p, const float* w_dec,
                      const __grid_constant__ FeatureLayout layout) {
  __shared__ float scratch[3 * kFeatureWarps];
  __shared__ double square_scratch[kFeatureWarps];
  const FeatureRows rows = feature_rows(p, layout);
  double square = 0.0;
  for (int64_t f = blockIdx.x; f < p.features; f += gridDim.x) {
    if (layout.csc.start[f] == layout.csc.start[f + 1]) continue;
    const FeatureSums sums = feature_gradient<X, kWidth>(p, w_dec, layout.csc, layout.partial, f,
                                                         rows.enc, rows.dec, scratch);
    square += gradient_square<kWidth>(p, w_dec, f, rows, sums.along);
    if (threadIdx.x == 0 && p.bias) square += sums.bias * sums.bias;
    __syncthreads();  // the sums in scratch have been read
  }
  finish_square(square, layout, square_scratch);
}

// Adds the shares of the blocks in order.
__global__ void __launch_bounds__(kFeatureThreads, 2)
    sae_fold_kernel(const __grid_constant__ FeatureLayout layout, int64_t blocks, int64_t d_in,
                    float* b_pre_grad, float* grad_square) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFeatureThreads + threadIdx.x;
  if (b_pre_grad != nullptr && c < d_in) {
    float sum = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) sum += layout.b_pre_parts[b * padded(d_in) + c];
    b_pre_grad[c] = sum;
  }
  if (grad_square != nullptr && c == 0) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += layout.square_parts[b];
    *grad_square = static_cast<float>(sum);
  }
}

}  // namespace sidechain::cuda
