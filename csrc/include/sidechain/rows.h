// SPDX-License-Identifier: Apache-2.0
// Rows of a store: where a shuffled order is, in which shard a row lies, copies of rows that lie
// anywhere in memory, moments. The definitions are permutation.py, runs.py, gather.py and
// statistics.py of python/sidechain/store.
#pragma once

#include <cstdint>

#include "sidechain/dtype.h"
#include "sidechain/isa.h"

namespace sidechain {

// out[i] = the row_bytes bytes at sources[i], i < count. Neither aligned nor of a special size.
void gather_rows(const uint8_t* const* sources, int64_t count, int64_t row_bytes, uint8_t* out);

// Streaming moments of rows [count, width], contiguous; everything but the rows is updated.
struct MomentsParams {
  const void* rows;
  Dtype dtype;
  int64_t count;
  int64_t width;
  int64_t seen;  // rows that mean and m2 stand for already
  double* mean;  // [width]
  double* m2;    // [width], sum of (x - mean)^2
  double norm_sum;
  double norm_squares;
  double norm_max;
};

// Deterministic for one ISA. NaN and infinity of any row reach m2 of their column.
void moments(MomentsParams& p, Isa isa);

}  // namespace sidechain
