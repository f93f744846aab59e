// SPDX-License-Identifier: Apache-2.0
// sae_edit_: move activations along the decoder rows of edited features, in place.
#pragma once

#include <cstdint>

#include "sidechain/codes.h"
#include "sidechain/dtype.h"
#include "sidechain/isa.h"
#include "sidechain/parallel.h"

namespace sidechain {

// x[n] += strength[n] sum (new - old) w_dec[indices], added up in float32 and rounded once. A row
// without a change that is not 0, with strength 0 or outside the mask is not written.
struct SaeEditParams {
  void* x;  // [N, d], last dim contiguous
  Dtype dtype;
  int64_t x_row;
  Codes codes;              // values = the new ones, nullptr = 0
  const float* values_old;  // layout of codes, nullptr = 0
  int64_t values_old_row;
  int64_t features, width;  // F, d
  const void* w_dec;        // [F, d], last dim contiguous
  Dtype w_dec_dtype;
  int64_t w_dec_row;
  const float* strength;  // [N], nullptr = 1
  int64_t strength_stride;
  const uint8_t* mask;  // [N] bool bytes, nullptr = all
  int64_t mask_stride;
};

namespace cpu {

// Deterministic for any splitting by `parallel_for` (nullptr = serial).
void sae_edit(const SaeEditParams& params, Isa isa, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace sidechain
