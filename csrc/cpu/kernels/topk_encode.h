// SPDX-License-Identifier: Apache-2.0
// Per-ISA entries of topk_encode: quantise and pack, screen in 8 bits, value exactly, sum rows.
//
// The screen. A row x is stored as x ~ p * (a - zero) with unsigned bytes a, a feature as
// w ~ q * b with signed bytes b. Products of bytes are added in 32 bits, or, where the instruction
// set has no such product (AVX2), first in 16 bits over the eight elements that share a lane: there
// `zero` is smaller and `quantise_feature` picks q so that the 16 bits never overflow. Rounding is
// stochastic, so the error of a dot product is a sum of independent terms of mean zero, each within
// a range of p |w_i| or q |a_i|, and by Hoeffding's inequality
//   P(z - screened z > c sqrt(p^2 |w|^2 + q^2 |x'|^2)) <= exp(-2 c^2)
// for every pair, whatever the data: the coins are the algorithm's own.
#pragma once

#include "sidechain/topk_encode.h"

namespace sidechain::cpu {

constexpr int64_t kRowPanel = 6;    // rows that share each load of packed features
constexpr int64_t kGroup = 16;      // unit of a row: what meets in one 16-bit sum, in two lanes
constexpr int64_t kMostRows = 96;   // rows of one call of `screen`
constexpr int64_t kMostLanes = 16;  // 32-bit lanes of the widest vectors

// Share of a float32 sum of at most kMostApart products, a bias or a cut that rounding may change.
constexpr float kRounding = 1e-6f;
constexpr int64_t kMostApart = 16;

struct Candidate {
  float z;
  int32_t feature;
  float error;  // how far the exact value may lie from a screened z
};
// What the screen lets pass of a panel of features: rows with any, ascending, and their features.
struct Found {
  int32_t* row;    // [rows]
  uint32_t* mask;  // [rows], of row row[i]: bit j stands for feature j of the panel
  float* z;        // one for each bit, in their order; [rows * panel + kFoundSlack]
  float* error;    // [rows]: how far any exact value of a row may lie from its screened one
};
constexpr int64_t kMostPanel = 32;   // features of a panel, the bits of a mask
constexpr int64_t kFoundSlack = 16;  // whole vectors are written

// Scales of a quantised row or feature.
struct Quantised {
  float step;     // p or q
  float norm2;    // |v|^2 before rounding; infinite where an element is not finite
  int32_t start;  // -zero * sum of the codes: what the sums of a feature begin with
};

// Packed features [kGroup-padded width / 4][panel][4] and their scales.
struct FeaturePanel {
  const int8_t* codes;
  const int32_t* start;  // of `Quantised`
  const float* step;     // q
  const float* bias;
  int32_t first;       // index of the first feature
  int32_t count;       // features that exist, at most the panel
  float norm2, step2;  // largest |w|^2 and q^2
  float slack;         // what rounding of the biases may cost
  const float* apart;  // weights of the elements kept apart [ScreenRows::aparts][panel]
  float apart_length;  // largest |those of a feature|
};

// Rows in panels of kRowPanel, packed [width / 4][kRowPanel][4]; the arrays are indexed by row.
struct ScreenRows {
  const uint8_t* codes;
  int64_t panels;
  int64_t groups;        // padded width / kGroup
  const float* step;     // p
  const float* inverse;  // 1 / p
  const float* reach;    // (|x'| / p)^2
  const float* cut;      // what z + error must reach
  float confidence;      // c
  // Elements kept apart: few, so large in most rows that they would cost the codes their bits.
  // Their products are float32.
  const float* apart;  // [rows, aparts]
  const float* apart_length;
  int64_t aparts;
};

#define SIDECHAIN_DECLARE(ID, NAME)                                                              \
  namespace NAME {                                                                               \
  /* Features of one packed panel. */                                                            \
  int64_t feature_panel();                                                                       \
  /* n elements to float32, less `minus` where not null, rounded to bfloat16 where asked. */     \
  void load_row(const void* from, Dtype dtype, int64_t n, const float* minus, bool bf16,         \
                float* to);                                                                      \
  /* Codes of 4 elements every 4 * kRowPanel bytes; `salt` < 0 rounds to nearest. */             \
  Quantised quantise_row(const float* v, int64_t n, int64_t salt, uint8_t* codes);               \
  /* Codes of 4 elements every 4 * feature_panel() bytes. */                                     \
  Quantised quantise_feature(const float* v, int64_t n, int64_t salt, int8_t* codes);            \
  /* Writes what may reach the cut of its row, in the worst case all of it; returns how many     \
     rows have any. */                                                                           \
  int64_t screen(const ScreenRows& rows, const FeaturePanel& panel, const Found& found);         \
  /* out[i] = <w, x + which[i] * x_row> summed in float64; the n * 4 bytes at `next` are fetched \
     on the way. */                                                                              \
  void exact(const float* w, const float* x, int64_t x_row, const int32_t* which, int64_t count, \
             int64_t n, const void* next, double* out);                                          \
  /* The k-th largest of n >= k numbers, n whole multiples of kMostLanes. */                     \
  uint32_t kth_largest(const uint32_t* numbers, int64_t n, int64_t k);                           \
  /* out = sum_i scale[i] * row which[i], each prepared as by load_row. */                       \
  void sum_rows(const Rows& rows, const int32_t* which, const float* scale, int64_t count,       \
                int64_t n, const float* minus, bool bf16, float* out);                           \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
