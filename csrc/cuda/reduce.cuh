// SPDX-License-Identifier: Apache-2.0
// Sums over a warp and over a block, in an order that depends on the block's size alone.
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

// Threads of a block whose threads own packs of channels in rounds: a multiple of 32 in
// [least, most] that leaves few idle in the last round.
inline int64_t threads_for(int64_t packs, int64_t least, int64_t most) {
  const int64_t rounds = packs > most ? (packs + most - 1) / most : 1;
  const int64_t threads = ((packs + rounds - 1) / rounds + 31) / 32 * 32;
  return threads < least ? least : threads;
}

}  // namespace sidechain::cuda
