// SPDX-License-Identifier: Apache-2.0
// tap_ on CUDA. Contract: csrc/include/sidechain/tap.h; every pointer lies on the device.
//
// Blocks: one per (row, chunk of kTokensPerBlock tokens); threads own channels. A group of kGroup
// tokens is read once from memory, stays in the first-level cache between the passes and is written
// once: 2 sizeof(T) bytes per element move, which bounds the kernel. Sums of a chunk are kept per
// thread in shared memory, written to a workspace, and added by a second kernel in chunk order, so
// that the result does not depend on scheduling.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shared.cuh"
#include "cuda/vec.cuh"
#include "sidechain/tap.h"

namespace sidechain::cuda {

constexpr int kTapGroup = 4;
constexpr int kTokensPerBlock = 16;
constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / 32;
// Channels whose two sums fit in the shared memory that needs no opt-in; more use the workspace.
constexpr int64_t kSharedChannels = 5632;

__device__ inline bool tap_inside(int64_t slot, int64_t slots) { return slot >= 0 && slot < slots; }

__device__ inline bool tap_holds(const TokenMask& mask, int64_t row, int64_t token) {
  return mask.data == nullptr || mask.data[row * mask.row + token * mask.token] != 0;
}

constexpr int kScratch = kMaxWarps * 2 * kTapGroup;

// What the host finds out about the layout once per layout.
struct TapLayout {
  int64_t chunks;  // per row
  bool vectors_aligned, ring_aligned;
  float* workspace;  // [R, chunks, 2, C], nullptr = no sums wanted
};

// One row as one thread block sees it.
template <class T>
struct TapBlock {
  T* x;            // [T, C] of the row
  const float* v;  // [C], nullptr = not steered
  float a, b;
  int64_t row, capture_slot;
  bool to_ring, to_sums;
  float *sums, *squares;  // [C] each; a thread touches only its own channels: no barrier needed
  int64_t first, stride;  // channels of this thread: first, first + stride, ...
};

// What happens to each token of a group; the same in every thread of the block.
struct TapGroup {
  int64_t begin;
  bool capture[kTapGroup], steer[kTapGroup];
  bool any_capture, any_steer;
};

template <class T>
__device__ inline TapBlock<T> tap_block(const TapParams& p, int64_t row) {
  TapBlock<T> block = {};
  block.row = row;
  block.x = static_cast<T*>(p.x) + row * p.x_row;
  block.capture_slot = p.capture_slot != nullptr ? *p.capture_slot : 0;
  block.to_ring = p.ring.data != nullptr && tap_inside(block.capture_slot, p.ring.slots);
  block.to_sums = (p.sums.data != nullptr && tap_inside(block.capture_slot, p.sums.slots)) ||
                  (p.squares.data != nullptr && tap_inside(block.capture_slot, p.squares.slots));
  if (p.vectors == nullptr) return block;
  block.a = p.strength != nullptr ? p.strength[row * p.strength_stride] : 0.0f;
  block.b = p.removal != nullptr ? p.removal[row * p.removal_stride] : 0.0f;
  const int64_t which = p.index != nullptr ? p.index[row * p.index_stride] : 0;
  const int64_t slot = p.steer_slot != nullptr ? *p.steer_slot : 0;
  if ((block.a != 0.0f || block.b != 0.0f) && tap_inside(which, p.vector_count) &&
      tap_inside(slot, p.vector_slots)) {
    block.v = p.vectors + which * p.vector_stride + slot * p.vector_slot_stride;
  }
  return block;
}

template <class T>
__device__ inline TapGroup tap_group(const TapParams& p, const TapBlock<T>& block, int64_t begin,
                                     int64_t end) {
  TapGroup group = {};
  group.begin = begin;
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) {
    const int64_t t = begin + i;
    group.capture[i] =
        t < end && (block.to_sums || block.to_ring) && tap_holds(p.capture_mask, block.row, t);
    group.steer[i] = t < end && block.v != nullptr && tap_holds(p.steer_mask, block.row, t);
    group.any_capture = group.any_capture || group.capture[i];
    group.any_steer = group.any_steer || group.steer[i];
  }
  return group;
}

// Captures the group and, where `dots`, leaves this thread's share of <x, x> and <x, v> in `dot`:
// [xx of the group, xv of the group].
template <int kWidth, class T>
__device__ inline void tap_measure(const TapParams& p, const TapLayout& layout,
                                   const TapBlock<T>& block, const TapGroup& group, bool dots,
                                   float (&dot)[2 * kTapGroup]) {
  for (int64_t c = block.first; c < p.channels; c += block.stride) {
    float direction[kWidth] = {}, total[kWidth] = {}, total_square[kWidth] = {};
    if (dots) load(block.v + c, layout.vectors_aligned, direction);
#pragma unroll
    for (int i = 0; i < kTapGroup; ++i) {
      if (!group.capture[i] && !(dots && group.steer[i])) continue;
      const int64_t t = group.begin + i;
      float value[kWidth];
      load(block.x + t * p.x_token + c, value);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float square = value[k] * value[k];
        dot[i] += square;
        dot[kTapGroup + i] += value[k] * direction[k];
        total[k] += group.capture[i] ? value[k] : 0.0f;
        total_square[k] += group.capture[i] ? square : 0.0f;
      }
      if (group.capture[i] && block.to_ring && t % p.ring.every == 0) {
        const int64_t at = block.capture_slot * p.ring.slot + block.row * p.ring.row +
                           t / p.ring.every * p.ring.token + c;
        store_as(p.ring.data, p.ring.dtype, at, layout.ring_aligned, value);
      }
    }
    if (!block.to_sums || !group.any_capture) continue;
    float sum[kWidth], square[kWidth];
    load(block.sums + c, sum);
    load(block.squares + c, square);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      sum[k] += total[k];
      square[k] += total_square[k];
    }
    store(block.sums + c, sum);
    store(block.squares + c, square);
  }
}

// This thread's share of |x + along v|^2, from the elements: the expansion in <x, v> cancels for
// short y, and the tokens are in the cache anyway.
template <int kWidth, class T>
__device__ inline void tap_norms(const TapParams& p, const TapLayout& layout,
                                 const TapBlock<T>& block, const TapGroup& group,
                                 const float (&along)[kTapGroup], float (&yy)[kTapGroup]) {
  for (int64_t c = block.first; c < p.channels; c += block.stride) {
    float direction[kWidth];
    load(block.v + c, layout.vectors_aligned, direction);
#pragma unroll
    for (int i = 0; i < kTapGroup; ++i) {
      if (!group.steer[i]) continue;
      float value[kWidth];
      load(block.x + (group.begin + i) * p.x_token + c, value);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float y = value[k] + along[i] * direction[k];
        yy[i] += y * y;
      }
    }
  }
}

// x <- (x + along v) scale.
template <int kWidth, class T>
__device__ inline void tap_move(const TapParams& p, const TapLayout& layout,
                                const TapBlock<T>& block, const TapGroup& group,
                                const float (&along)[kTapGroup], const float (&scale)[kTapGroup]) {
  for (int64_t c = block.first; c < p.channels; c += block.stride) {
    float direction[kWidth];
    load(block.v + c, layout.vectors_aligned, direction);
#pragma unroll
    for (int i = 0; i < kTapGroup; ++i) {
      if (!group.steer[i]) continue;
      float value[kWidth];
      T* const at = block.x + (group.begin + i) * p.x_token + c;
      load(at, value);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) value[k] = (value[k] + along[i] * direction[k]) * scale[i];
      store(at, value);
    }
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, 1)
    tap_kernel(const TapParams p, const TapLayout layout) {
  // Two places in turn keep one sum's reads apart from the next one's writes.
  __shared__ float scratch[2 * kScratch];
  const int64_t chunk = blockIdx.x % layout.chunks;
  TapBlock<T> block = tap_block<T>(p, blockIdx.x / layout.chunks);
  if (block.v == nullptr && !block.to_ring && !block.to_sums) return;
  block.first = static_cast<int64_t>(threadIdx.x) * kWidth;
  block.stride = static_cast<int64_t>(blockDim.x) * kWidth;

  float* partial = nullptr;
  if (block.to_sums) {
    partial = layout.workspace + (block.row * layout.chunks + chunk) * 2 * p.channels;
    // [2][C] either way
    block.sums = p.channels <= kSharedChannels ? dynamic_shared<float>() : partial;
    block.squares = block.sums + p.channels;
    const float zero[kWidth] = {};
    for (int64_t c = block.first; c < p.channels; c += block.stride) {
      store(block.sums + c, zero);
      store(block.squares + c, zero);
    }
  }

  int turn = 0;
  const int64_t begin = chunk * kTokensPerBlock;
  const int64_t end = min(begin + kTokensPerBlock, p.tokens);
  for (int64_t t = begin; t < end; t += kTapGroup) {
    const TapGroup group = tap_group(p, block, t, end);
    const bool dots = group.any_steer && (p.renorm || block.b != 0.0f);
    float dot[2 * kTapGroup] = {};
    if (group.any_capture || dots) tap_measure<kWidth>(p, layout, block, group, dots, dot);
    if (!group.any_steer) continue;
    if (dots) {
      block_sum(dot, scratch + turn * kScratch);
      turn ^= 1;
    }
    float along[kTapGroup], scale[kTapGroup];
#pragma unroll
    for (int i = 0; i < kTapGroup; ++i) {
      // Written so that a NaN projection stays NaN.
      const float xv = dot[kTapGroup + i] < 0.0f ? 0.0f : dot[kTapGroup + i];
      along[i] = block.b != 0.0f ? block.a - block.b * xv : block.a;
      scale[i] = 1.0f;
    }
    if (p.renorm) {
      float yy[kTapGroup] = {};
      tap_norms<kWidth>(p, layout, block, group, along, yy);
      block_sum(yy, scratch + turn * kScratch);
      turn ^= 1;
#pragma unroll
      for (int i = 0; i < kTapGroup; ++i) {
        scale[i] = yy[i] == 0.0f ? 1.0f : sqrtf(dot[i]) / sqrtf(yy[i]);
      }
    }
    tap_move<kWidth>(p, layout, block, group, along, scale);
  }

  if (!block.to_sums || block.sums == partial) return;
  for (int64_t c = block.first; c < p.channels; c += block.stride) {
    float sum[kWidth], square[kWidth];
    load(block.sums + c, sum);
    load(block.squares + c, square);
    store(partial + c, sum);
    store(partial + p.channels + c, square);
  }
}

constexpr int kFoldThreads = 256;

// Adds the chunks of every row in order to the addressed slot; a thread owns one channel of one
// row, and the first block of a row counts its tokens.
__global__ void __launch_bounds__(kFoldThreads)
    tap_fold_kernel(const TapParams p, const TapLayout layout, int64_t blocks_per_row) {
  __shared__ int counted[kFoldThreads / 32];
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t block = blockIdx.x % blocks_per_row;
  const int64_t c = block * kFoldThreads + threadIdx.x;
  const int64_t slot = p.capture_slot != nullptr ? *p.capture_slot : 0;
  const bool to_sums = p.sums.data != nullptr && tap_inside(slot, p.sums.slots);
  const bool to_squares = p.squares.data != nullptr && tap_inside(slot, p.squares.slots);
  if ((to_sums || to_squares) && c < p.channels) {
    float sum = 0.0f, square = 0.0f;
    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
      const float* partial = layout.workspace + (row * layout.chunks + chunk) * 2 * p.channels;
      sum += partial[c];
      square += partial[p.channels + c];
    }
    if (to_sums) p.sums.data[slot * p.sums.slot + row * p.sums.row + c] += sum;
    if (to_squares) p.squares.data[slot * p.squares.slot + row * p.squares.row + c] += square;
  }

  const bool to_counts = p.counts.data != nullptr && tap_inside(slot, p.counts.slots);
  if (block != 0 || !to_counts) return;
  int n = 0;
  for (int64_t t = threadIdx.x; t < p.tokens; t += kFoldThreads) {
    n += tap_holds(p.capture_mask, row, t) ? 1 : 0;
  }
  for (int step = 16; step > 0; step /= 2) n += __shfl_xor_sync(0xffffffffu, n, step);
  if (threadIdx.x % 32 == 0) counted[threadIdx.x / 32] = n;
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (int warp = 0; warp < kFoldThreads / 32; ++warp) total += counted[warp];
    p.counts.data[slot * p.counts.slot + row * p.counts.row] += static_cast<float>(total);
  }
}

inline int64_t tap_chunks(const TapParams& p) {
  return (p.tokens + kTokensPerBlock - 1) / kTokensPerBlock;
}

// Floats of workspace that launch_tap needs; their contents do not matter.
inline int64_t tap_workspace_floats(const TapParams& p) {
  const bool sums = p.sums.data != nullptr || p.squares.data != nullptr;
  return sums ? p.rows * tap_chunks(p) * 2 * p.channels : 0;
}

template <class T, int kWidth>
cudaError_t launch_tap_typed(const TapParams& p, const TapLayout& layout, cudaStream_t stream) {
  const int64_t packs = (p.channels + kWidth - 1) / kWidth;
  const int64_t rounds = (packs + kMaxThreads - 1) / kMaxThreads;
  const int64_t threads = ((packs + rounds - 1) / rounds + 31) / 32 * 32;
  const bool shared = layout.workspace != nullptr && p.channels <= kSharedChannels;
  const size_t bytes = shared ? 2 * p.channels * sizeof(float) : 0;
  return launch(tap_kernel<T, kWidth>, p.rows * layout.chunks, threads, bytes, stream, p, layout);
}

template <class T>
cudaError_t launch_tap_aligned(const TapParams& p, const TapLayout& layout, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.channels % kWidth == 0 &&
                       p.x_row % kWidth == 0 && p.x_token % kWidth == 0;
  return aligned ? launch_tap_typed<T, kWidth>(p, layout, stream)
                 : launch_tap_typed<T, 1>(p, layout, stream);
}

inline cudaError_t launch_tap(const TapParams& p, float* workspace, cudaStream_t stream) {
  TapLayout layout = {};
  layout.chunks = tap_chunks(p);
  layout.workspace = workspace;
  layout.vectors_aligned = reinterpret_cast<uintptr_t>(p.vectors) % 16 == 0 &&
                           p.vector_stride % 4 == 0 && p.vector_slot_stride % 4 == 0;
  // 8 elements of any dtype are a multiple of 16 bytes.
  layout.ring_aligned = reinterpret_cast<uintptr_t>(p.ring.data) % 16 == 0 &&
                        p.ring.slot % 8 == 0 && p.ring.row % 8 == 0 && p.ring.token % 8 == 0;
  cudaError_t status = cudaSuccess;
  if (p.rows > 0 && p.tokens > 0 && p.channels > 0) {
    switch (p.dtype) {
      case Dtype::kFloat32:
        status = launch_tap_aligned<float>(p, layout, stream);
        break;
      case Dtype::kFloat16:
        status = launch_tap_aligned<__half>(p, layout, stream);
        break;
      case Dtype::kBFloat16:
        status = launch_tap_aligned<__nv_bfloat16>(p, layout, stream);
        break;
    }
  }
  if (status != cudaSuccess || p.rows == 0) return status;
  if (workspace == nullptr && p.counts.data == nullptr) return status;
  // Without sums to add, one block a row is left, which counts.
  const int64_t columns = workspace != nullptr ? p.channels : 0;
  const int64_t per_row = columns > 0 ? (columns + kFoldThreads - 1) / kFoldThreads : 1;
  return launch(tap_fold_kernel, p.rows * per_row, kFoldThreads, 0, stream, p, layout, per_row);
}

}  // namespace sidechain::cuda
