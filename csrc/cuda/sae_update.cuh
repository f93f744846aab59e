// SPDX-License-Identifier: Apache-2.0
// sae_update_ on CUDA. Contract: csrc/include/sidechain/sae_update.h; every pointer lies on the
// device.
//
// A block owns a feature at a time: it sums the gradients of its rows over the feature's list,
// projects, takes Adam's step and writes weights and statistics once; no gradient tensor exists. A
// warp owns strips of 256 channels of both rows, so that only the numbers of a row (projection,
// norm) need the block. Per parameter 24 bytes move with a float32 state, beside the gathers of x
// and the error (nnz (d_in + d_out) elements, most from the second-level cache). Blocks take the
// features in turn by a number of blocks that follows from the shapes alone, so that sums over
// features (b_pre_grad, the sum of squares) depend neither on scheduling nor on the GPU.
//
// sae_gradient_square, for clipping by the norm of the same step, gathers once more: with bfloat16
// x nnz (2 d_in + 4 d_out) bytes, 2.0 GB from the second-level cache at N = 8,192, d = 1,280,
// F = 20,480 and k = 32. Keeping the gradients for the update would move 8 F (d_in + d_out) bytes,
// 0.4 GB of device memory, but hold half of that from one call to the other: 0.2 GB there, 2.1 GB
// at F = 65,536 and d = 4,096, as much as the weights. The norm takes in other processes and b_dec
// in between, so one launch cannot do both. Memory decides: clipping costs time, not room.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/adam.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sae_feature.cuh"

namespace sidechain::cuda {

// Threads the wide update kernel is compiled for, more than it has: 96 registers a thread, which is
// four blocks of the five warps at d = 1,280. At 80 it would spill.
constexpr int kUpdateBound = kFeatureThreads * 5 / 4;

// A weight with its running statistics.
struct AdamMatrix {
  float* weight;
  void *mean, *square;
  Dtype dtype;  // of the statistics
  int64_t width;
};

__device__ inline uint32_t row_noise(const AdamStep& a, int64_t key) {
  return mix_bits(a.noise ^ static_cast<uint32_t>(key));
}

// Adam's step of the elements at c of row f; returns the new weights in `weight`.
template <int kPack>
__device__ inline void adam_pack(const AdamMatrix& m, const AdamStep& a, int64_t f, int64_t c,
                                 uint32_t noise, const float (&grad)[kPack],
                                 float (&weight)[kPack]) {
  const int64_t at = f * m.width + c;
  float mean[kPack], square[kPack];
  load_statistics(m.mean, m.dtype, at, mean);
  load_statistics(m.square, m.dtype, at, square);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    weight[i] = adam_element(a, a.decay, weight[i], a.clip * grad[i], &mean[i], &square[i]);
  }
  store_statistics(m.mean, m.dtype, at, mean, noise + static_cast<uint32_t>(c), 0);
  store_statistics(m.square, m.dtype, at, square, noise + static_cast<uint32_t>(c), 1);
}

// Numbers of the feature a warp works on, in shared memory: they would hold registers through the
// gathers.
struct FeatureNumbers {
  float bias;  // its gradient
  uint32_t noise;
  int64_t f;
};

template <class X, bool kWide>
__device__ inline void update_encoder(const SaeUpdateParams& p, const AdamStep& a,
                                      const FeatureNumbers& numbers, const FeatureList& list,
                                      FeatureRows& rows) {
  constexpr int kPack = kPackOf<float, kWide>;
  const SaeState& s = p.state;
  const AdamMatrix m = {s.w_enc, s.enc_mean, s.enc_square, s.dtype, p.gradient.d_in};
  for_each_strip(m.width, [&](int64_t c, int left) {
    encoder_gradient<X, kWide>(p.gradient, list, c, left, rows);
    for_each_pack<kPack>(c, left, [&](int64_t at) {
      float grad[kPack], weight[kPack];
      load(m.weight + numbers.f * m.width + at, weight);
      load(rows.row + at, grad);
      if (rows.b_pre != nullptr) {
        float share[kPack];
        load(rows.b_pre + at, share);
#pragma unroll
        for (int i = 0; i < kPack; ++i) share[i] -= numbers.bias * weight[i];
        store(rows.b_pre + at, share);
      }
      adam_pack(m, a, numbers.f, at, numbers.noise, grad, weight);
      store(m.weight + numbers.f * m.width + at, weight);
    });
    __syncwarp();  // the row has been read
  });
}

// The new row waits in rows.row until its norm is known. `scratch` as in block_sum.
template <bool kWide>
__device__ inline void update_decoder(const SaeUpdateParams& p, const AdamStep& a, int64_t f,
                                      FeatureRows& rows, float along, float* scratch) {
  constexpr int kPack = kPackOf<float, kWide>;
  const SaeState& s = p.state;
  const AdamMatrix m = {s.w_dec, s.dec_mean, s.dec_square, s.dtype, p.gradient.d_out};
  const uint32_t noise = row_noise(a, 2 * (f + p.gradient.first_feature) + 1);
  float norm[1] = {};
  for_each_own_pack<kPack>(m.width, [&](int64_t at) {
    float weight[kPack], grad[kPack];
    load(m.weight + f * m.width + at, weight);
    load(rows.row + at, grad);
#pragma unroll
    for (int i = 0; i < kPack; ++i) grad[i] -= along * weight[i];
    adam_pack(m, a, f, at, noise, grad, weight);
    norm[0] += square_of(weight);
    if (p.unit_norm) {
      store(rows.row + at, weight);
    } else {
      store(m.weight + f * m.width + at, weight);
    }
  });
  if (!p.unit_norm) return;
  block_sum(norm, scratch);
  const float length = norm[0] != 0.0f ? sqrtf(norm[0]) : 1.0f;
  for_each_own_pack<kPack>(m.width, [&](int64_t at) {
    float weight[kPack];
    load(rows.row + at, weight);
#pragma unroll
    for (int i = 0; i < kPack; ++i) weight[i] /= length;
    store(m.weight + f * m.width + at, weight);
  });
}

// The numbers of a feature, by one thread.
__device__ inline void update_numbers(const SaeUpdateParams& p, const AdamStep& a,
                                      const FeatureList& list, float bias) {
  const SaeState& s = p.state;
  const int64_t f = list.f;
  if (s.b_enc != nullptr) {
    float mean = s.bias_mean[f], square = s.bias_square[f];
    s.b_enc[f] = adam_element(a, 1.0f, s.b_enc[f], a.clip * bias, &mean, &square);
    s.bias_mean[f] = mean;
    s.bias_square[f] = square;
  }
  if (p.last_fired != nullptr && fired(list)) p.last_fired[f] = a.step;
}

// Shares of b_pre_grad: a thread touches its own channels, as update_encoder does.
template <int kPack>
__device__ inline void begin_b_pre(FeatureRows& rows, int64_t d_in) {
  if (rows.b_pre == nullptr) return;
  for_each_own_pack<kPack>(d_in, [&](int64_t at) {
    const float zero[kPack] = {};
    store(rows.b_pre + at, zero);
  });
}
template <int kPack>
__device__ inline void finish_b_pre(FeatureRows& rows, const FeatureLayout& layout, int64_t d_in) {
  if (rows.b_pre == nullptr || layout.rows != nullptr) return;
  for_each_own_pack<kPack>(d_in, [&](int64_t at) {
    float share[kPack];
    load(rows.b_pre + at, share);
    store(layout.b_pre_parts + blockIdx.x * padded(d_in) + at, share);
  });
}

template <class X, bool kWide>
__global__ void __launch_bounds__(kWide ? kUpdateBound : kFeatureThreads, 2)
    sae_update_kernel(const __grid_constant__ SaeUpdateParams p,
                      const __grid_constant__ FeatureLayout layout) {
  __shared__ float scratch[2][2 * kMaxStripWarps];  // two, so that one barrier parts two sums
  __shared__ FeatureRows rows;
  __shared__ FeatureNumbers numbers[kMaxStripWarps];
  __shared__ AdamStep a;
  constexpr int kPack = kPackOf<float, kWide>;
  const SaeGradientParams& g = p.gradient;
  if (threadIdx.x == 0) {
    a = *layout.step;
    set_rows(g, layout, rows);
  }
  __syncthreads();
  FeatureNumbers& mine = numbers[threadIdx.x / 32];
  begin_b_pre<kPack>(rows, g.d_in);
  for (int64_t f = blockIdx.x; f < g.features; f += gridDim.x) {
    const FeatureList list = feature_list(layout, f);
    const float bias = dvalue_sum(g, list);
    if (threadIdx.x % 32 == 0) {
      mine.bias = bias;
      mine.noise = row_noise(a, 2 * (f + g.first_feature));
      mine.f = f;
    }
    __syncwarp();
    update_encoder<X, kWide>(p, a, mine, list, rows);
    const float along = decoder_gradient<kWide>(g, p.state.w_dec, list, rows, scratch[0]);
    update_decoder<kWide>(p, a, f, rows, along, scratch[1]);
    __syncthreads();  // the sums in scratch have been read
    if (threadIdx.x == 0) update_numbers(p, a, list, mine.bias);
  }
  finish_b_pre<kPack>(rows, layout, g.d_in);
}

}  // namespace sidechain::cuda
