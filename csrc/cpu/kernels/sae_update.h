// SPDX-License-Identifier: Apache-2.0
// Per-ISA entries of sae_update_, called by csrc/cpu/sae_update.cpp for a range of features.
#pragma once

#include "cpu/kernels/entry.h"
#include "sidechain/sae_update.h"

namespace sidechain::cpu {

// Entries of every feature, group by group.
struct FeatureLists {
  const CscEntry* entries[kMaxCodeGroups];
  const int32_t* start[kMaxCodeGroups];  // [F + 1]
};

// Numbers of Adam that are the same for all features.
struct AdamStep {
  float beta2, rest1, rest2;  // rest = 1 - beta
  float decay;                // 1 - lr weight_decay
  float size;                 // lr / (1 - beta1^step)
  float correction;           // 1 / sqrt(1 - beta2^step)
  float eps, clip;
  int64_t step;
  uint32_t noise;  // of this step, for stochastic rounding
};

// What a range of features writes to beside their rows.
struct FeatureScratch {
  float* row;     // [max(d_in, d_out)]
  float* b_pre;   // [d_in], accumulated into; nullptr = not wanted
  double square;  // accumulated into
};

// Permutes 32-bit words; `_mix` of python/sidechain/reference/sae_update.py.
constexpr uint32_t kMix1 = 0x7feb352du, kMix2 = 0x846ca68bu;
static inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * kMix1;
  x = (x ^ (x >> 15)) * kMix2;
  return x ^ (x >> 16);
}

#define SIDECHAIN_DECLARE(ID, NAME)                                                               \
  namespace NAME {                                                                                \
  /* Updates encoder rows and biases of features [begin, end). */                                 \
  void update_encoders(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& adam, \
                       int64_t begin, int64_t end, FeatureScratch& scratch);                      \
  /* Then their decoder rows, and notes which fired. */                                           \
  void update_decoders(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& adam, \
                       int64_t begin, int64_t end, FeatureScratch& scratch);                      \
  /* Adds the squares of their gradients to scratch.square and writes nothing else. */            \
  void square_features(const SaeGradientParams& p, const float* w_dec, const FeatureLists& lists, \
                       int64_t begin, int64_t end, FeatureScratch& scratch);                      \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
