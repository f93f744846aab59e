// SPDX-License-Identifier: Apache-2.0
// Per-ISA entry of sae_edit_, called by csrc/cpu/sae_edit.cpp for one row.
#pragma once

#include "cpu/kernels/entry.h"
#include "sidechain/sae_edit.h"

namespace sidechain::cpu {

#define SIDECHAIN_DECLARE(ID, NAME)                                                         \
  namespace NAME {                                                                          \
  /* Adds the decoder rows of the entries, times their values, to row n. */                 \
  void edit_row(const SaeEditParams& p, int64_t n, const RowEntry* entries, int64_t count); \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
