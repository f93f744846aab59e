// SPDX-License-Identifier: Apache-2.0
// Rows of a store: where a shuffled order is, in which shard a row lies, copies of rows that lie
// anywhere in memory, moments. The definitions are permutation.py, runs.py, gather.py and
// statistics.py of python/sidechain/store.
#pragma once

#include <array>
#include <cstdint>

#include "sidechain/dtype.h"
#include "sidechain/isa.h"

namespace sidechain {

constexpr int kOrderRounds = 8;

// A bijection of [0, size): a Feistel network on low_bits + high_bits bits, walked until inside.
struct Order {
  uint64_t size = 1;
  int low_bits = 1;
  int high_bits = 0;
  std::array<uint64_t, kOrderRounds> keys{};
};

// rows[i] = order of positions[i], i < count; every position within [0, size). The same on every
// instruction set.
void permute(const Order& order, const int64_t* positions, int64_t count, int64_t* rows, Isa isa);

// Runs of neighbouring rows of a store, and how to find that of a row.
struct Runs {
  const int64_t* ends;   // [runs], ascending: the number after the last row of a run
  const int64_t* shard;  // [runs]
  const int64_t* shift;  // [runs]: row of the shard less number of the row
  const int64_t* first;  // [((rows - 1) >> bits) + 1]: first run that ends after row i << bits
  int bits;
};

// shard[i] and row[i] of row number rows[i], i < count; every number within [0, last end). What is
// in the tables of `runs` is trusted.
void locate(const Runs& runs, const int64_t* rows, int64_t count, int64_t* shard, int64_t* row);

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
