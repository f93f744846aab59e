// SPDX-License-Identifier: Apache-2.0
// Per-ISA entries of attention_tap, called by csrc/cpu/attention_tap.cpp.
#pragma once

#include "sidechain/attention_tap.h"

namespace sidechain::cpu {

// Queries that share every load of a key or a value.
constexpr int64_t kQueries = 6;
// Floats that the widest vector of any ISA holds: what lengths are padded to.
constexpr int64_t kAttentionPadding = 16;

static inline int64_t padded(int64_t n) {
  return (n + kAttentionPadding - 1) / kAttentionPadding * kAttentionPadding;
}

// The readable tokens of one context and head, in float32.
struct PackedContext {
  float* keys;    // panels of a few vectors of tokens, [D, tokens of the panel] each; padded(S) D
  float* values;  // [length, padded(D)], zero beyond D
  int64_t length;
};

// What one head of one row needs, with slots already resolved.
struct AttentionHead {
  int64_t row, head;
  const PackedContext* context;  // nullptr = the output is zero
  void* ring;                    // [T, D] of this head, nullptr = no copy
  float* scratch;                // kQueries * (2 padded(D) + padded(S))
  float* partial;                // sums [padded(D)] and squares of a chunk, nullptr = not summed
};

#define SIDECHAIN_DECLARE(ID, NAME)                                                             \
  namespace NAME {                                                                              \
  /* Gathers the tokens of a context that its mask lets through. */                             \
  void pack_context(const AttentionTapParams& p, int64_t context, int64_t kv_head,              \
                    PackedContext* to);                                                         \
  /* Attends with tokens [begin, end), writes and copies them; overwrites `partial`. */         \
  void attend(const AttentionTapParams& p, const AttentionHead& h, int64_t begin, int64_t end); \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
