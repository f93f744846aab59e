// SPDX-License-Identifier: Apache-2.0
// attention_tap: attention to one cached context per row, with its output captured.
#pragma once

#include <cstdint>

#include "sidechain/dtype.h"
#include "sidechain/isa.h"
#include "sidechain/tap.h"

namespace sidechain {

// Keys or values of all contexts [M, S, Hkv, D], last dim contiguous, strides in elements.
struct ContextBank {
  const void* data;
  int64_t context, token, head;
};

// All pointers lie in host memory; strides count elements. Formulas:
// python/sidechain/ops/attention_tap.py.
struct AttentionTapParams {
  void* out;      // [R, T, H, D] contiguous
  const void* q;  // [R, T, H, D], last dim contiguous
  Dtype dtype;    // of out, q, keys and values
  int64_t rows, tokens, heads, width;
  int64_t q_row, q_token, q_head;

  ContextBank keys, values;
  int64_t contexts, length, kv_heads;  // M, S, Hkv
  const int32_t* context_index;        // [R], nullptr = 0
  int64_t context_index_stride;
  TokenMask context_mask;  // [M, S]: context tokens that may be read
  float scale;

  SumBuffer sums, squares;  // [slots, R, H D]
  CountBuffer counts;
  RingBuffer ring;  // [slots, R, T, H D]
  const int64_t* capture_slot;
  TokenMask capture_mask;
};

namespace cpu {

// Deterministic for any splitting by `parallel_for` (nullptr = serial): every head of a row is cut
// into fixed token chunks whose partial sums are added in order. Accumulates in float32. `out`
// must not overlap anything else.
void attention_tap(const AttentionTapParams& params, Isa isa, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace sidechain
