// SPDX-License-Identifier: Apache-2.0
// sparse_decode: decode sparse codes, forward, backward, and with the loss in the same read.
#pragma once

#include <cstdint>

#include "sidechain/codes.h"
#include "sidechain/dtype.h"
#include "sidechain/isa.h"
#include "sidechain/parallel.h"

namespace sidechain {

// A read-only matrix with a contiguous last dim; stride in elements.
struct Matrix {
  const void* data;  // [rows, d]
  Dtype dtype;
  int64_t row;
};

// Formulas: python/sidechain/ops/sparse_decode.py. x_hat = b_dec + sum values w_dec[indices].
struct DecodeParams {
  Codes codes;
  int64_t features, width;  // F, d
  Matrix w_dec;             // [F, d]
  const float* b_dec;       // [d], nullptr = 0
  float* out;               // [N, d] contiguous: x_hat, or x_hat - target
  bool compare;             // with the target; else decode only, and what follows is unused
  Matrix target;            // [N, d]
  const float* row_weight;  // [N], nullptr = 1; factor of dvalues
  float* loss;              // [N] |x_hat - target|^2
  float* dvalues;           // [N, K] or [nnz] contiguous; 0 where an entry stands for nothing
};

// Gradients of sum <grad, x_hat>.
struct DecodeBackwardParams {
  Codes codes;
  int64_t features, width;  // F, d
  Matrix w_dec;             // [F, d]
  const float* grad;        // [N, d], last dim contiguous
  int64_t grad_row;
  float* dvalues;  // as in DecodeParams, or nullptr
  void* dw_dec;    // [F, d] contiguous, dtype of w_dec, or nullptr; every row is written
};

namespace cpu {

// Both are deterministic for any splitting by `parallel_for` (nullptr = serial) and accumulate in
// float32, entries of a row (of a feature for dw_dec) in storage order.
void sparse_decode(const DecodeParams& params, Isa isa, ParallelFor parallel_for);
void sparse_decode_backward(const DecodeBackwardParams& params, Isa isa, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace sidechain
