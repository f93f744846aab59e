// SPDX-License-Identifier: Apache-2.0
// Loop bodies of topk_encode, compiled once per instruction set.
#include "cpu/kernels/topk_encode.h"

#include <cstdint>
#if SIDECHAIN_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {
namespace {

// clang-format off: the second uses the first.
#include "cpu/kernels/vec-inl.h"
#include "cpu/kernels/topk_screen-inl.h"
// clang-format on

// Eight elements, the unit of quantisation, whatever the width of the instruction set.
typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint32_t Uint8 __attribute__((vector_size(32)));
static_assert(kGroup == 16, "a group fills two Float8");

inline Float8 load8(const float* p) {
  Float8 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline Float8 max8(Float8 a, Float8 b) { return a > b ? a : b; }
inline Float8 min8(Float8 a, Float8 b) { return a < b ? a : b; }
inline float largest(Float8 v) {
  float most = v[0];
  for (int i = 1; i < 8; ++i) most = v[i] > most ? v[i] : most;
  return most;
}
inline float total(Float8 v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// The sums of the elements that share a 16-bit lane, each twice.
inline Float8 lane_sums(Float8 v) {
  const Float8 halves = v + __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  return halves + __builtin_shufflevector(halves, halves, 1, 0, 3, 2, 5, 4, 7, 6);
}

// The coins of one row or feature: uniform numbers between 0 and 1 from a counter (the finalizer of
// MurmurHash3, two of 16 bits from each), or 1/2 for rounding to nearest.
struct Coins {
  uint32_t seed, twist;
  bool stochastic;

  explicit Coins(int64_t salt) : stochastic(salt >= 0) {
    uint64_t s = (static_cast<uint64_t>(salt) + 1) * 0x9e3779b97f4a7c15u;
    s = (s ^ (s >> 29)) * 0xbf58476d1ce4e5b9u;
    seed = static_cast<uint32_t>(s);
    twist = static_cast<uint32_t>(s >> 32);
  }
  void toss(int64_t group, Float8& low, Float8& high) const {
    if (!stochastic) {
      low = high = Float8{} + 0.5f;
      return;
    }
    const Uint8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    Uint8 h = (lane + 8 * static_cast<uint32_t>(group)) * 0x9e3779b1u + seed;
    h = (h ^ (h >> 16)) * 0x85ebca6bu + twist;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    h ^= h >> 16;
    low = uniform(h & 0xffffu);
    high = uniform(h >> 16);
  }
  static Float8 uniform(Uint8 bits) {
    return (__builtin_convertvector(bits_as<Int8>(bits), Float8) + 0.5f) * 0x1p-16f;
  }
};

// Values 0 to 255 as bytes, four to `even` and four to `odd`.
inline void store_bytes(Int8 v, void* even, void* odd) {
#if SIDECHAIN_ISA_LEVEL > 0
  const __m256i words = _mm256_packus_epi32(bits_as<__m256i>(v), bits_as<__m256i>(v));
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const int low = _mm_cvtsi128_si32(_mm256_castsi256_si128(bytes));
  const int high = _mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1));
  __builtin_memcpy(even, &low, 4);
  __builtin_memcpy(odd, &high, 4);
#else
  for (int i = 0; i < 4; ++i) {
    static_cast<uint8_t*>(even)[i] = static_cast<uint8_t>(v[i]);
    static_cast<uint8_t*>(odd)[i] = static_cast<uint8_t>(v[4 + i]);
  }
#endif
}

// Writes (v / step + zero) rounded by the coins, within [0, most], less `shift` as signed bytes.
inline int32_t write_codes(const float* v, int64_t n, int64_t salt, float step, float zero,
                           float most, int shift, int64_t stride, uint8_t* codes) {
  const Coins coins(salt);
  const float inverse = 1.0f / step;
  Int8 sums = {};
  for (int64_t i = 0; i < n; i += kGroup) {
    Float8 coin[2];
    coins.toss(i / kGroup, coin[0], coin[1]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Float8 y = load8(v + i + 8 * half) * inverse + (coin[half] + zero);
      y = min8(max8(y, Float8{}), Float8{} + most);
      const Int8 code = __builtin_convertvector(y, Int8) - shift;
      sums += code;
      uint8_t* to = codes + (i / 4 + 2 * half) * stride;
      store_bytes(code & 255, to, to + stride);
    }
  }
  int32_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += sums[i];
  return sum;
}

inline void zero_codes(int64_t n, int fill, int64_t stride, uint8_t* codes) {
  for (int64_t i = 0; i < n; i += 4) __builtin_memset(codes + i / 4 * stride, fill, 4);
}

// Groups of one pass over the rows of a block: their features take 12 KB of the first-level cache
// with AVX2, 24 KB with AVX-512.
constexpr int64_t kDepth = 48;

// Steps below this would overflow when inverted; nothing distinguishes such elements from zero.
constexpr float kLeastStep = 1e-20f;

// R rows at once, which share the loads of w; the sums of a row do not depend on R.
template <int R>
void exact_rows(const double* w, const float* x, int64_t x_row, const int32_t* which, int64_t n,
                double* out) {
  typedef double Doubles __attribute__((vector_size(4 * kLanes)));
  typedef float Halves __attribute__((vector_size(2 * kLanes)));
  constexpr int kStep = kLanes / 2;
  static_assert(kGroup % (2 * kStep) == 0, "rows hold whole steps");
  const float* row[R];
  for (int i = 0; i < R; ++i) row[i] = x + which[i] * x_row;
  Doubles sum[R][2] = {};
  for (int64_t c = 0; c < n; c += 2 * kStep) {
#pragma GCC unroll 2
    for (int chain = 0; chain < 2; ++chain) {
      Doubles weight;
      __builtin_memcpy(&weight, w + c + chain * kStep, sizeof(weight));
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        Halves value;
        __builtin_memcpy(&value, row[i] + c + chain * kStep, sizeof(value));
        sum[i][chain] += __builtin_convertvector(value, Doubles) * weight;
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    const Doubles both = sum[i][0] + sum[i][1];
    out[i] = 0.0;
    for (int lane = 0; lane < kStep; ++lane) out[i] += both[lane];
  }
}

// Writes the pairs of a panel whose screened value, in units of the row's step, is not below the
// limit of the row.
template <bool kAparts>
int64_t collect(const ScreenRows& rows, const FeaturePanel& panel, const I32* sums,
                const float* limit, Found* found) {
  F32 step[kVectors], bias[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    step[v] = load(panel.step + v * kLanes);
    bias[v] = load(panel.bias + v * kLanes);
  }
  const int64_t count = rows.panels * kRowPanel;
  const uint64_t real = panel.count < kPanel ? (uint64_t{1} << panel.count) - 1 : ~uint64_t{0};
  Found* next = found;
  for (int64_t row = 0; row < count; ++row) {
    const float inverse = rows.inverse[row], most = limit[row];
    F32 value[kVectors];
    uint64_t reached = 0;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      F32 rest = bias[v];
      if constexpr (kAparts) {
        for (int64_t j = 0; j < rows.aparts; ++j) {
          rest += rows.apart[row * rows.aparts + j] * load(panel.apart + j * kPanel + v * kLanes);
        }
      }
      value[v] = __builtin_convertvector(sums[row * kVectors + v], F32) * step[v] + rest * inverse;
      reached |= static_cast<uint64_t>(not_below(value[v], most)) << (v * kLanes);
    }
    reached &= real;
    if (reached == 0) continue;
    float z[kPanel];
    for (int v = 0; v < kVectors; ++v) store(z + v * kLanes, value[v] * rows.step[row]);
    for (; reached != 0; reached &= reached - 1) {
      const int at = __builtin_ctzll(reached);
      *next++ = {{z[at], panel.first + at}, static_cast<int32_t>(row)};
    }
  }
  return next - found;
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
  Float8 most = {}, squares = {};
  for (int64_t i = 0; i < n; i += 8) {
    const Float8 x = load8(v + i);
    most = max8(most, max8(x, -x));
    squares += x * x;
  }
  const float norm2 = total(squares);
  if (!(norm2 < __builtin_inff())) {
    zero_codes(n, kZero, 4 * kRowPanel, codes);
    return {kLeastStep, __builtin_inff(), 0};
  }
  float step = largest(most) / kZero;
  step = step > kLeastStep ? step : kLeastStep;
  const int32_t sum = write_codes(v, n, salt, step, kZero, 2 * kZero, 0, 4 * kRowPanel, codes);
  return {step, norm2, sum};
}

Quantised quantise_feature(const float* v, int64_t n, int64_t salt, int8_t* codes) {
  Float8 most = {}, squares = {}, lanes = {};
  for (int64_t i = 0; i < n; i += kGroup) {
    const Float8 w = load8(v + i), next = load8(v + i + 8);
    most = max8(most, max8(max8(w, -w), max8(next, -next)));
    squares += w * w + next * next;
    const Float8 above = max8(w, Float8{}) + max8(next, Float8{});
    const Float8 below = above - (w + next);
    lanes = max8(lanes, max8(lane_sums(above), lane_sums(below)));
  }
  const float norm2 = total(squares);
  auto* bytes = reinterpret_cast<uint8_t*>(codes);
  if (!(norm2 < __builtin_inff())) {
    zero_codes(n, 0, 4 * kPanel, bytes);
    return {0.0f, __builtin_inff(), 0};
  }
  // Eight elements times at most 2 kZero stay within 16 bits, each rounded up by one at most, with
  // a little for the rounding of the sums themselves.
  constexpr float kLaneSum = 32767.0f / (2 * kZero) - 8.5f;
  float step = largest(most) / 127.0f;
  const float by_lane = largest(lanes) / kLaneSum;
  step = step > by_lane ? step : by_lane;
  step = step > kLeastStep ? step : kLeastStep;
  const int32_t sum = write_codes(v, n, salt, step, 128.0f, 255.0f, 128, 4 * kPanel, bytes);
  return {step, norm2, sum};
}

int64_t screen(const ScreenRows& rows, const FeaturePanel& panel, Found* found) {
  float limit[kMostRows];
  for (int64_t i = 0; i < rows.panels * kRowPanel; ++i) {
    const float error =
        rows.confidence * __builtin_sqrtf(panel.norm2 + panel.step2 * rows.reach[i]);
    const float slack = panel.slack + 2.0f * kRounding * rows.apart_length[i] * panel.apart_length;
    limit[i] = (rows.cut[i] - slack) * rows.inverse[i] - error;
  }
  I32 sums[kMostRows * kVectors];
  for (int64_t i = 0; i < rows.panels * kRowPanel * kVectors; ++i) {
    __builtin_memcpy(&sums[i], panel.start + i % kVectors * kLanes, sizeof(I32));
  }
  // The panel after this one is on its way to the second-level cache while this one is used.
  const int64_t part = rows.groups * kGroup * kPanel / rows.panels;
  const int8_t* ahead = panel.codes + rows.groups * kGroup * kPanel;
  for (int64_t done = 0; done < rows.groups; done += kDepth) {
    const int64_t groups = rows.groups - done < kDepth ? rows.groups - done : kDepth;
    for (int64_t p = 0; p < rows.panels; ++p) {
      const uint8_t* codes = rows.codes + (p * rows.groups + done) * kGroup * kRowPanel;
      multiply(codes, panel.codes + done * kGroup * kPanel, groups,
               sums + p * kRowPanel * kVectors);
      if (done != 0) continue;
      for (int64_t b = p * part; b < (p + 1) * part; b += 64) __builtin_prefetch(ahead + b, 0, 2);
    }
  }
  return rows.aparts > 0 ? collect<true>(rows, panel, sums, limit, found)
                         : collect<false>(rows, panel, sums, limit, found);
}

void exact(const float* w, const float* x, int64_t x_row, const int32_t* which, int64_t count,
           int64_t n, double* wide, double* out) {
  for (int64_t c = 0; c < n; ++c) wide[c] = w[c];
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) exact_rows<4>(wide, x, x_row, which + i, n, out + i);
  switch (count - i) {
    case 3:
      return exact_rows<3>(wide, x, x_row, which + i, n, out + i);
    case 2:
      return exact_rows<2>(wide, x, x_row, which + i, n, out + i);
    case 1:
      return exact_rows<1>(wide, x, x_row, which + i, n, out + i);
    default:
      return;
  }
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
