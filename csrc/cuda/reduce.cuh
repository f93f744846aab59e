// SPDX-License-Identifier: Apache-2.0
// Sums over a warp, a team of warps and a block, in an order that depends on their size alone.
#pragma once

#include <cuda_runtime.h>

namespace sidechain::cuda {

template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Sums kCount values over the block, the same in every thread. `scratch` holds kCount values a warp
// and is read until the next barrier.
template <int kCount, class T>
__device__ inline void block_sum(T (&value)[kCount], T* scratch) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = warp_sum(value[i]);
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch[warp * kCount + i] = value[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = T(0);
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] += scratch[w * kCount + i];
  }
}

// Sums kCount values over the warp at once: lane l gets the sum of value[l % kCount]. Each step
// halves the values a lane still holds, so that 8 values take 9 shuffles and not 40.
template <int kCount>
__device__ inline float warp_sums(float (&value)[kCount]) {
  static_assert(kCount > 0 && kCount <= 32 && (kCount & (kCount - 1)) == 0);
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? value[i] : value[half + i];
      const float kept = upper ? value[half + i] : value[i];
      value[i] = kept + __shfl_xor_sync(0xffffffffu, sent, half);
    }
  }
  float sum = value[0];
#pragma unroll
  for (int step = kCount; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// The same over a team of `warps` warps, of which this one is `warp`. `scratch` holds kCount values
// a warp of the team and is read until the next barrier. Every thread of the block makes the call,
// with the same `warps`: teams of several warps meet at a barrier of the block.
template <int kCount>
__device__ inline float team_sums(float (&value)[kCount], float* scratch, int warps, int warp) {
  float sum = warp_sums(value);
  if (warps == 1) return sum;
  const int lane = threadIdx.x % 32;
  if (lane < kCount) scratch[warp * kCount + lane] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int at = 0; at < kCount * 32; at += 32) {
    if (at + lane < warps * kCount) sum += scratch[at + lane];
  }
#pragma unroll
  for (int step = kCount; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// Threads of a block whose threads own packs of channels in rounds: a multiple of 32 in
// [least, most] that leaves few idle in the last round.
inline int64_t threads_for(int64_t packs, int64_t least, int64_t most) {
  const int64_t rounds = packs > most ? (packs + most - 1) / most : 1;
  const int64_t threads = ((packs + rounds - 1) / rounds + 31) / 32 * 32;
  return threads < least ? least : threads;
}

}  // namespace sidechain::cuda
