// SPDX-License-Identifier: Apache-2.0
// topk_encode: the active features of a dictionary for rows of activations, and their gradient.
#pragma once

#include <cstdint>

#include "sidechain/dtype.h"
#include "sidechain/isa.h"
#include "sidechain/parallel.h"

namespace sidechain {

// Rows of `width` contiguous elements, `row` elements apart.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t row;
};

// A vector with its stride in elements (0 repeats one element); data = nullptr where absent.
struct Vector {
  const void* data;
  Dtype dtype;
  int64_t stride;
};

enum class TopkMode { kRows, kBatch, kThreshold };
// Numbered as in the schema, whose 1 (bfloat16) gains nothing on the CPU and has no kernel there.
enum class TopkPrecision { kFloat32 = 0, kInt8 = 2 };

// Formulas: python/sidechain/ops/topk_encode.py.
struct TopkEncodeParams {
  Rows x;              // [N, d]
  Rows w_enc;          // [F, d]
  Vector b_enc;        // [F]
  Vector b_pre;        // [d]
  Vector threshold;    // [F], kThreshold only
  const float* guess;  // [N] or, with guess_stride = 0, [1]; nullptr = none
  int64_t guess_stride;
  int64_t rows, width, features, k;  // 1 <= k <= F but in kThreshold
  TopkMode mode;
  TopkPrecision precision;
};

// Sparse codes of either form; `offsets` is nullptr for the fixed form of k slots a row.
struct TopkBackwardParams {
  Rows x, w_enc;
  Vector b_pre;
  const float* grad;       // [N, k] or [nnz]
  const int32_t* indices;  // like grad; -1 is skipped
  const int64_t* offsets;  // [N + 1]
  int64_t rows, width, features, k;
  float* dx;  // [N, d], or nullptr
  float* dw;  // [F, d], or nullptr
  float* db;  // [F]
};

namespace cpu {

// Hands out where to write `count` values and indices.
using Allocate = void (*)(int64_t count, float** values, int32_t** indices, void* context);

// Every function is deterministic for any splitting by `parallel_for` (nullptr = serial).

// kRows: values and indices [N, k], all written. Returns the number of rows that were computed in
// full because the screen could not decide them.
int64_t topk_encode(const TopkEncodeParams& params, Isa isa, ParallelFor parallel_for,
                    float* values, int32_t* indices);

// kBatch and kThreshold: writes offsets [N + 1], asks once for memory, writes the codes. Returns
// the same number.
int64_t topk_encode_ragged(const TopkEncodeParams& params, Isa isa, ParallelFor parallel_for,
                           int64_t* offsets, Allocate allocate, void* context);

// Writes all of the outputs. Sums run in float32 in the order of the rows, or of the codes of one.
void topk_encode_backward(const TopkBackwardParams& params, Isa isa, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace sidechain
