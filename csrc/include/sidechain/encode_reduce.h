// SPDX-License-Identifier: Apache-2.0
// code_sums_: sums, squares and firing counts of sparse codes for each label.
#pragma once

#include <cstdint>

#include "sidechain/codes.h"
#include "sidechain/isa.h"
#include "sidechain/parallel.h"

namespace sidechain {

// Formulas: python/sidechain/ops/encode_reduce.py. Buffers contiguous, accumulated into.
struct CodeSumsParams {
  Codes codes;
  const int64_t* label;  // [N], nullptr = 0; rows of other labels are left out
  int64_t label_stride;
  int64_t labels, features;  // G, F
  float *sums, *squares;     // [G, F]
  int64_t* counts;           // [G, F]
  int64_t* rows;             // [G]
};

namespace cpu {

// Deterministic for any splitting by `parallel_for` (nullptr = serial): the entries of a feature
// are added in row order.
void code_sums(const CodeSumsParams& params, Isa isa, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace sidechain
