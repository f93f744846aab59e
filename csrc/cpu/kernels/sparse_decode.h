// SPDX-License-Identifier: Apache-2.0
// Per-ISA entries of sparse_decode, called by csrc/cpu/sparse_decode.cpp.
#pragma once

#include "cpu/kernels/entry.h"
#include "sidechain/sparse_decode.h"

namespace sidechain::cpu {

#define SIDECHAIN_DECLARE(ID, NAME)                                                              \
  namespace NAME {                                                                               \
  /* Columns [begin, end) of row n: writes out; with a target adds to loss[n] and to the dvalues \
     of its entries. The same columns of the first `count` of the decoder rows that row n + 1    \
     names in `next` are fetched on the way. */                                                  \
  void decode_columns(const DecodeParams& p, int64_t n, int64_t begin, int64_t end,              \
                      const RowEntry* entries, int64_t count, const RowEntry* next,              \
                      int64_t next_count);                                                       \
  /* Fetches the columns of the decoder rows of entries. */                                      \
  void prefetch_columns(const DecodeParams& p, int64_t begin, int64_t end,                       \
                        const RowEntry* entries, int64_t count);                                 \
  /* dvalues of row n: products of its gradient with the decoder rows, columns [begin, end). */  \
  void decode_dvalues(const DecodeBackwardParams& p, int64_t n, int64_t begin, int64_t end,      \
                      const RowEntry* entries, int64_t count);                                   \
  /* Row `feature` of dw_dec from its list; `sum` is scratch of d floats. */                     \
  void decode_row_gradient(const DecodeBackwardParams& p, int64_t feature,                       \
                           const CscEntry* entries, int64_t count, float* sum);                  \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
