// SPDX-License-Identifier: Apache-2.0
// Transposes sparse codes on the device, CSR to CSC: for every feature, or every feature of each
// label of rows, the entries that name it, group by group in row order.
//
// A stable radix sort of the entries by list in digits of at most 11 bits (csc_sort.cuh); order
// follows from the data alone. Numbers of entries that only the device knows are replaced by their
// upper bounds, so that nothing waits for the host. Launches: 2 up to 2,048 lists, 5 up to
// 4,194,304 (two passes and the starts), 7 beyond; small beside the gathers that use the lists.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/csc_sort.cuh"
#include "cuda/launch.cuh"
#include "sidechain/sae_update.h"

namespace sidechain::cuda {

constexpr int kEntryPadding = 3;

// Entries [start[i], start[i + 1]) of list i = label * F + f.
struct Csc {
  const CscEntry* entries;  // kEntryPadding more may be read
  const uint32_t* keys;     // list of each entry
  const int32_t* start;     // [labels * F + 1]
};

inline int64_t csc_capacity(const Codes& codes) {
  return codes.offsets != nullptr ? codes.capacity : codes.rows * codes.width;
}
inline int64_t csc_capacity(const CscSource& s) {
  int64_t total = 0;
  for (int32_t g = 0; g < s.group_count; ++g) total += csc_capacity(s.groups[g].codes);
  return total;
}

inline int64_t csc_lists(const CscSource& s) { return s.labels * s.features; }

// Passes and sizes of the sort: functions of the shapes alone.
struct CscSort {
  int64_t total, lists;
  int32_t passes, bits;
  SortPass pass;  // without its shift
};

inline CscSort csc_sort(const CscSource& s) {
  CscSort sort = {csc_capacity(s), csc_lists(s), 1, 1, {}};
  int32_t bits = 1;
  while (bits < 32 && (sort.lists - 1) >> bits > 0) ++bits;
  sort.passes = (bits + kMaxDigitBits - 1) / kMaxDigitBits;
  sort.bits = (bits + sort.passes - 1) / sort.passes;
  const int64_t chunks = (sort.total + kSortChunk - 1) / kSortChunk;
  sort.pass.tile = (chunks + kSortTiles - 1) / kSortTiles * kSortChunk;
  sort.pass.tiles =
      static_cast<int32_t>(chunks > 0 ? (sort.total + sort.pass.tile - 1) / sort.pass.tile : 0);
  sort.pass.digits = 1 << sort.bits;
  return sort;
}

// Parts of the workspace, each a multiple of 16 bytes.
struct CscWorkspace {
  CscEntry* entries[2];  // the second only where there is a second pass
  uint32_t* keys[2];     // the first pass leaves sorted ones in the first
  int32_t *counts, *count, *start;
  int64_t bytes;
};

inline CscWorkspace csc_workspace(const CscSource& s, void* memory) {
  CscWorkspace w = {};
  const CscSort sort = csc_sort(s);
  const auto take = [&](int64_t count, int64_t size) -> void* {
    char* const at = static_cast<char*>(memory) + w.bytes;
    w.bytes += (count * size + 15) / 16 * 16;
    return memory != nullptr ? at : nullptr;
  };
  for (int i = 0; i < 2; ++i) {
    if (i < sort.passes) {
      w.entries[i] = static_cast<CscEntry*>(take(sort.total + kEntryPadding, sizeof(CscEntry)));
    }
    w.keys[i] = static_cast<uint32_t*>(take(sort.total, 4));
  }
  w.counts = static_cast<int32_t*>(take(sort.pass.tiles * sort.pass.digits, 4));
  w.count = static_cast<int32_t*>(take(1, 4));
  w.start = static_cast<int32_t*>(take(sort.lists + 1, 4));
  return w;
}

template <class From>
cudaError_t launch_sort_pass(const From& from, const SortPass& pass, int32_t* counts,
                             const SortOutput& out, cudaStream_t stream) {
  const cudaError_t status =
      launch(csc_count_kernel<From>, pass.tiles, kSortThreads, 0, stream, from, pass, counts);
  if (status != cudaSuccess) return status;
  return launch(csc_scatter_kernel<From>, pass.tiles, kSortThreads,
                scatter_shared_bytes(pass.digits), stream, from, pass,
                static_cast<const int32_t*>(counts), out);
}

// Builds the lists in a workspace of csc_workspace(s).bytes bytes, which has to outlive them.
// Places are 32-bit: fewer than 2^31 entries over all groups, lists below 2^32 - 1.
inline cudaError_t build_csc(const CscSource& s, void* memory, cudaStream_t stream, Csc* csc) {
  const CscSort sort = csc_sort(s);
  const CscWorkspace w = csc_workspace(s, memory);
  if (sort.total > INT32_MAX || sort.lists >= kNoList) return cudaErrorInvalidValue;
  const int last = (sort.passes - 1) % 2;
  *csc = {w.entries[last], w.keys[last], w.start};
  if (sort.total == 0) return cudaMemsetAsync(w.start, 0, (sort.lists + 1) * 4, stream);
  FromCodes codes = {s, {}, {}, w.keys[1]};
  uint32_t end = 0;
  for (int32_t g = 0; g < s.group_count; ++g) {
    const Codes& group = s.groups[g].codes;
    codes.end[g] = end += static_cast<uint32_t>(csc_capacity(group));
    if (group.width > 0) codes.width[g] = division_by(group.width);
  }
  cudaError_t status = cudaSuccess;
  SortPass pass = sort.pass;
  for (int i = 0; i < sort.passes && status == cudaSuccess; ++i, pass.shift += sort.bits) {
    const int to = i % 2;
    const SortOutput out = {w.keys[to], w.entries[to], i == 0 ? w.count : nullptr,
                            sort.passes == 1 ? w.start : nullptr, sort.lists};
    const FromPass before = {w.keys[1 - to], w.entries[1 - to], w.count};
    status = i == 0 ? launch_sort_pass(codes, pass, w.counts, out, stream)
                    : launch_sort_pass(before, pass, w.counts, out, stream);
  }
  if (status != cudaSuccess || sort.passes == 1) return status;
  return launch(csc_start_kernel, (sort.lists + kSortThreads) / kSortThreads, kSortThreads, 0,
                stream, csc->keys, static_cast<const int32_t*>(w.count), sort.lists, w.start);
}

}  // namespace sidechain::cuda
