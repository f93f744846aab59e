// SPDX-License-Identifier: Apache-2.0
// Kernels of the stable radix sort behind csc.cuh.
//
// A pass is two launches: every block counts the digits of its tile, then every block works out
// from all counts where its entries go and writes them there. There are at most kSortTiles tiles,
// so that reading all counts stays small (128 KB a block at 256 digits). The first pass reads the
// codes as they are; entries that stand for nothing end there. From then on an entry is its key
// and all that is known of it, 20 bytes, read in order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/csc_source.cuh"
#include "cuda/shared.cuh"

namespace sidechain::cuda {

constexpr int kSortChunk = kSortThreads * kSortItems;
constexpr int kSortTiles = 128;
constexpr int kMaxDigitBits = 11, kMaxDigits = 1 << kMaxDigitBits;

// What the passes of one sort share, and the digit of this one.
struct SortPass {
  int64_t tile;  // entries of a block, a multiple of kSortChunk
  int32_t tiles, digits, shift;
  __device__ int32_t digit(uint32_t key) const {
    return static_cast<int32_t>(key >> shift & static_cast<uint32_t>(digits - 1));
  }
};

// Shared memory of csc_scatter_kernel: two places of each digit, and counts of it for each warp.
inline int64_t scatter_shared_bytes(int64_t digits) { return digits * (8 + 2 * kSortWarps); }

// counts[tile][digit]
template <class From>
__global__ void __launch_bounds__(kSortThreads)
    csc_count_kernel(const __grid_constant__ From from, SortPass pass, int32_t* counts) {
  __shared__ int32_t count[kMaxDigits];
  for (int d = threadIdx.x; d < pass.digits; d += kSortThreads) count[d] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * pass.tile, end = min(begin + pass.tile, from.size());
  typename From::Place place = {};
  for (int64_t chunk = begin; chunk < end; chunk += kSortChunk) {
    uint32_t key[kSortItems];
    from.template make_keys<kSortThreads>(chunk + threadIdx.x, end, place, key);
#pragma unroll
    for (int j = 0; j < kSortItems; ++j) {  // counts do not depend on the order
      if (key[j] != kNoList) atomicAdd(&count[pass.digit(key[j])], 1);
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < pass.digits; d += kSortThreads) {
    counts[static_cast<int64_t>(blockIdx.x) * pass.digits + d] = count[d];
  }
}

// Leaves in next[digit] where the first entry of this tile with that digit goes and in first[digit]
// where that of all tiles goes; returns the number of all entries. `sums` holds a number a warp.
__device__ inline int32_t tile_places(const SortPass& pass, const int32_t* counts, int32_t* first,
                                      int32_t* next, int32_t* sums) {
  for (int d = threadIdx.x; d < pass.digits; d += kSortThreads) {
    int32_t before = 0, all = 0;
#pragma unroll 16
    for (int tile = 0; tile < pass.tiles; ++tile) {
      const int32_t count = counts[static_cast<int64_t>(tile) * pass.digits + d];
      all += count;
      before += tile < static_cast<int>(blockIdx.x) ? count : 0;
    }
    first[d] = all;
    next[d] = before;
  }
  __syncthreads();
  const int share = (pass.digits + kSortThreads - 1) / kSortThreads;
  const int begin = min(share * static_cast<int>(threadIdx.x), pass.digits);
  const int end = min(begin + share, pass.digits);
  int32_t mine = 0;
  for (int d = begin; d < end; ++d) mine += first[d];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t upto = mine;  // inclusive within the warp
  for (int step = 1; step < 32; step *= 2) {
    const int32_t below = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += below;
  }
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  int32_t place = upto - mine, total = 0;
  for (int w = 0; w < kSortWarps; ++w) {
    place += w < warp ? sums[w] : 0;
    total += sums[w];
  }
  for (int d = begin; d < end; ++d) {
    const int32_t count = first[d];
    first[d] = place;
    next[d] += place;
    place += count;
  }
  return total;
}

// Where a pass writes: `count` of all entries where it is the first, `start` of the lists where it
// is the only one.
struct SortOutput {
  uint32_t* keys;
  CscEntry* entries;
  int32_t *count, *start;
  int64_t lists;
};

// Number, among the entries with its digit of the warp so far, of each entry of this thread.
__device__ inline void warp_ranks(const SortPass& pass, const uint32_t (&key)[kSortItems],
                                  uint16_t* count, uint32_t (&rank)[kSortItems]) {
  const unsigned below = (1u << threadIdx.x % 32) - 1;
#pragma unroll
  for (int j = 0; j < kSortItems; ++j) {
    const bool counts = key[j] != kNoList;
    const int32_t digit = counts ? pass.digit(key[j]) : -1;
    const unsigned peers = __match_any_sync(0xffffffffu, digit);
    const uint32_t before = counts ? count[digit] : 0;
    __syncwarp();
    const bool leads = (peers & below) == 0;
    if (counts && leads) count[digit] = static_cast<uint16_t>(before + __popc(peers));
    __syncwarp();
    rank[j] = before + __popc(peers & below);
  }
}

// One stable pass: the entries of a tile, in order, behind those of the tiles before it. Within a
// chunk a warp takes consecutive entries.
template <class From>
__global__ void __launch_bounds__(kSortThreads)
    csc_scatter_kernel(const __grid_constant__ From from, SortPass pass, const int32_t* counts,
                       SortOutput out) {
  __shared__ int32_t sums[kSortWarps];
  const int digits = pass.digits, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* const place = dynamic_shared<int32_t>();                // of the chunk
  int32_t* const next = place + digits;                            // of the chunk after it
  auto* const count = reinterpret_cast<uint16_t*>(next + digits);  // [warps][digits]
  uint16_t* const mine = count + warp * digits;
  const int32_t total = tile_places(pass, counts, place, next, sums);
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0 && out.count != nullptr) *out.count = total;
    if (out.start != nullptr) {
      __syncthreads();
      for (int64_t d = threadIdx.x; d <= out.lists; d += kSortThreads) {
        out.start[d] = d < digits ? place[d] : total;
      }
    }
  }
  const int64_t begin = blockIdx.x * pass.tile, end = min(begin + pass.tile, from.size());
  typename From::Place entry_place = {};
  for (int64_t chunk = begin; chunk < end; chunk += kSortChunk) {
    const int64_t first = chunk + warp * (kSortChunk / kSortWarps) + lane;
    uint32_t key[kSortItems], rank[kSortItems];
    from.template keys<32>(first, end, key);
    CscEntry entry[kSortItems];  // under way while the ranks are worked out
#pragma unroll
    for (int j = 0; j < kSortItems; ++j) {
      entry[j] = key[j] != kNoList ? from.entry(first + j * 32, entry_place) : CscEntry{};
    }
    for (int d = lane; d < digits; d += 32) mine[d] = 0;
    __syncwarp();
    warp_ranks(pass, key, mine, rank);
    __syncthreads();
    for (int d = threadIdx.x; d < digits; d += kSortThreads) {
      uint32_t before = 0;
      for (int w = 0; w < kSortWarps; ++w) {
        const uint32_t found = count[w * digits + d];
        count[w * digits + d] = static_cast<uint16_t>(before);
        before += found;
      }
      place[d] = next[d];
      next[d] += static_cast<int32_t>(before);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kSortItems; ++j) {
      if (key[j] == kNoList) continue;
      const int32_t digit = pass.digit(key[j]);
      const int64_t at = place[digit] + mine[digit] + static_cast<int32_t>(rank[j]);
      out.keys[at] = key[j];
      out.entries[at] = entry[j];
    }
    __syncwarp();
  }
}

// start[i] = the first place in the sorted keys that is not below i.
static __global__ void __launch_bounds__(kSortThreads)
    csc_start_kernel(const uint32_t* keys, const int32_t* count, int64_t lists, int32_t* start) {
  const int64_t list = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (list > lists) return;
  int32_t low = 0, high = *count;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (keys[middle] < static_cast<uint64_t>(list)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  start[list] = low;
}

}  // namespace sidechain::cuda
