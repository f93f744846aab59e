// SPDX-License-Identifier: Apache-2.0
// Per-ISA entry of permute, called by csrc/cpu/rows.cpp.
#pragma once

#include "sidechain/isa.h"
#include "sidechain/rows.h"

namespace sidechain::cpu {

constexpr int64_t kMostIndices = 8;  // 64-bit lanes of the widest vectors

#define SIDECHAIN_DECLARE(ID, NAME)                                                                \
  namespace NAME {                                                                                 \
  /* One pass of indices through the network of an order; both arrays hold `count` rounded up to   \
     kMostIndices. */                                                                              \
  void permute_once(const Order& order, const uint64_t* indices, int64_t count, uint64_t* passed); \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
