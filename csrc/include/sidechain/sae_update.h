// SPDX-License-Identifier: Apache-2.0
// sae_update_: gradients of a sparse autoencoder from its codes, projection, Adam and unit norm,
// one feature at a time, without gradient tensors.
#pragma once

#include <cstdint>

#include "sidechain/codes.h"
#include "sidechain/dtype.h"
#include "sidechain/isa.h"
#include "sidechain/parallel.h"

namespace sidechain {

constexpr int kMaxCodeGroups = 4;
constexpr int kMaxPrefixes = 16;

// One group of codes. An entry counts where its value is not 0 and its index, less first_feature,
// lies in [0, F).
struct CodeGroup {
  Codes codes;
  const float* dvalues;  // [N, K] or [nnz] float32
  int64_t dvalues_row;
  const float* error;  // [P, N, d_out], last dim contiguous
  int64_t error_level, error_row;
  const float* row_weight;  // [N], nullptr = 1; factor of the values, already in dvalues
};

// What the gradients are made of. Formulas: python/sidechain/ops/sae_update.py.
struct SaeGradientParams {
  int64_t rows, d_in, d_out, features;  // N, d_in, d_out, F
  const void* x;                        // [N, d_in], last dim contiguous
  Dtype x_dtype;
  int64_t x_row;
  const float* b_pre;  // [d_in], nullptr = 0
  CodeGroup groups[kMaxCodeGroups];
  int32_t group_count;
  // Feature f reads error level p of the first prefix with f < prefixes[p]; no prefixes: level 0.
  int32_t prefix_count;
  int64_t prefixes[kMaxPrefixes];
  int64_t first_feature;  // id of row 0
  bool project, bias;     // remove the gradient along w_dec; count b_enc in the sum of squares
};

// Weights and running statistics of Adam; matrices contiguous.
struct SaeState {
  float* w_enc;                    // [F, d_in]
  float* w_dec;                    // [F, d_out]
  float* b_enc;                    // [F], nullptr = none
  void *enc_mean, *enc_square;     // [F, d_in]
  void *dec_mean, *dec_square;     // [F, d_out]
  Dtype dtype;                     // of these: kFloat32 or kBFloat16 (stochastic rounding)
  float *bias_mean, *bias_square;  // [F], nullptr without b_enc
};

struct SaeUpdateParams {
  SaeGradientParams gradient;
  SaeState state;
  const float* lr;      // [1]
  const int64_t* step;  // [1], 1 for the first
  double beta1, beta2, eps, weight_decay;
  bool unit_norm;
  const float* clip_scale;  // [1], nullptr = 1
  int64_t* last_fired;      // [F], nullptr = not kept; of the first group
  float* b_pre_grad;        // [d_in], nullptr = none
};

namespace cpu {

// Bit for bit the same for any splitting by `parallel_for` (nullptr = serial): a feature is one
// piece of work, its entries are added group by group in row order, and sums over features are
// taken over pieces that depend on the data alone.
void sae_update(const SaeUpdateParams& params, Isa isa, ParallelFor parallel_for);

// Writes the sum of squares of the gradients to out[0]; w_dec [F, d_out] contiguous.
void sae_gradient_square(const SaeGradientParams& params, const float* w_dec, float* out, Isa isa,
                         ParallelFor parallel_for);

}  // namespace cpu
}  // namespace sidechain
