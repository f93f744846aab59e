// SPDX-License-Identifier: Apache-2.0
// Where the sort of csc_sort.cuh reads: the codes of all groups in its first pass, the entries of
// the pass before in the others.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

// n / divisor for n < 2^31 as a multiplication by 2^(31 + s) / divisor, rounded up, with s =
// ceil(log2 divisor): Granlund and Montgomery 1994.
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

}  // namespace sidechain::cuda
