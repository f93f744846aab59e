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

#include "cuda/shared.cuh"
#include "sidechain/sae_update.h"

namespace sidechain::cuda {

struct alignas(16) CscEntry {
  int32_t row, group;
  float value, dvalue;  // value times row_weight; dvalue 0 where the source has none
};

struct CscSource {
  CodeGroup groups[kMaxCodeGroups];  // of which codes, dvalues and row_weight are read
  int32_t group_count;
  int64_t features, first_feature;
  bool keep_zeros;  // entries of value 0 too
  // Label of each row, nullptr = 0; the rows of labels outside [0, labels) stand for nothing.
  const int64_t* label;
  int64_t label_stride;
  int64_t labels = 1;
};

constexpr uint32_t kNoList = 0xffffffffu;
constexpr int kSortThreads = 256, kSortWarps = kSortThreads / 32;
constexpr int kSortItems = 8;  // of a thread, held in registers
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

// n / divisor for n < 2^31 by one multiplication: 2^(31 + ceil(log2 divisor)) / divisor, rounded
// up, is at most 2^-31 n too large a factor for the quotient to change.
struct Division {
  uint32_t factor;
  int32_t shift;
  __device__ uint32_t of(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> shift);
  }
};
inline Division division_by(int64_t divisor) {
  int32_t shift = 31;
  while (int64_t{1} << (shift - 31) < divisor) ++shift;
  const uint64_t power = uint64_t{1} << shift;
  const uint64_t factor = (power + divisor - 1) / divisor;
  return {static_cast<uint32_t>(factor), shift};
}

// Entries first, first + kStep, ... below end of `keys`.
template <int kStep>
__device__ inline void read_keys(const uint32_t* keys, int64_t first, int64_t end,
                                 uint32_t (&key)[kSortItems]) {
#pragma unroll
  for (int j = 0; j < kSortItems; ++j) {
    const int64_t i = first + j * kStep;
    key[j] = i < end ? keys[i] : kNoList;
  }
}

// ---- where a pass reads ----

// The entries of codes, group behind group; those of CSR codes that no row holds are among them.
struct FromCodes {
  CscSource s;
  uint32_t end[kMaxCodeGroups];    // of the groups
  Division width[kMaxCodeGroups];  // by the fixed width
  uint32_t* found;                 // keys, left by the count for the scatter

  // An entry, found by number; numbers asked for with the same Place ascend.
  struct Place {
    int32_t group, row;
    uint32_t at;  // number within the group
    bool held;    // by a row
  };

  __device__ int64_t size() const { return s.group_count > 0 ? end[s.group_count - 1] : 0; }

  // The last row from `row` on that begins at or before entry e: steps that double, then halving.
  static __device__ int32_t csr_row(const Codes& codes, int64_t e, int32_t row) {
    const auto rows = static_cast<int32_t>(codes.rows);
    int32_t high = row + 1;
    for (int32_t step = 1; high < rows && codes.offsets[high] <= e; step *= 2) {
      row = high;
      high = step < rows - row ? row + step : rows;
    }
    while (high - row > 1) {
      const int32_t middle = row + (high - row) / 2;
      if (codes.offsets[middle] <= e) {
        row = middle;
      } else {
        high = middle;
      }
    }
    return row;
  }

  __device__ void find(int64_t i, Place& p) const {
    const auto number = static_cast<uint32_t>(i);
    while (number >= end[p.group]) ++p.group, p.row = 0;
    p.at = number - (p.group > 0 ? end[p.group - 1] : 0);
    const Codes& codes = s.groups[p.group].codes;
    p.held = true;
    if (codes.offsets == nullptr) {
      p.row = static_cast<int32_t>(width[p.group].of(p.at));
    } else {
      p.held = codes.rows > 0;
      if (!p.held) return;
      p.row = csr_row(codes, p.at, p.row);
      p.held = codes.offsets[p.row] <= p.at && p.at < codes.offsets[p.row + 1];
    }
  }

  // Place of the entry in an array whose rows of the fixed width lie `row_stride` apart.
  __device__ int64_t element(const Place& p, int64_t row_stride) const {
    const Codes& codes = s.groups[p.group].codes;
    if (codes.offsets != nullptr) return p.at;
    return p.row * row_stride + (p.at - static_cast<uint32_t>(p.row) * codes.width);
  }

  // In two steps over all entries, so that the loads of all are under way at once.
  template <int kStep>
  __device__ void make_keys(int64_t first, int64_t last, Place& p,
                            uint32_t (&key)[kSortItems]) const {
    int64_t label[kSortItems], f[kSortItems];
    float value[kSortItems];
#pragma unroll
    for (int j = 0; j < kSortItems; ++j) {
      const int64_t i = first + j * kStep;
      bool held = i < last;
      if (held) find(i, p), held = p.held;
      const Codes& codes = s.groups[p.group].codes;
      f[j] = held ? codes.indices[element(p, codes.indices_row)] : -1;
      value[j] = held && !s.keep_zeros ? codes.values[element(p, codes.values_row)] : 1.0f;
      label[j] = !held ? -1 : s.label != nullptr ? s.label[p.row * s.label_stride] : 0;
    }
#pragma unroll
    for (int j = 0; j < kSortItems; ++j) {
      f[j] -= s.first_feature;
      const bool counts = f[j] >= 0 && f[j] < s.features && label[j] >= 0 && label[j] < s.labels &&
                          value[j] != 0.0f;
      key[j] = counts ? static_cast<uint32_t>(label[j] * s.features + f[j]) : kNoList;
      if (first + j * kStep < last) found[first + j * kStep] = key[j];
    }
  }

  template <int kStep>
  __device__ void keys(int64_t first, int64_t last, uint32_t (&key)[kSortItems]) const {
    read_keys<kStep>(found, first, last, key);
  }

  __device__ CscEntry entry(int64_t i, Place& p) const {
    find(i, p);
    const CodeGroup& g = s.groups[p.group];
    const float weight = g.row_weight != nullptr ? g.row_weight[p.row] : 1.0f;
    const float dvalue = g.dvalues != nullptr ? g.dvalues[element(p, g.dvalues_row)] : 0.0f;
    return {p.row, p.group, g.codes.values[element(p, g.codes.values_row)] * weight, dvalue};
  }
};

// The entries an earlier pass has written.
struct FromPass {
  const uint32_t* sorted;  // keys
  const CscEntry* entries;
  const int32_t* count;

  struct Place {};
  __device__ int64_t size() const { return *count; }
  template <int kStep>
  __device__ void make_keys(int64_t first, int64_t end, Place&, uint32_t (&key)[kSortItems]) const {
    read_keys<kStep>(sorted, first, end, key);
  }
  template <int kStep>
  __device__ void keys(int64_t first, int64_t end, uint32_t (&key)[kSortItems]) const {
    read_keys<kStep>(sorted, first, end, key);
  }
  __device__ CscEntry entry(int64_t i, Place&) const { return entries[i]; }
};

// ---- kernels ----

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
