// SPDX-License-Identifier: Apache-2.0
// Per-ISA entries of topk_encode: quantise and pack, screen in 8 bits, value exactly, sum rows.
//
// A row x is stored as x ~ p * (a - zero) with unsigned bytes a, a feature as w ~ q * b with signed
// bytes b. Products of bytes are added in 32 bits, or, where the instruction set has no such
// product (AVX2), first in 16 bits over the eight elements that share a lane: there `zero` is
// smaller, and `quantise_feature` picks q so that the 16 bits never overflow. The error bound is in
// cpu/topk/README.md.
#pragma once

#include "sidechain/topk_encode.h"

namespace sidechain::cpu {

constexpr int64_t kRowPanel = 6;    // rows that share each load of packed features
constexpr int64_t kGroup = 16;      // unit of a row: what meets in one 16-bit sum, in two lanes
constexpr int64_t kMostRows = 96;   // rows of one call of `screen`
constexpr int64_t kMostLanes = 16;  // 32-bit lanes of the widest vectors

// Elements of a row that stay float32: few, so large in most rows that they would cost the codes
// their bits.
constexpr int64_t kMostOutliers = 16;
// Share of a float32 sum of at most kMostOutliers products, a bias or a cut that rounding may
// change.
constexpr float kRounding = 1e-6f;

struct Candidate {
  float z;
  int32_t feature;
  float error;  // how far the exact value may lie from a screened z
};
// The candidates that the screen finds in a panel of features: rows that have any, ascending, and
// which features.
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
  int32_t first;          // index of the first feature
  int32_t count;          // features that exist, at most the panel
  float norm2, step2;     // largest |w|^2 and q^2
  float slack;            // what rounding of the biases may cost
  const float* outliers;  // weights at the outliers [ScreenRows::outlier_count][panel]
  float outlier_length;   // largest |those of a feature|
};

// Rows in panels of kRowPanel, packed [width / 4][kRowPanel][4]; the arrays are indexed by row.
struct ScreenRows {
  const uint8_t* codes;
  int64_t panels;
  int64_t groups;         // padded width / kGroup
  const float* step;      // p
  const float* inverse;   // 1 / p
  const float* reach;     // (|x'| / p)^2
  const float* cut;       // what z + error must reach
  float confidence;       // c
  const float* outliers;  // [rows, outlier_count]
  const float* outlier_length;
  int64_t outlier_count;
};

// Of a sum of rows.
struct Term {
  int32_t row;
  float scale;
};

#define SIDECHAIN_DECLARE(ID, NAME)                                                                \
  namespace NAME {                                                                                 \
  /* Features of one packed panel. */                                                              \
  int64_t feature_panel();                                                                         \
  /* n elements to float32, less `minus` where not null. */                                        \
  void load_row(const void* from, Dtype dtype, int64_t n, const float* minus, float* to);          \
  /* Codes of 4 elements every 4 * kRowPanel bytes; `salt` < 0 rounds to nearest. */               \
  Quantised quantise_row(const float* v, int64_t n, int64_t salt, uint8_t* codes);                 \
  /* Codes of 4 elements every 4 * feature_panel() bytes. */                                       \
  Quantised quantise_feature(const float* v, int64_t n, int64_t salt, int8_t* codes);              \
  /* Writes the candidates that may reach the cut of their row, at worst all features; returns     \
     how many rows have any. */                                                                    \
  int64_t screen(const ScreenRows& rows, const FeaturePanel& panel, const Found& found);           \
  /* out[i] = <w, x + which[i] * x_row> summed in float64; the n * 4 bytes at `next` are fetched   \
     on the way. */                                                                                \
  void exact(const float* w, const float* x, int64_t x_row, const int32_t* which, int64_t count,   \
             int64_t n, const void* next, double* out);                                            \
  /* The k-th largest of n >= k numbers, n whole multiples of kMostLanes. */                       \
  uint32_t kth_largest(const uint32_t* numbers, int64_t n, int64_t k);                             \
  /* out = sum_i terms[i].scale * (row terms[i].row, less `minus` where not null). */              \
  void sum_rows(const Rows& rows, const Term* terms, int64_t count, int64_t n, const float* minus, \
                float* out);                                                                       \
  }
SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_DECLARE)
#undef SIDECHAIN_DECLARE

}  // namespace sidechain::cpu
