// SPDX-License-Identifier: Apache-2.0
// The steps from rows to codes, in the order in which topk_encode takes them (README.md).
#pragma once

#include <vector>

#include "cpu/topk/screened_rows.h"

namespace sidechain::cpu {

// What is looked for in a set of rows: the k largest values of each row, or, joint, of all rows
// together. k = 0: every value that reaches the cut.
struct Rank {
  int64_t k;
  bool joint;
};

// What the cuts of rows start from: 0, which hides nothing, or a number that the exact values have
// to confirm.
enum class Start { kZero, kEstimate };

// Screens all features; the cuts rise to the values that `rank` asks for, each lowered by `share`
// of its error.
void screen(ScreenedRows& set, const Rank& rank, float share);

// Shares of its error by which the k-th largest screened value is lowered: to be hardly ever above
// the exact one of its row, and to be about as large. (The errors are proven for every pair and
// eleven standard deviations wide.)
constexpr float kSafeShare = 0.3f;
constexpr float kLikelyShare = 0.02f;

// The share for a cut that the exact values will have to confirm.
inline float estimated_share(const TopkCall& call) { return call.certified() ? kSafeShare : 1.0f; }

// Where the cuts of all rows may start, measured on a few of them: a little below their least k-th
// value, as a share of |x|, or as a value where the rank is joint; 0 if nothing is known.
float estimate_start(const PackedFeatures& packed, const Activations& x);

// Screens the rows, values what may belong to the result and moves the lists of the decided rows to
// `lists`, which has one for each row of x. Returns the other rows.
std::vector<int32_t> prove(ScreenedRows& set, Start start, std::vector<List>& lists);

// Screens all rows of x, from an estimate first where there is one. Returns the rows that no screen
// could decide.
std::vector<int32_t> search(const PackedFeatures& packed, const Activations& x,
                            std::vector<List>& lists);

// Replaces the screened values of slots [from[i], to[i]) of each row's list by exact ones. Grouped
// by feature: each row of w_enc is read once.
void value(ScreenedRows& set, const std::vector<int64_t>& from, const std::vector<int64_t>& to);

// Every positive value of rows `ids` of x becomes a candidate.
void value_in_full(const Features& features, const Activations& x, const std::vector<int32_t>& ids,
                   std::vector<List>& lists);

// Reduces exact candidates to what the call keeps: best first, or, in the ragged modes, by
// ascending feature.
void select(const Features& features, std::vector<List>& lists);

}  // namespace sidechain::cpu
