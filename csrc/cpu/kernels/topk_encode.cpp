// SPDX-License-Identifier: Apache-2.0
// Loop bodies of topk_encode, compiled once per instruction set.
#include "cpu/kernels/topk_encode.h"

#include <cstdint>
#if SIDECHAIN_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {
namespace {

// clang-format off: each uses those before it.
#include "cpu/kernels/vec-inl.h"
#include "cpu/kernels/topk_screen-inl.h"
#include "cpu/kernels/topk_codes-inl.h"
#include "cpu/kernels/topk_rows-inl.h"
// clang-format on

// Groups of one pass over the rows of a block: their features take 12 KB of the first-level cache
// with AVX2, 24 KB with AVX-512.
constexpr int64_t kDepth = 48;

// Steps below this would overflow when inverted; nothing distinguishes such elements from zero.
constexpr float kLeastStep = 1e-20f;

// Writes the features of a panel whose screened value, in units of the row's step, is not below the
// limit of the row; returns how many rows have any.
template <bool kOutliers>
int64_t collect(const ScreenRows& screened, const FeaturePanel& panel, const I32* sums,
                const float* limit, const Found& out) {
  // Copies that the stores below cannot change: their pointers stay in registers.
  const ScreenRows rows = screened;
  const Found found = out;
  float* z = found.z;
  F32 step[kVectors], bias[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    step[v] = load(panel.step + v * kLanes);
    bias[v] = load(panel.bias + v * kLanes);
  }
  const int64_t count = rows.panels * kRowPanel;
  const uint64_t real = panel.count < kPanel ? (uint64_t{1} << panel.count) - 1 : ~uint64_t{0};
  int64_t hits = 0;
  for (int64_t row = 0; row < count; ++row) {
    const float inverse = rows.inverse[row], most = limit[row];
    F32 value[kVectors];
    uint32_t reached[kVectors], mask = 0;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      F32 rest = bias[v];
      if constexpr (kOutliers) {
        const float* x = rows.outliers + row * rows.outlier_count;
        for (int64_t j = 0; j < rows.outlier_count; ++j) {
          rest += x[j] * load(panel.outliers + j * kPanel + v * kLanes);
        }
      }
      value[v] = __builtin_convertvector(sums[row * kVectors + v], F32) * step[v] + rest * inverse;
      reached[v] = not_below(value[v], most) & static_cast<uint32_t>(real >> (v * kLanes));
      mask |= reached[v] << (v * kLanes);
    }
    if (mask == 0) continue;
    found.row[hits] = static_cast<int32_t>(row);
    found.mask[hits++] = mask;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) z = append(reached[v], value[v] * rows.step[row], z);
  }
  return hits;
}

}  // namespace

int64_t feature_panel() { return kPanel; }

void load_row(const void* from, Dtype dtype, int64_t n, const float* minus, float* to) {
  with_type(from, dtype, [&](const auto* typed) { load_typed(typed, n, minus, to); });
}

Quantised quantise_row(const float* v, int64_t n, int64_t salt, uint8_t* codes) {
  const Size size = size_of(v, n);
  if (!(size.norm2 < __builtin_inff())) {
    zero_codes(n, kZero, 4 * kRowPanel, codes);
    return {kLeastStep, __builtin_inff(), 0};
  }
  float step = size.largest / kZero;
  step = step > kLeastStep ? step : kLeastStep;
  write_codes(v, n, salt, step, kZero, 2 * kZero, 0, 4 * kRowPanel, codes);
  return {step, size.norm2, 0};
}

Quantised quantise_feature(const float* v, int64_t n, int64_t salt, int8_t* codes) {
  const Size size = size_of(v, n);
  auto* bytes = reinterpret_cast<uint8_t*>(codes);
  if (!(size.norm2 < __builtin_inff())) {
    zero_codes(n, 0, 4 * kPanel, bytes);
    return {0.0f, __builtin_inff(), 0};
  }
  float step = size.largest / 127.0f;
  const float by_sums = least_feature_step(v, n);
  step = step > by_sums ? step : by_sums;
  step = step > kLeastStep ? step : kLeastStep;
  const int32_t sum = write_codes(v, n, salt, step, 128, 255, 128, 4 * kPanel, bytes);
  return {step, size.norm2, -kZero * sum};
}

int64_t screen(const ScreenRows& rows, const FeaturePanel& panel, const Found& found) {
  float limit[kMostRows];
  for (int64_t i = 0; i < rows.panels * kRowPanel; ++i) {
    const float error =
        rows.confidence * __builtin_sqrtf(panel.norm2 + panel.step2 * rows.reach[i]);
    const float slack =
        panel.slack + 2.0f * kRounding * rows.outlier_length[i] * panel.outlier_length;
    limit[i] = (rows.cut[i] - slack) * rows.inverse[i] - error;
    found.error[i] = error * rows.step[i] + slack;
  }
  I32 sums[kMostRows * kVectors];
  // The next panel is fetched into the second-level cache while this one is used.
  const int64_t share = kGroup * kPanel / rows.panels;
  const int8_t* ahead = panel.codes + rows.groups * kGroup * kPanel;
  for (int64_t done = 0; done < rows.groups; done += kDepth) {
    const int64_t groups = rows.groups - done < kDepth ? rows.groups - done : kDepth;
    for (int64_t p = 0; p < rows.panels; ++p, ahead += groups * share) {
      const uint8_t* codes = rows.codes + (p * rows.groups + done) * kGroup * kRowPanel;
      multiply(codes, panel.codes + done * kGroup * kPanel, groups, {ahead, share},
               done == 0 ? panel.start : nullptr, sums + p * kRowPanel * kVectors);
    }
  }
  return rows.outlier_count > 0 ? collect<true>(rows, panel, sums, limit, found)
                                : collect<false>(rows, panel, sums, limit, found);
}

void exact(const float* w, const float* x, int64_t x_row, const int32_t* which, int64_t count,
           int64_t n, const void* next, double* out) {
  for (; count >= 4; count -= 4, which += 4, out += 4, next = w) {
    exact_rows<4>(w, next, x, x_row, which, n, out);
  }
  switch (count) {
    case 3:
      return exact_rows<3>(w, next, x, x_row, which, n, out);
    case 2:
      return exact_rows<2>(w, next, x, x_row, which, n, out);
    case 1:
      return exact_rows<1>(w, next, x, x_row, which, n, out);
    default:
      return;
  }
}

// Finds its bits from the top: the largest number that at least k numbers reach. Counting takes two
// instructions for a vector of numbers; once exactly k are left, the smallest of them is the
// answer. (On Zen 4 0.44 us for the 30 to 100 candidates of a row; std::nth_element takes 1.7 us,
// because its branches cannot be predicted.)
uint32_t kth_largest(const uint32_t* numbers, int64_t n, int64_t k) {
  uint32_t least = 0;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    const uint32_t raised = least | bit;
    const int64_t reached = count_from(numbers, n, raised);
    least = reached < k ? least : raised;
    if (reached == k) return smallest_from(numbers, n, raised);
  }
  return least;
}

void sum_rows(const Rows& rows, const Term* terms, int64_t count, int64_t n, const float* minus,
              float* out) {
  with_type(rows.data, rows.dtype,
            [&](const auto* typed) { sum_typed(typed, rows.row, terms, count, minus, n, out); });
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
