// SPDX-License-Identifier: Apache-2.0
// Transposes sparse codes, CSR to CSC: for every feature the rows in which it is active, in row
// order.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/kernels/entry.h"
#include "sidechain/codes.h"

namespace sidechain::cpu {

// What becomes an entry, and with which numbers.
struct CscSource {
  Codes codes;
  const float* dvalues;     // nullptr = 0
  int64_t dvalues_row;      // row stride of the fixed width
  const float* row_weight;  // [N] factor of the values, nullptr = 1
  int64_t features;
  int64_t first_feature;
  bool keep_zeros;  // entries of value 0 too
};

// Lists of the features; `start` has F + 1 places.
struct Csc {
  std::unique_ptr<CscEntry[]> entries;
  std::unique_ptr<int32_t[]> start;
};

// Two passes over the codes; serial, because it is a small part of every op that needs it (0.1 ms
// of 33k entries, where the update they feed takes tens of ms).
Csc build_csc(const CscSource& source);

}  // namespace sidechain::cpu
