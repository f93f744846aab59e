// SPDX-License-Identifier: Apache-2.0
// Per-ISA entry of moments, called by csrc/cpu/rows.cpp.
#pragma once

#include "sidechain/isa.h"
#include "sidechain/rows.h"

namespace sidechain::cpu {

#define SIDECHAIN_DECLARE(ID, NAME)                                                \
  namespace NAME {                                                                 \
  /* Takes in rows [begin, end); `scratch` is (end - begin) * padded floats. */    \
  void moments_chunk(MomentsParams& p, int64_t begin, int64_t end, int64_t padded, \
                     float* scratch);                                              \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
