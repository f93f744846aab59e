// SPDX-License-Identifier: Apache-2.0
// Per-ISA entry of code_sums_, called by csrc/cpu/encode_reduce.cpp for a range of features.
#pragma once

#include "sidechain/encode_reduce.h"

namespace sidechain::cpu {

#define SIDECHAIN_DECLARE(ID, NAME)                                    \
  namespace NAME {                                                     \
  /* Adds the entries of features [begin, end), in row order. */       \
  void sum_codes(const CodeSumsParams& p, int64_t begin, int64_t end); \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
