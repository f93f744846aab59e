// SPDX-License-Identifier: Apache-2.0
// Per-ISA entry of tap_, called by csrc/cpu/tap.cpp for one row and one chunk of tokens.
#pragma once

#include "sidechain/tap.h"

namespace sidechain::cpu {

// What one row needs, with slots and indices already resolved.
struct TapRow {
  const float* v;  // [C], nullptr = this row is not steered
  float a, b;
  void* ring;  // [T, C], nullptr = no copy
};

// Rows are padded to this many floats in the partial sums, the widest vector of any ISA.
constexpr int64_t kLanePadding = 16;

#define SIDECHAIN_DECLARE(ID, NAME)                                                                \
  namespace NAME {                                                                                 \
  /* Steers tokens [begin, end) of `row` and copies them to the ring; with `partial` not null      \
     overwrites it with their sums [padded C] and sums of squares [padded C]. */                   \
  void tap_tokens(const TapParams& p, const TapRow& plan, int64_t row, int64_t begin, int64_t end, \
                  float* partial, int64_t padded);                                                 \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
