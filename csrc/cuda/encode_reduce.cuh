// SPDX-License-Identifier: Apache-2.0
// code_sums_ on CUDA. Contract: csrc/include/sidechain/encode_reduce.h; every pointer lies on the
// device.
//
// The entries are sorted by cell (label, feature), in row order within one; then every cell has one
// owner, which adds its list in an order that depends on its place alone and writes the cell once.
// Bound by the sort (csc_sort.cuh); of the sums only cells with entries are touched.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/csc.cuh"
#include "cuda/feature_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "sidechain/encode_reduce.h"

namespace sidechain::cuda {

constexpr int kSumThreads = 256;
// Lists up to this length are added by the thread that owns the cell, longer ones by its warp.
constexpr int32_t kShortList = 8;

struct CodeMoments {
  float sum, square;
};

__device__ inline void add_value(CodeMoments& m, float value) {
  m.sum += value;
  m.square += value * value;
}

// Sums and squares of entries [begin, end), the same in every lane.
__device__ inline CodeMoments warp_moments(const CscEntry* entries, int32_t begin, int32_t end) {
  CodeMoments m = {};
  for (int32_t e = begin + static_cast<int32_t>(threadIdx.x % 32); e < end; e += 32) {
    add_value(m, entries[e].value);
  }
  return {warp_sum(m.sum), warp_sum(m.square)};
}

// rows[label] += 1; equal labels of a warp make one addition, integers in any order.
__device__ inline void count_label(const CodeSumsParams& p, int64_t n) {
  const int64_t none = -1;
  int64_t label = none;
  if (n < p.codes.rows) label = p.label != nullptr ? p.label[n * p.label_stride] : 0;
  if (label < 0 || label >= p.labels) label = none;
  const unsigned peers = __match_any_sync(0xffffffffu, static_cast<unsigned long long>(label));
  const bool leads = (peers & ((1u << threadIdx.x % 32) - 1)) == 0;
  if (leads && label != none) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p.rows + label),
              static_cast<unsigned long long>(__popc(peers)));
  }
}

// Two things that need no more than the sorted entries: the first blocks count the rows of each
// label, a thread a row; the others take the sums of the whole tiles that lie within one list,
// a warp a tile.
__global__ void __launch_bounds__(kSumThreads)
    sum_tiles_kernel(const __grid_constant__ CodeSumsParams p, Csc csc, int64_t row_blocks,
                     int64_t tiles, CodeMoments* partial) {
  if (blockIdx.x < row_blocks) {
    return count_label(p, static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x);
  }
  const int64_t tile = ((blockIdx.x - row_blocks) * kSumThreads + threadIdx.x) / 32;
  if (tile >= tiles || tile_owner(csc, p.labels * p.features, tile) < 0) return;
  const int32_t begin = static_cast<int32_t>(tile) * kListTile;
  const CodeMoments m = warp_moments(csc.entries, begin, begin + kListTile);
  if (threadIdx.x % 32 == 0) partial[tile] = m;
}

// Sums and squares of a long list, the same in every lane.
__device__ inline CodeMoments list_moments(const Csc& csc, const CodeMoments* partial,
                                           int32_t begin, int32_t end) {
  const ListTiles tiles = list_tiles(begin, end);
  if (tiles.first >= tiles.end) return warp_moments(csc.entries, begin, end);
  const CodeMoments head = warp_moments(csc.entries, begin, tiles.first * kListTile);
  CodeMoments body = {};
  for (int32_t t = tiles.first + static_cast<int32_t>(threadIdx.x % 32); t < tiles.end; t += 32) {
    body.sum += partial[t].sum;
    body.square += partial[t].square;
  }
  const CodeMoments tail = warp_moments(csc.entries, tiles.end * kListTile, end);
  return {head.sum + warp_sum(body.sum) + tail.sum,
          head.square + warp_sum(body.square) + tail.square};
}

// A thread owns a cell; for a long list its whole warp helps.
__global__ void __launch_bounds__(kSumThreads)
    sum_cells_kernel(const __grid_constant__ CodeSumsParams p, Csc csc, int64_t cells,
                     const CodeMoments* partial) {
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int lane = threadIdx.x % 32;
  int32_t begin = 0, end = 0;
  if (cell < cells) begin = csc.start[cell], end = csc.start[cell + 1];
  const bool is_long = end - begin > kShortList;
  CodeMoments m = {};
  for (unsigned waiting = __ballot_sync(0xffffffffu, is_long); waiting != 0;
       waiting &= waiting - 1) {
    const int owner = __ffs(static_cast<int>(waiting)) - 1;
    const int32_t from = __shfl_sync(0xffffffffu, begin, owner);
    const int32_t to = __shfl_sync(0xffffffffu, end, owner);
    const CodeMoments found = list_moments(csc, partial, from, to);
    if (lane == owner) m = found;
  }
  if (begin == end) return;
  if (!is_long) {
    for (int32_t e = begin; e < end; ++e) add_value(m, csc.entries[e].value);
  }
  p.sums[cell] += m.sum;
  p.squares[cell] += m.square;
  p.counts[cell] += end - begin;
}

inline CscSource code_sums_source(const CodeSumsParams& p) {
  CscSource s = {};
  s.groups[0].codes = p.codes;
  s.group_count = 1;
  s.features = p.features;
  s.label = p.label, s.label_stride = p.label_stride, s.labels = p.labels;
  return s;
}

// Bytes of workspace for launch_code_sums; their contents do not matter.
inline int64_t code_sums_workspace(const CodeSumsParams& p) {
  const CscSource s = code_sums_source(p);
  return csc_workspace(s, nullptr).bytes +
         list_tile_count(s) * static_cast<int64_t>(sizeof(CodeMoments));
}

// labels * features < 2^32 - 1. Launches: those of the lists (csc.cuh), and two.
inline cudaError_t launch_code_sums(const CodeSumsParams& p, void* workspace, cudaStream_t stream) {
  const auto blocks = [](int64_t threads) { return (threads + kSumThreads - 1) / kSumThreads; };
  const CscSource s = code_sums_source(p);
  const int64_t cells = csc_lists(s);
  const bool empty = cells == 0 || csc_capacity(s) == 0;
  Csc csc = {};
  cudaError_t status = empty ? cudaSuccess : build_csc(s, workspace, stream, &csc);
  if (status != cudaSuccess) return status;
  auto* const partial = reinterpret_cast<CodeMoments*>(static_cast<char*>(workspace) +
                                                       csc_workspace(s, nullptr).bytes);
  const int64_t row_blocks = p.labels > 0 ? blocks(p.codes.rows) : 0;
  const int64_t tiles = empty ? 0 : list_tile_count(s);
  if (row_blocks + tiles > 0) {
    status = launch(sum_tiles_kernel, row_blocks + blocks(tiles * 32), kSumThreads, 0, stream, p,
                    csc, row_blocks, tiles, partial);
  }
  if (status != cudaSuccess || empty) return status;
  return launch(sum_cells_kernel, blocks(cells), kSumThreads, 0, stream, p, csc, cells,
                static_cast<const CodeMoments*>(partial));
}

}  // namespace sidechain::cuda
