// SPDX-License-Identifier: Apache-2.0
// The second launch of tap_: adds the partial sums of every row in a fixed order, counts tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/tap_passes.cuh"
#include "cuda/vec.cuh"
#include "sidechain/tap.h"

namespace sidechain::cuda {

constexpr int kFoldThreads = 512;
constexpr int kFoldSlices = kFoldThreads / 32;
constexpr unsigned kFoldGroup = 4;  // chunks whose loads stand together

// Captured tokens of a row; every thread of the block calls. `counted` is shared memory.
__device__ inline void tap_count(const TapParams& p, int64_t row, int64_t slot,
                                 unsigned long long (&counted)[kFoldSlices]) {
  // Without a mask one thread knows.
  unsigned long long n = p.capture_mask.data == nullptr && threadIdx.x == 0 ? p.tokens : 0;
  if (p.capture_mask.data != nullptr) {
    for (int64_t t = threadIdx.x; t < p.tokens; t += kFoldThreads) {
      n += tap_holds(p.capture_mask, row, t) ? 1 : 0;
    }
  }
  n = warp_sum(n);
  if (threadIdx.x % 32 == 0) counted[threadIdx.x / 32] = n;
  __syncthreads();
  if (threadIdx.x != 0) return;
  unsigned long long total = 0;
  for (int warp = 0; warp < kFoldSlices; ++warp) total += counted[warp];
  p.counts.data[slot * p.counts.slot + row * p.counts.row] += static_cast<float>(total);
}

// Blocks: one per 32 kWidth channels of a row; each of its warps adds a slice of the row's chunks
// in order, and the slices are added in order. The first block of a row counts its tokens. Asking
// for one block a multiprocessor leaves the compiler the registers to keep all loads together.
template <int kWidth>
__global__ void __launch_bounds__(kFoldThreads, 1)
    tap_fold_kernel(const TapParams p, const TapLayout layout, int blocks_per_row) {
  constexpr int kColumns = 32 * kWidth;
  __shared__ float part[2][kFoldSlices][kColumns];
  __shared__ unsigned long long counted[kFoldSlices];
  const unsigned row_32 = blockIdx.x / static_cast<unsigned>(blocks_per_row);
  const int block = static_cast<int>(blockIdx.x - row_32 * blocks_per_row);
  const int64_t row = row_32;
  const int64_t slot = p.capture_slot != nullptr ? *p.capture_slot : 0;
  const bool to_sums = p.sums.data != nullptr && tap_inside(slot, p.sums.slots);
  const bool to_squares = p.squares.data != nullptr && tap_inside(slot, p.squares.slots);
  const int64_t first = static_cast<int64_t>(block) * kColumns;
  if (to_sums || to_squares) {
    const int slice = threadIdx.x / 32, at = threadIdx.x % 32 * kWidth;
    const auto chunks = static_cast<unsigned>(layout.chunks);
    const unsigned length = (chunks + kFoldSlices - 1) / kFoldSlices;
    const unsigned begin = slice * length, end = min(begin + length, chunks);
    float sum[kWidth] = {}, square[kWidth] = {};
    if (first + at < p.channels && begin < end) {
      const float* const from = layout.workspace + row * chunks * 2 * p.channels + first + at;
      for (unsigned chunk = begin; chunk < end; chunk += kFoldGroup) {
        float more[kFoldGroup][kWidth], more_squares[kFoldGroup][kWidth];
        // All loads before any addition; behind the end, the last chunk again.
#pragma unroll
        for (unsigned i = 0; i < kFoldGroup; ++i) {
          const float* const partial = from + min(chunk + i, end - 1) * 2 * p.channels;
          load(partial, more[i]);
          load(partial + p.channels, more_squares[i]);
        }
#pragma unroll
        for (unsigned i = 0; i < kFoldGroup; ++i) {
          if (chunk + i >= end) continue;
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            sum[k] += more[i][k];
            square[k] += more_squares[i][k];
          }
        }
      }
    }
    store(&part[0][slice][at], sum);
    store(&part[1][slice][at], square);
    __syncthreads();
    // A thread adds the slices of one channel of one of the two sums.
    static_assert(2 * kColumns <= kFoldThreads);
    const bool squares = threadIdx.x >= kColumns;
    const int column = threadIdx.x - (squares ? kColumns : 0);
    if (column < kColumns && first + column < p.channels && (squares ? to_squares : to_sums)) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kFoldSlices; ++i) total += part[squares][i][column];
      const SumBuffer to = squares ? p.squares : p.sums;
      to.data[slot * to.slot + row * to.row + first + column] += total;
    }
  }
  const bool to_counts = p.counts.data != nullptr && tap_inside(slot, p.counts.slots);
  if (block == 0 && to_counts) tap_count(p, row, slot, counted);
}

template <int kWidth>
cudaError_t launch_tap_fold(const TapParams& p, const TapLayout& layout, cudaStream_t stream) {
  // Without sums to add, one block a row is left, which counts.
  const int64_t columns = layout.workspace != nullptr ? p.channels : 0;
  const int64_t per_row = columns > 0 ? tap_ceil(columns, 32 * kWidth) : 1;
  return launch(tap_fold_kernel<kWidth>, p.rows * per_row, kFoldThreads, 0, stream, p, layout,
                static_cast<int>(per_row));
}

}  // namespace sidechain::cuda
