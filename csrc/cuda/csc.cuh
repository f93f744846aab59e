// SPDX-License-Identifier: Apache-2.0
// Sparse codes turned around on the device: for every feature, or every feature of each label of
// rows, the entries that name it, group by group in row order.
//
// A stable radix sort of the entries by list, eight bits a pass; order follows from the data
// alone. Numbers of entries that only the device knows are replaced by their upper bounds, so that
// nothing waits for the host. All of it is a few passes over 8 bytes an entry, small beside the
// gathers that use the lists.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "sidechain/sae_update.h"

namespace sidechain::cuda {

struct alignas(16) CscEntry {
  int32_t row, group;
  float value, dvalue;  // value times row_weight; dvalue 0 where the source has none
};

// Entries [start[i], start[i + 1]) of list i = label * F + f.
struct Csc {
  const CscEntry* entries;
  const int32_t* start;  // [labels * F + 1]
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
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kSortThreads = 256, kSortRounds = 8;
constexpr int kSortTile = kSortThreads * kSortRounds;
static_assert(kSortThreads == kDigits, "a thread looks after one digit");
constexpr int kScanThreads = 1024;

inline int64_t csc_capacity(const Codes& codes) {
  return codes.offsets != nullptr ? codes.capacity : codes.rows * codes.width;
}
inline int64_t csc_capacity(const CscSource& s) {
  int64_t total = 0;
  for (int32_t g = 0; g < s.group_count; ++g) total += csc_capacity(s.groups[g].codes);
  return total;
}

inline int64_t csc_lists(const CscSource& s) { return s.labels * s.features; }

// Parts of the workspace, each a multiple of 16 bytes.
struct CscWorkspace {
  CscEntry* entries;
  uint32_t *keys[2], *ids[2];
  int32_t *rows, *counts, *start;
  int64_t bytes;
};

inline CscWorkspace csc_workspace(const CscSource& s, void* memory) {
  CscWorkspace w = {};
  const int64_t total = csc_capacity(s);
  const int64_t tiles = (total + kSortTile - 1) / kSortTile;
  const auto take = [&](int64_t count, int64_t size) -> void* {
    char* const at = static_cast<char*>(memory) + w.bytes;
    w.bytes += (count * size + 15) / 16 * 16;
    return memory != nullptr ? at : nullptr;
  };
  w.entries = static_cast<CscEntry*>(take(total, sizeof(CscEntry)));
  for (int i = 0; i < 2; ++i) {
    w.keys[i] = static_cast<uint32_t*>(take(total, 4));
    w.ids[i] = static_cast<uint32_t*>(take(total, 4));
  }
  w.rows = static_cast<int32_t*>(take(total, 4));
  w.counts = static_cast<int32_t*>(take(tiles * kDigits, 4));
  w.start = static_cast<int32_t*>(take(csc_lists(s) + 1, 4));
  return w;
}

// Key (list), id and row of the entries of a group, a warp for each row. `base` is the id of the
// group's first entry.
static __global__ void __launch_bounds__(kSortThreads)
    csc_keys_kernel(const __grid_constant__ CscSource s, int32_t group, int64_t base,
                    uint32_t* keys, uint32_t* ids, int32_t* rows) {
  const Codes& codes = s.groups[group].codes;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x) / 32;
  if (n >= codes.rows) return;
  const CodeRow row = code_row(codes, n);
  const int64_t first = codes.offsets != nullptr ? row.values : n * codes.width;
  const int64_t label = s.label != nullptr ? s.label[n * s.label_stride] : 0;
  const bool known = label >= 0 && label < s.labels;
  for (int64_t e = threadIdx.x % 32; e < row.count; e += 32) {
    const int64_t f = codes.indices[row.indices + e] - s.first_feature;
    const bool counts =
        known && f >= 0 && f < s.features && (s.keep_zeros || codes.values[row.values + e] != 0.0f);
    const int64_t id = base + first + e;
    keys[id] = counts ? static_cast<uint32_t>(label * s.features + f) : kNoList;
    ids[id] = static_cast<uint32_t>(id);
    rows[id] = static_cast<int32_t>(n);
  }
}

__device__ inline int digit_of(uint32_t key, int shift) {
  return static_cast<int>(key >> shift & (kDigits - 1));
}

// counts[digit][tile]
static __global__ void __launch_bounds__(kSortThreads)
    csc_count_kernel(const uint32_t* keys, int64_t total, int shift, int32_t* counts) {
  __shared__ int32_t count[kDigits];
  count[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSortTile + threadIdx.x;
  for (int64_t i = first; i < first + kSortTile && i < total; i += kSortThreads) {
    atomicAdd(&count[digit_of(keys[i], shift)], 1);  // counts do not depend on the order
  }
  __syncthreads();
  counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = count[threadIdx.x];
}

// Exclusive sums in place, one block.
static __global__ void __launch_bounds__(kScanThreads) csc_scan_kernel(int32_t* counts, int64_t n) {
  __shared__ int32_t sums[kScanThreads / 32];
  const int64_t share = (n + kScanThreads - 1) / kScanThreads;
  const int64_t begin = min(share * threadIdx.x, n), end = min(begin + share, n);
  int32_t mine = 0;
  for (int64_t i = begin; i < end; ++i) mine += counts[i];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t upto = mine;  // inclusive within the warp
  for (int step = 1; step < 32; step *= 2) {
    const int32_t below = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += below;
  }
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  int32_t before = upto - mine;
  for (int w = 0; w < warp; ++w) before += sums[w];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t count = counts[i];
    counts[i] = before;
    before += count;
  }
}

// One stable pass: the entries of a tile, in order, behind those of the tiles before it.
static __global__ void __launch_bounds__(kSortThreads)
    csc_scatter_kernel(const uint32_t* keys, const uint32_t* ids, int64_t total, int shift,
                       const int32_t* offsets, uint32_t* keys_out, uint32_t* ids_out) {
  constexpr int kWarps = kSortThreads / 32;
  __shared__ int32_t place[kDigits];          // of the next entry with this digit
  __shared__ int32_t count[kWarps][kDigits];  // of the round, for each warp
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  place[threadIdx.x] = offsets[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSortTile + threadIdx.x;
  for (int round = 0; round < kSortRounds; ++round) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) count[w][threadIdx.x] = 0;
    __syncthreads();
    const int64_t i = first + round * kSortThreads;
    const uint32_t key = i < total ? keys[i] : 0;
    const int digit = i < total ? digit_of(key, shift) : -1;
    const unsigned peers = __match_any_sync(0xffffffffu, digit);
    const int rank = __popc(peers & ((1u << lane) - 1));
    if (rank == 0 && digit >= 0) count[warp][digit] = __popc(peers);
    __syncthreads();
    if (digit >= 0) {
      int32_t at = place[digit] + rank;
      for (int w = 0; w < warp; ++w) at += count[w][digit];
      keys_out[at] = key;
      ids_out[at] = ids[i];
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) place[threadIdx.x] += count[w][threadIdx.x];
  }
}

// start[i] = the first place in the sorted keys that is not below i.
static __global__ void __launch_bounds__(kSortThreads)
    csc_start_kernel(const uint32_t* keys, int64_t total, int64_t lists, int32_t* start) {
  const int64_t list = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (list > lists) return;
  int64_t low = 0, high = total;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < static_cast<uint64_t>(list)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  start[list] = static_cast<int32_t>(low);
}

// The entries in sorted order, with all that is known of them.
static __global__ void __launch_bounds__(kSortThreads)
    csc_entries_kernel(const __grid_constant__ CscSource s, const uint32_t* keys,
                       const uint32_t* ids, const int32_t* rows, int64_t total, CscEntry* entries) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (i >= total || keys[i] == kNoList) return;
  const int64_t id = ids[i];
  int64_t e = id;
  int32_t group = 0;
  for (int64_t size; group + 1 < s.group_count; ++group, e -= size) {
    const Codes& codes = s.groups[group].codes;
    size = codes.offsets != nullptr ? codes.capacity : codes.rows * codes.width;
    if (e < size) break;
  }
  const CodeGroup& g = s.groups[group];
  const int32_t row = rows[id];
  int64_t value_at = e, dvalue_at = e;
  if (g.codes.offsets == nullptr) {
    const int64_t slot = e - static_cast<int64_t>(row) * g.codes.width;
    value_at = row * g.codes.values_row + slot;
    dvalue_at = row * g.dvalues_row + slot;
  }
  const float weight = g.row_weight != nullptr ? g.row_weight[row] : 1.0f;
  const float dvalue = g.dvalues != nullptr ? g.dvalues[dvalue_at] : 0.0f;
  entries[i] = {row, group, g.codes.values[value_at] * weight, dvalue};
}

// Builds the lists in a workspace of csc_workspace(s).bytes bytes, which has to outlive them.
inline cudaError_t build_csc(const CscSource& s, void* memory, cudaStream_t stream, Csc* csc) {
  const CscWorkspace w = csc_workspace(s, memory);
  const int64_t total = csc_capacity(s), lists = csc_lists(s);
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  *csc = {w.entries, w.start};
  cudaError_t status = cudaSuccess;
  const auto then = [&](cudaError_t next) {
    if (status == cudaSuccess) status = next;
  };
  int now = 0;
  if (total > 0) {
    const int64_t tiles = blocks(total, kSortTile);
    // Places of CSR codes that no row holds keep this key.
    then(cudaMemsetAsync(w.keys[0], 0xff, total * 4, stream));
    int64_t base = 0;
    for (int32_t g = 0; g < s.group_count; ++g) {
      const Codes& codes = s.groups[g].codes;
      if (codes.rows > 0) {
        then(launch(csc_keys_kernel, blocks(codes.rows * 32, kSortThreads), kSortThreads, 0, stream,
                    s, g, base, w.keys[0], w.ids[0], w.rows));
      }
      base += csc_capacity(codes);
    }
    // The key of what does not count has all digits set and has to come last.
    for (int shift = 0; shift == 0 || lists >> shift > 0; shift += kDigitBits) {
      const uint32_t *keys = w.keys[now], *ids = w.ids[now];
      then(launch(csc_count_kernel, tiles, kSortThreads, 0, stream, keys, total, shift, w.counts));
      then(launch(csc_scan_kernel, 1, kScanThreads, 0, stream, w.counts, tiles * kDigits));
      then(launch(csc_scatter_kernel, tiles, kSortThreads, 0, stream, keys, ids, total, shift,
                  static_cast<const int32_t*>(w.counts), w.keys[1 - now], w.ids[1 - now]));
      now = 1 - now;
    }
  }
  const uint32_t *keys = w.keys[now], *ids = w.ids[now];
  then(launch(csc_start_kernel, blocks(lists + 1, kSortThreads), kSortThreads, 0, stream, keys,
              total, lists, w.start));
  if (total > 0) {
    then(launch(csc_entries_kernel, blocks(total, kSortThreads), kSortThreads, 0, stream, s, keys,
                ids, static_cast<const int32_t*>(w.rows), total, w.entries));
  }
  return status;
}

}  // namespace sidechain::cuda
