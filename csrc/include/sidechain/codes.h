// SPDX-License-Identifier: Apache-2.0
// Sparse codes as they cross the framework-free boundary.
#pragma once

#include <cstdint>

namespace sidechain {

// Row n holds the entries [n * values_row, n * values_row + width) of fixed-width codes, or
// [offsets[n], offsets[n + 1]) of codes in CSR form. An index outside [0, F) stands for nothing; no
// index stands twice in a row.
struct Codes {
  const float* values;     // [N, K] or [nnz]; nullptr = 0 where an op allows it
  const int32_t* indices;  // [N, K] or [nnz]
  const int64_t* offsets;  // [N + 1], nullptr = fixed width
  int64_t rows;            // N
  int64_t width;           // K of the fixed width
  int64_t capacity;        // nnz of the CSR form
  int64_t values_row;      // row strides of the fixed width, 0 = one row serves all
  int64_t indices_row;
};

// Where the entries of a row stand. A CSR row is clipped to [0, capacity], so that bad offsets read
// nothing that is not there.
struct CodeRow {
  int64_t values, indices;  // first entry
  int64_t count;
};

#if defined(__CUDACC__)
#define SIDECHAIN_HOST_DEVICE __host__ __device__
#else
#define SIDECHAIN_HOST_DEVICE
#endif

static SIDECHAIN_HOST_DEVICE inline CodeRow code_row(const Codes& codes, int64_t row) {
  if (codes.offsets == nullptr) {
    return {row * codes.values_row, row * codes.indices_row, codes.width};
  }
  int64_t begin = codes.offsets[row];
  int64_t end = codes.offsets[row + 1];
  begin = begin < 0 ? 0 : begin;
  end = end > codes.capacity ? codes.capacity : end;
  return {begin, begin, end > begin ? end - begin : 0};
}

}  // namespace sidechain
