// SPDX-License-Identifier: Apache-2.0
// sae_update_ on CUDA. Contract: csrc/include/sidechain/sae_update.h; every pointer lies on the
// device.
//
// A block owns a feature at a time: it sums the gradients of its rows over the feature's list,
// projects, takes Adam's step and writes weights, moments and copies once; no gradient tensor
// exists. A warp owns strips of 256 channels of both rows, so that only the numbers of a row
// (projection, norm) need the block. Per parameter 24 bytes move with float32 moments, beside the
// gathers of x and the error (nnz (d_in + d_out) elements, most from the second-level cache).
// Blocks take the features in turn by a number of blocks that follows from the shapes alone, so
// that sums over features (b_pre_grad, grad_square) depend neither on scheduling nor on the GPU.
//
// sae_gradient_square, for clipping by the norm of the same step, gathers once more. Keeping the
// gradients for the update instead would move 8 bytes a parameter (write, read) where gathering
// moves nnz (d_in x + 4 d_out) bytes, less at the usual lengths of lists; but it would take
// F (d_in + d_out) 4 bytes, 2.1 GB at F = 65,536 and d = 4,096, a third of weights and moments
// together and more than all the rest of a step, and the norm may wait for other processes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/adam.cuh"
#include "cuda/launch.cuh"
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

// Threads the wide update kernel is compiled for, more than it has: 96 registers a thread, which is
// four blocks of the five warps at d = 1,280. At 80 it would spill.
constexpr int kUpdateBound = kFeatureThreads * 5 / 4;

// Where the rows of a block live and what the sums over features are gathered in.
struct FeatureLayout {
  Csc csc;
  const float* partial;  // of whole tiles of lists
  float* rows;           // [blocks, row_stride] in the workspace, nullptr = shared memory
  int64_t row_stride;
  float* b_pre_parts;    // [blocks, padded(d_in)], nullptr = not wanted
  double* square_parts;  // [blocks], nullptr = not wanted
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

// Entries of the first group stand first in a list.
__device__ inline int32_t fired_entries(const FeatureList& list) {
  int32_t low = list.begin, high = list.end;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (list.entries[middle].group == 0) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - list.begin;
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

// A matrix of the state with what moves it.
struct AdamMatrix {
  float* weight;
  void *mean, *square, *copy;
  Dtype moments, copy_dtype;
  int64_t width;
};

__device__ inline uint32_t row_noise(const AdamStep& a, int64_t key) {
  return mix_bits(a.noise ^ static_cast<uint32_t>(key));
}

// Adam's step of the elements at c of row f; returns the new weights in `weight`.
template <int kPack>
__device__ inline void adam_pack(const AdamMatrix& m, const AdamStep& a, const AdamWake& wake,
                                 int64_t f, int64_t c, uint32_t noise, const float (&grad)[kPack],
                                 float (&weight)[kPack]) {
  const int64_t at = f * m.width + c;
  float mean[kPack], square[kPack];
  load_moments(m.mean, m.moments, at, mean);
  load_moments(m.square, m.moments, at, square);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    weight[i] = adam_element(a, wake, weight[i], a.clip * grad[i], &mean[i], &square[i]);
  }
  store_moments(m.mean, m.moments, at, mean, noise + static_cast<uint32_t>(c), 0);
  store_moments(m.square, m.moments, at, square, noise + static_cast<uint32_t>(c), 1);
}

template <int kPack>
__device__ inline void write_weight(const AdamMatrix& m, int64_t f, int64_t c,
                                    const float (&weight)[kPack]) {
  const int64_t at = f * m.width + c;
  store(m.weight + at, weight);
  if (m.copy != nullptr) store_as(m.copy, m.copy_dtype, at, true, weight);
}

// Numbers of the feature a warp works on, in shared memory: they would hold registers through the
// gathers.
struct FeatureNumbers {
  AdamWake wake;
  float bias;  // its gradient
  uint32_t noise;
  int64_t f;
};

// Returns this thread's share of the sum of squares of the gradient.
template <class X, bool kWide>
__device__ inline float update_encoder(const SaeUpdateParams& p, const AdamStep& a,
                                       const FeatureNumbers& numbers, const FeatureList& list,
                                       FeatureRows& rows) {
  constexpr int kPack = kPackOf<float, kWide>;
  const SaeState& s = p.state;
  const AdamMatrix m = {s.w_enc,   s.enc_mean,       s.enc_square,   p.enc_copy,
                        s.moments, p.enc_copy_dtype, p.gradient.d_in};
  float sum = 0.0f;
  for_each_strip(m.width, [&](int64_t c, int left) {
    encoder_gradient<X, kWide>(p.gradient, list, c, left, rows);
    for_each_pack<kPack>(c, left, [&](int64_t at) {
      float grad[kPack], weight[kPack];
      load(m.weight + numbers.f * m.width + at, weight);
      load(rows.row + at, grad);
      sum += square_of(grad);
      if (rows.b_pre != nullptr) {
        float share[kPack];
        load(rows.b_pre + at, share);
#pragma unroll
        for (int i = 0; i < kPack; ++i) share[i] -= numbers.bias * weight[i];
        store(rows.b_pre + at, share);
      }
      adam_pack(m, a, numbers.wake, numbers.f, at, numbers.noise, grad, weight);
      write_weight(m, numbers.f, at, weight);
    });
    __syncwarp();  // the row has been read
  });
  return sum;
}

// The new row waits in rows.row until its norm is known. `scratch` as in block_sum. Returns as
// update_encoder.
template <bool kWide>
__device__ inline float update_decoder(const SaeUpdateParams& p, const AdamStep& a,
                                       const AdamWake& wake, int64_t f, FeatureRows& rows,
                                       float along, float* scratch) {
  constexpr int kPack = kPackOf<float, kWide>;
  const SaeState& s = p.state;
  const AdamMatrix m = {s.w_dec,   s.dec_mean,       s.dec_square,    p.dec_copy,
                        s.moments, p.dec_copy_dtype, p.gradient.d_out};
  const uint32_t noise = row_noise(a, 2 * (f + p.gradient.first_feature) + 1);
  float norm[1] = {}, sum = 0.0f;
  for_each_own_pack<kPack>(m.width, [&](int64_t at) {
    float weight[kPack], grad[kPack];
    load(m.weight + f * m.width + at, weight);
    load(rows.row + at, grad);
#pragma unroll
    for (int i = 0; i < kPack; ++i) grad[i] -= along * weight[i];
    sum += square_of(grad);
    adam_pack(m, a, wake, f, at, noise, grad, weight);
    norm[0] += square_of(weight);
    if (p.unit_norm) {
      store(rows.row + at, weight);
    } else {
      write_weight(m, f, at, weight);
    }
  });
  if (!p.unit_norm) return sum;
  block_sum(norm, scratch);
  const float length = norm[0] != 0.0f ? sqrtf(norm[0]) : 1.0f;
  for_each_own_pack<kPack>(m.width, [&](int64_t at) {
    float weight[kPack];
    load(rows.row + at, weight);
#pragma unroll
    for (int i = 0; i < kPack; ++i) weight[i] /= length;
    write_weight(m, f, at, weight);
  });
  return sum;
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

// Adds the squares of a feature to the sum of this warp, which lies in shared memory to leave the
// registers to the gathers.
__device__ inline void add_square(const FeatureLayout& layout, float share, double* sums) {
  if (layout.square_parts == nullptr) return;
  share = warp_sum(share);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] += share;
}

// This block's share of the sum over features.
__device__ inline void finish_square(const FeatureLayout& layout, const double* sums) {
  if (layout.square_parts == nullptr) return;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double sum = 0.0;
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) sum += sums[w];
  layout.square_parts[blockIdx.x] = sum;
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
  __shared__ double squares[kMaxStripWarps];
  __shared__ FeatureRows rows;
  __shared__ FeatureNumbers numbers[kMaxStripWarps];
  __shared__ AdamStep a;
  constexpr int kPack = kPackOf<float, kWide>;
  const SaeGradientParams& g = p.gradient;
  if (threadIdx.x == 0) {
    a = *layout.step;
    set_rows(g, layout, rows);
  }
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = 0.0;
  __syncthreads();
  FeatureNumbers& mine = numbers[threadIdx.x / 32];
  if (threadIdx.x % 32 == 0) {
    const AdamWake awake = adam_wake(a, 1);
    mine.wake = awake;
  }
  begin_b_pre<kPack>(rows, g.d_in);
  for (int64_t f = blockIdx.x; f < g.features; f += gridDim.x) {
    const FeatureList list = feature_list(layout, f);
    if (p.row_step != nullptr && list.begin == list.end) continue;
    const float bias = dvalue_sum(g, list);
    if (threadIdx.x % 32 == 0) {
      mine.bias = bias;
      mine.noise = row_noise(a, 2 * (f + g.first_feature));
      mine.f = f;
      if (p.row_step != nullptr) {
        const AdamWake wake = adam_wake(a, max(a.step - p.row_step[f], int64_t{1}));
        mine.wake = wake;
      }
    }
    __syncwarp();
    float part = update_encoder<X, kWide>(p, a, mine, list, rows);
    const float along = decoder_gradient<kWide>(g, p.state.w_dec, list, rows, scratch[0]);
    part += update_decoder<kWide>(p, a, mine.wake, f, rows, along, scratch[1]);
    if (threadIdx.x == 0 && g.bias) part += mine.bias * mine.bias;
    add_square(layout, part, squares);
    __syncthreads();  // all threads have read row_step, and the sums in scratch
    if (threadIdx.x == 0) {
      update_numbers(p, a, mine.wake, f, mine.bias);
      const int32_t fired = fired_entries(list);
      if (p.last_fired != nullptr && fired > 0) p.last_fired[f] = a.step;
      if (p.fire_count != nullptr) p.fire_count[f] += fired;
    }
  }
  finish_b_pre<kPack>(rows, layout, g.d_in);
  finish_square(layout, squares);
}

template <class X, bool kWide>
__global__ void __launch_bounds__(kFeatureThreads, kGatherBlocks<kWide>)
    sae_square_kernel(const __grid_constant__ SaeGradientParams p, const float* w_dec,
                      const __grid_constant__ FeatureLayout layout) {
  __shared__ float scratch[2 * kMaxStripWarps];
  __shared__ double squares[kMaxStripWarps];
  __shared__ FeatureRows rows;
  constexpr int kPack = kPackOf<float, kWide>;
  if (threadIdx.x == 0) set_rows(p, layout, rows);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = 0.0;
  __syncthreads();
  for (int64_t f = blockIdx.x; f < p.features; f += gridDim.x) {
    const FeatureList list = feature_list(layout, f);
    if (list.begin == list.end) continue;
    // Added up in the order of sae_update_kernel: both give the same bits.
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
    add_square(layout, part, squares);
    __syncthreads();  // the sums in scratch have been read
  }
  finish_square(layout, squares);
}

constexpr int kFoldThreads = 1024, kFoldWarps = kFoldThreads / 32;

// Adds the shares of the blocks: of b_pre_grad a block for every 32 channels, whose warps take the
// shares in turn and are added in order; the last block adds the squares.
__global__ void __launch_bounds__(kFoldThreads, 1)
    sae_fold_kernel(const __grid_constant__ FeatureLayout layout, int64_t blocks, int64_t d_in,
                    float* b_pre_grad, float* grad_square) {
  __shared__ float sums[kFoldWarps][32];
  __shared__ double square_scratch[kFoldWarps];
  if (blockIdx.x + 1 == gridDim.x) {
    if (grad_square == nullptr) return;
    double sum[1] = {};
    for (int64_t b = threadIdx.x; b < blocks; b += kFoldThreads) sum[0] += layout.square_parts[b];
    block_sum(sum, square_scratch);
    if (threadIdx.x == 0) *grad_square = static_cast<float>(sum[0]);
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (c < d_in) {
#pragma unroll 8
    for (int64_t b = warp; b < blocks; b += kFoldWarps) {
      sum += layout.b_pre_parts[b * padded(d_in) + c];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= d_in) return;
  for (int w = 1; w < kFoldWarps; ++w) sum += sums[w][lane];
  b_pre_grad[c] = sum;
}

}  // namespace sidechain::cuda
