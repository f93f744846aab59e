// SPDX-License-Identifier: Apache-2.0
// tap_: capture the activations of a site and steer them in place, in one pass.
#pragma once

#include <cstdint>

#include "sidechain/dtype.h"
#include "sidechain/isa.h"
#include "sidechain/parallel.h"

namespace sidechain {

// A token mask [R | 1, T] of bool bytes; data = nullptr means every token. Strides in elements,
// row = 0 where one row serves all.
struct TokenMask {
  const uint8_t* data;
  int64_t row, token;
};

// Capture buffer: [slots, R, ...] with strides in elements and a contiguous last dim.
struct SumBuffer {
  float* data;  // [S, R, C], or nullptr
  int64_t slots, slot, row;
};
struct CountBuffer {
  float* data;  // [S, R], or nullptr
  int64_t slots, slot, row;
};
struct RingBuffer {
  void* data;  // [S, R, T, C], or nullptr
  Dtype dtype;
  int64_t slots, slot, row, token;
};

// All pointers lie on the device of x; strides count elements. Formulas:
// python/sidechain/ops/tap.py.
struct TapParams {
  void* x;  // [R, T, C], last dim contiguous
  Dtype dtype;
  int64_t rows, tokens, channels;
  int64_t x_row, x_token;

  const float* vectors;  // [V, S, C], last dim contiguous; nullptr = no steering
  int64_t vector_count, vector_slots;
  int64_t vector_stride, vector_slot_stride;
  const int64_t* steer_slot;  // [1], nullptr = 0
  const int32_t* index;       // [R], nullptr = 0
  int64_t index_stride;
  const float* strength;  // [R], nullptr = 0
  int64_t strength_stride;
  const float* removal;  // [R], nullptr = 0
  int64_t removal_stride;
  TokenMask steer_mask;
  bool renorm;

  SumBuffer sums, squares;
  CountBuffer counts;
  RingBuffer ring;
  const int64_t* capture_slot;  // [1], nullptr = 0
  TokenMask capture_mask;
};

namespace cpu {

// Deterministic for any splitting by `parallel_for` (nullptr = serial): work is cut into fixed
// token chunks whose partial sums are added in order. Sums accumulate in float32 over at most 32
// terms in sequence before they are folded. x must not overlap the capture buffers.
void tap(const TapParams& params, Isa isa, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace sidechain
