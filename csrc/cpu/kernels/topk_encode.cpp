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
// clang-format on

// Groups of one pass over the rows of a block: their features take 12 KB of the first-level cache
// with AVX2, 24 KB with AVX-512.
constexpr int64_t kDepth = 48;

// Steps below this would overflow when inverted; nothing distinguishes such elements from zero.
constexpr float kLeastStep = 1e-20f;

// R rows at once, which share the loads of w and fetch those at `next`; the sums of a row do not
// depend on R. (Widening w to float64 once for all rows is no quicker: most features have few.)
template <int R>
void exact_rows(const float* w, const void* next, const float* x, int64_t x_row,
                const int32_t* which, int64_t n, double* out) {
  typedef double Doubles __attribute__((vector_size(4 * kLanes)));
  typedef float Halves __attribute__((vector_size(2 * kLanes)));
  constexpr int kStep = kLanes / 2;
  static_assert(kGroup % (2 * kStep) == 0, "rows hold whole steps");
  const auto widened = [](const float* from) {
    Halves value;
    __builtin_memcpy(&value, from, sizeof(value));
    return __builtin_convertvector(value, Doubles);
  };
  const float* row[R];
  for (int i = 0; i < R; ++i) row[i] = x + which[i] * x_row;
  Doubles sum[R][2] = {};
  for (int64_t group = 0; group < n; group += kGroup) {
    __builtin_prefetch(static_cast<const float*>(next) + group, 0, 2);
#pragma GCC unroll 8
    for (int step = 0; step < kGroup / kStep; ++step) {
      const int64_t c = group + step * kStep;
      const Doubles weight = widened(w + c);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) sum[i][step % 2] += widened(row[i] + c) * weight;
    }
  }
  for (int i = 0; i < R; ++i) {
    const Doubles both = sum[i][0] + sum[i][1];
    out[i] = 0.0;
    for (int lane = 0; lane < kStep; ++lane) out[i] += both[lane];
  }
}

// Writes what of a panel has a screened value, in units of the row's step, not below the limit of
// the row; returns how many rows have any.
template <bool kAparts>
int64_t collect(const ScreenRows& screened, const FeaturePanel& panel, const I32* sums,
                const float* limit, const Found& out) {
  // Copies, which the stores below cannot change: their pointers stay in registers.
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
      if constexpr (kAparts) {
        for (int64_t j = 0; j < rows.aparts; ++j) {
          rest += rows.apart[row * rows.aparts + j] * load(panel.apart + j * kPanel + v * kLanes);
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

template <bool kRound>
inline F32 prepared(F32 v) {
  return kRound ? widen_bf16(narrow_bf16(v)) : v;
}

template <class T, bool kRound>
void load_typed(const T* from, int64_t n, const float* minus, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    F32 v = load(from + c);
    if (minus != nullptr) v -= load(minus + c);
    store(to + c, prepared<kRound>(v));
  }
  if (c < n) {
    F32 v = load_tail(from + c, n - c);
    if (minus != nullptr) v -= load_tail(minus + c, n - c);
    store_tail(to + c, prepared<kRound>(v), n - c);
  }
}

// V vectors of columns at once, which stay in registers over all rows.
template <class T, bool kRound, int V, bool kTail>
void sum_columns(const Rows& rows, const int32_t* which, const float* scale, int64_t count,
                 const float* minus, int64_t c, int64_t n, float* out) {
  const T* data = static_cast<const T*>(rows.data) + c;
  F32 sum[V] = {}, less[V] = {};
  if (minus != nullptr) {
    for (int v = 0; v < V; ++v) {
      less[v] = kTail ? load_tail(minus + c, n - c) : load(minus + c + v * kLanes);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* row = data + which[i] * rows.row;
    for (int v = 0; v < V; ++v) {
      const F32 value = kTail ? load_tail(row, n - c) : load(row + v * kLanes);
      sum[v] += scale[i] * prepared<kRound>(value - less[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    if (kTail) {
      store_tail(out + c, sum[v], n - c);
    } else {
      store(out + c + v * kLanes, sum[v]);
    }
  }
}

template <class T, bool kRound>
void sum_typed(const Rows& rows, const int32_t* which, const float* scale, int64_t count,
               const float* minus, int64_t n, float* out) {
  int64_t c = 0;
  for (; c + 8 * kLanes <= n; c += 8 * kLanes) {
    sum_columns<T, kRound, 8, false>(rows, which, scale, count, minus, c, n, out);
  }
  for (; c + kLanes <= n; c += kLanes) {
    sum_columns<T, kRound, 1, false>(rows, which, scale, count, minus, c, n, out);
  }
  if (c < n) sum_columns<T, kRound, 1, true>(rows, which, scale, count, minus, c, n, out);
}

inline U32 load_numbers(const uint32_t* p) {
  U32 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

int64_t count_from(const uint32_t* numbers, int64_t n, uint32_t least) {
  U32 counts = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    counts -= bits_as<U32>(load_numbers(numbers + i) >= least);  // a lane that holds is -1
  }
  int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += counts[lane];
  return count;
}

uint32_t smallest_from(const uint32_t* numbers, int64_t n, uint32_t least) {
  U32 most = U32{} - 1;
  for (int64_t i = 0; i < n; i += kLanes) {
    const U32 v = load_numbers(numbers + i);
    const U32 above = v < least ? U32{} - 1 : v;
    most = above < most ? above : most;
  }
  uint32_t found = most[0];
  for (int lane = 1; lane < kLanes; ++lane) found = most[lane] < found ? most[lane] : found;
  return found;
}

}  // namespace

int64_t feature_panel() { return kPanel; }

void load_row(const void* from, Dtype dtype, int64_t n, const float* minus, bool bf16, float* to) {
  switch (dtype) {
    case Dtype::kFloat32: {
      const auto* p = static_cast<const float*>(from);
      return bf16 ? load_typed<float, true>(p, n, minus, to)
                  : load_typed<float, false>(p, n, minus, to);
    }
    case Dtype::kFloat16: {
      const auto* p = static_cast<const Half*>(from);
      return bf16 ? load_typed<Half, true>(p, n, minus, to)
                  : load_typed<Half, false>(p, n, minus, to);
    }
    case Dtype::kBFloat16: {
      const auto* p = static_cast<const BFloat*>(from);
      return bf16 ? load_typed<BFloat, true>(p, n, minus, to)
                  : load_typed<BFloat, false>(p, n, minus, to);
    }
  }
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
    const float slack = panel.slack + 2.0f * kRounding * rows.apart_length[i] * panel.apart_length;
    limit[i] = (rows.cut[i] - slack) * rows.inverse[i] - error;
    found.error[i] = error * rows.step[i] + slack;
  }
  I32 sums[kMostRows * kVectors];
  // The panel after this one is on its way to the second-level cache while this one is used.
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
  return rows.aparts > 0 ? collect<true>(rows, panel, sums, limit, found)
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

// Its bits from the top: it is the largest number that k are not below. Counting costs a vector of
// numbers two instructions; once just k are left, the smallest of them is it. (On Zen 4 0.44 us for
// the 30 to 100 candidates of a row, std::nth_element 1.7 us: its branches nobody predicts.)
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

void sum_rows(const Rows& rows, const int32_t* which, const float* scale, int64_t count, int64_t n,
              const float* minus, bool bf16, float* out) {
  switch (rows.dtype) {
    case Dtype::kFloat32:
      return bf16 ? sum_typed<float, true>(rows, which, scale, count, minus, n, out)
                  : sum_typed<float, false>(rows, which, scale, count, minus, n, out);
    case Dtype::kFloat16:
      return bf16 ? sum_typed<Half, true>(rows, which, scale, count, minus, n, out)
                  : sum_typed<Half, false>(rows, which, scale, count, minus, n, out);
    case Dtype::kBFloat16:
      return bf16 ? sum_typed<BFloat, true>(rows, which, scale, count, minus, n, out)
                  : sum_typed<BFloat, false>(rows, which, scale, count, minus, n, out);
  }
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
