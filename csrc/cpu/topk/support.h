// SPDX-License-Identifier: Apache-2.0
// What the steps of topk_encode share: kernels, loops over threads, the order of values, lists.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/kernels/topk_encode.h"

namespace sidechain::cpu {

// The entries of one instruction set.
struct TopkKernels {
  decltype(&baseline::feature_panel) feature_panel;
  decltype(&baseline::load_row) load_row;
  decltype(&baseline::quantise_row) quantise_row;
  decltype(&baseline::quantise_feature) quantise_feature;
  decltype(&baseline::screen) screen;
  decltype(&baseline::exact) exact;
  decltype(&baseline::kth_largest) kth_largest;
  decltype(&baseline::sum_rows) sum_rows;
};

inline TopkKernels topk_kernels(Isa isa) {
  switch (isa) {
#define SIDECHAIN_CASE(ID, NAME)                                                             \
  case Isa::ID:                                                                              \
    return {NAME::feature_panel, NAME::load_row, NAME::quantise_row, NAME::quantise_feature, \
            NAME::screen,        NAME::exact,    NAME::kth_largest,  NAME::sum_rows};
    SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_CASE)
#undef SIDECHAIN_CASE
    default:
      return topk_kernels(Isa::kBaseline);
  }
}

// One call, which every step reads.
struct TopkCall {
  const TopkEncodeParams& p;
  TopkKernels kernels;
  ParallelFor parallel_for;

  // Whether the screen has to prove its result.
  bool certified() const { return p.precision != TopkPrecision::kInt8; }
};

// Runs body(begin, end) over [0, n).
template <class F>
void parallel(ParallelFor parallel_for, int64_t n, int64_t grain, const F& body) {
  if (n == 0) return;
  if (parallel_for == nullptr) return body(0, n);
  const auto call = [](int64_t begin, int64_t end, void* f) {
    (*static_cast<const F*>(f))(begin, end);
  };
  parallel_for(n, grain, call, const_cast<F*>(&body));
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline const void* row_of(const Rows& rows, int64_t i) {
  const int64_t size = rows.dtype == Dtype::kFloat32 ? 4 : 2;
  return static_cast<const char*>(rows.data) + i * rows.row * size;
}

// Elements as float32; empty where absent.
inline std::vector<float> floats(const Vector& v, int64_t n, const TopkKernels& kernels) {
  std::vector<float> out(v.data == nullptr ? 0 : n);
  for (size_t i = 0; i < out.size(); ++i) {
    kernels.load_row(row_of({v.data, v.dtype, v.stride}, i), v.dtype, 1, nullptr, &out[i]);
  }
  return out;
}

// Order of values: NaN above infinity above numbers; nothing below zero counts.
inline uint32_t order_of(float z) {
  if (z != z) return 0xffffffffu;
  if (!(z > 0.0f)) return 0;
  uint32_t bits;
  std::memcpy(&bits, &z, sizeof(bits));
  return bits;
}
inline float value_of(uint32_t order) {
  float z;
  std::memcpy(&z, &order, sizeof(z));
  return z;
}

// The cut that a value of this order allows: what lies below it stays below after rounding.
inline float cut_at(uint32_t order) {
  const float z = value_of(order);
  return z == z ? z - kRounding * z : std::numeric_limits<float>::infinity();
}

// The k-th largest of `orders`, 0 if there are fewer; appends zeros.
inline uint32_t kth_largest(const TopkKernels& kernels, std::vector<uint32_t>& orders, int64_t k) {
  if (static_cast<int64_t>(orders.size()) < k) return 0;
  orders.resize(round_up(orders.size(), kMostLanes), 0);
  return kernels.kth_largest(orders.data(), orders.size(), k);
}

using List = std::vector<Candidate>;

// Entries in lists of their features: those of feature f are start[f] to start[f + 1].
template <class Entry>
struct ByFeature {
  std::vector<int64_t> start;  // [F + 1]
  std::vector<Entry> entries;
};

// `visit` calls what it is given with (feature, entry) for every entry; it runs twice. The entries
// of a feature keep the order of the visit.
template <class Entry, class Visit>
ByFeature<Entry> group_by_feature(int64_t features, const Visit& visit) {
  ByFeature<Entry> out;
  out.start.assign(features + 1, 0);
  visit([&](int64_t feature, const Entry&) { ++out.start[feature + 1]; });
  std::partial_sum(out.start.begin(), out.start.end(), out.start.begin());
  out.entries.resize(out.start.back());
  std::vector<int64_t> next(out.start.begin(), out.start.end() - 1);
  visit([&](int64_t feature, const Entry& entry) { out.entries[next[feature]++] = entry; });
  return out;
}

}  // namespace sidechain::cpu
