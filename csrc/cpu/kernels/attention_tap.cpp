// SPDX-License-Identifier: Apache-2.0
// Loop bodies of attention_tap, compiled once per instruction set. Bound by multiply-adds: six
// queries share each load of a key or value vector, scores stay in the first-level cache.
#include "cpu/kernels/attention_tap.h"

#include <cstdint>
#if SIDECHAIN_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {
namespace {

#include "cpu/kernels/vec-inl.h"

// Vectors beside the six queries: their accumulators fill the registers of the ISA.
constexpr int kWide = SIDECHAIN_ISA_LEVEL == 2 ? 4 : 2;
constexpr int kPanel = kWide * kLanes;
constexpr int kGroup = static_cast<int>(kQueries);

inline int64_t rounded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline F32 larger(F32 a, F32 b) { return a > b ? a : b; }

inline float max_lanes(F32 v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

// 2^x for x <= 0 to 1.5 units in the last place; 0 below the normal numbers, NaN stays NaN.
inline F32 exp2_of(F32 x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer below
  const F32 clamped = x < -126.0f ? splat(-126.0f) : x;
  const F32 shifted = clamped + kMagic;
  const F32 f = clamped - (shifted - kMagic);  // [-0.5, 0.5]
  // Taylor series: ln(2)^n / n!, truncated below 2^-28.
  F32 y = splat(1.5252734e-5f);
  y = y * f + 1.5403530e-4f;
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  const F32 power = bits_as<F32>((bits_as<U32>(shifted) << 23) + 0x3f800000u);
  const F32 result = y * power;
  return x < -126.0f ? F32{} : result;
}

// to[i] = from[i] as floats, zero from n up to the next multiple of kLanes.
template <class T>
void widen_row(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load_tail(from + i, n - i));
}

// scores[i, 0..N) = <q[i], keys[0..N)> for six queries and N vectors of tokens.
template <int N>
void score_panel(const float* q, int64_t q_stride, const float* keys, int64_t width, float* scores,
                 int64_t stride) {
  F32 acc[kGroup][N];
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) {
    for (int n = 0; n < N; ++n) acc[i][n] = F32{};
  }
  for (int64_t d = 0; d < width; ++d) {
    F32 key[N];
    for (int n = 0; n < N; ++n) key[n] = load(keys + d * N * kLanes + n * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      const F32 by = splat(q[i * q_stride + d]);
      for (int n = 0; n < N; ++n) acc[i][n] += by * key[n];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) {
    for (int n = 0; n < N; ++n) store(scores + i * stride + n * kLanes, acc[i][n]);
  }
}

// out[i, 0..N) = scale[i] sum_s p[i, s] values[s, 0..N) for six queries and N vectors of channels.
template <int N>
void mix_panel(const float* p, int64_t stride, const float* values, int64_t value_stride,
               int64_t length, const float* scale, float* out) {
  F32 acc[kGroup][N];
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) {
    for (int n = 0; n < N; ++n) acc[i][n] = F32{};
  }
  for (int64_t s = 0; s < length; ++s) {
    F32 value[N];
    for (int n = 0; n < N; ++n) value[n] = load(values + s * value_stride + n * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      const F32 by = splat(p[i * stride + s]);
      for (int n = 0; n < N; ++n) acc[i][n] += by * value[n];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) {
    for (int n = 0; n < N; ++n) {
      store(out + i * value_stride + n * kLanes, acc[i][n] * splat(scale[i]));
    }
  }
}

// Calls kernel<N> for a run-time number of vectors 1 <= n <= kWide.
#define SIDECHAIN_PANELS(n, kernel, ...) \
  do {                                   \
    if (kWide == 4 && (n) == 4) {        \
      kernel<4>(__VA_ARGS__);            \
    } else if (kWide == 4 && (n) == 3) { \
      kernel<3>(__VA_ARGS__);            \
    } else if ((n) == 2) {               \
      kernel<2>(__VA_ARGS__);            \
    } else {                             \
      kernel<1>(__VA_ARGS__);            \
    }                                    \
  } while (0)

inline int64_t vectors_from(int64_t start, int64_t end) {
  const int64_t left = (end - start) / kLanes;
  return left < kWide ? left : kWide;
}

// Scores of one query to probabilities that are not divided by their sum; returns 1 / sum.
inline float soften(float* scores, int64_t length) {
  const int64_t end = rounded(length);
  for (int64_t s = length; s < end; ++s) scores[s] = -__builtin_inff();
  F32 top = load(scores);
  for (int64_t s = kLanes; s < end; s += kLanes) top = larger(top, load(scores + s));
  const F32 most = splat(max_lanes(top));
  F32 total = {};
  for (int64_t s = 0; s < end; s += kLanes) {
    const F32 p = exp2_of(load(scores + s) - most);
    store(scores + s, p);
    total += p;
  }
  return 1.0f / sum_lanes(total);
}

template <class To>
void store_row(To* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_tail(to + i, load(from + i), n - i);
}

void copy_to_ring(const AttentionTapParams& p, const AttentionHead& h, int64_t token,
                  const float* out) {
  const int64_t offset = token * p.ring.token;
  switch (p.ring.dtype) {
    case Dtype::kFloat32:
      return store_row(static_cast<float*>(h.ring) + offset, out, p.width);
    case Dtype::kFloat16:
      return store_row(static_cast<Half*>(h.ring) + offset, out, p.width);
    case Dtype::kBFloat16:
      return store_row(static_cast<BFloat*>(h.ring) + offset, out, p.width);
  }
}

inline bool holds(const TokenMask& mask, int64_t row, int64_t token) {
  return mask.data == nullptr || mask.data[row * mask.row + token * mask.token] != 0;
}

// Adds up to six rows of output to the sums of the chunk, row by row before the chunk.
void add_to_sums(const float* const* rows, int count, int64_t width, float* partial) {
  for (int64_t c = 0; c < width; c += kLanes) {
    F32 total = {}, squares = {};
    for (int i = 0; i < count; ++i) {
      const F32 value = load(rows[i] + c);
      total += value;
      squares += value * value;
    }
    store(partial + c, load(partial + c) + total);
    float* square = partial + padded(width) + c;
    store(square, load(square) + squares);
  }
}

// Output rows of up to six tokens [first, first + count): written, copied, summed.
template <class T>
void emit(const AttentionTapParams& p, const AttentionHead& h, int64_t first, int count,
          const float* out, int64_t out_stride) {
  const float* summed[kGroup];
  int captured = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t token = first + i;
    const float* row = out + i * out_stride;
    T* to = static_cast<T*>(p.out) + ((h.row * p.tokens + token) * p.heads + h.head) * p.width;
    store_row(to, row, p.width);
    if (!holds(p.capture_mask, h.row, token)) continue;
    if (h.ring != nullptr) copy_to_ring(p, h, token, row);
    summed[captured++] = row;
  }
  if (h.partial != nullptr) add_to_sums(summed, captured, p.width, h.partial);
}

template <class T>
void pack_typed(const AttentionTapParams& p, int64_t context, int64_t kv_head, PackedContext* to) {
  const T* keys =
      static_cast<const T*>(p.keys.data) + context * p.keys.context + kv_head * p.keys.head;
  const T* values =
      static_cast<const T*>(p.values.data) + context * p.values.context + kv_head * p.values.head;
  const int64_t value_stride = padded(p.width);
  int64_t length = 0;
  for (int64_t s = 0; s < p.length; ++s) {
    if (!holds(p.context_mask, context, s)) continue;
    // Keys wait in the rows of values until the number of tokens is known.
    widen_row(to->values + length * value_stride, keys + s * p.keys.token, p.width);
    ++length;
  }
  const int64_t end = rounded(length);
  for (int64_t start = 0; start < end; start += kPanel) {
    const int64_t tokens = vectors_from(start, end) * kLanes;
    float* panel = to->keys + start * p.width;
    for (int64_t s = 0; s < tokens; ++s) {
      const float* key = to->values + (start + s) * value_stride;
      const bool real = start + s < length;
      for (int64_t d = 0; d < p.width; ++d) panel[d * tokens + s] = real ? key[d] : 0.0f;
    }
  }
  length = 0;
  for (int64_t s = 0; s < p.length; ++s) {
    if (!holds(p.context_mask, context, s)) continue;
    widen_row(to->values + length * value_stride, values + s * p.values.token, p.width);
    ++length;
  }
  to->length = length;
}

template <class T>
void attend_typed(const AttentionTapParams& p, const AttentionHead& h, int64_t begin, int64_t end) {
  const int64_t stride = padded(p.width);
  const int64_t score_stride = padded(p.length);
  float* q = h.scratch;
  float* out = q + kQueries * stride;
  float* scores = out + kQueries * stride;
  if (h.partial != nullptr) {
    for (int64_t i = 0; i < 2 * stride; ++i) h.partial[i] = 0.0f;
  }
  for (int64_t i = 0; i < 2 * kQueries * stride; ++i) q[i] = 0.0f;  // q and out
  const T* base = static_cast<const T*>(p.q) + h.row * p.q_row + h.head * p.q_head;
  // exp2 instead of exp: the factor joins that of the scores.
  const F32 factor = splat(p.scale * 1.44269504088896341f);
  const int64_t length = h.context == nullptr ? 0 : h.context->length;
  const int64_t score_end = rounded(length);
  const int64_t width_end = rounded(p.width);
  for (int64_t t = begin; t < end; t += kQueries) {
    const int count = static_cast<int>(end - t < kQueries ? end - t : kQueries);
    if (length > 0) {
      // The last group is filled up with the queries of the group before it.
      for (int i = 0; i < count; ++i) {
        float* row = q + i * stride;
        widen_row(row, base + (t + i) * p.q_token, p.width);
        for (int64_t d = 0; d < width_end; d += kLanes) store(row + d, load(row + d) * factor);
      }
      for (int64_t s = 0; s < score_end; s += kPanel) {
        SIDECHAIN_PANELS(vectors_from(s, score_end), score_panel, q, stride,
                         h.context->keys + s * p.width, p.width, scores + s, score_stride);
      }
      float scale[kGroup];
      for (int i = 0; i < kGroup; ++i) scale[i] = soften(scores + i * score_stride, length);
      for (int64_t d = 0; d < width_end; d += kPanel) {
        SIDECHAIN_PANELS(vectors_from(d, width_end), mix_panel, scores, score_stride,
                         h.context->values + d, stride, length, scale, out + d);
      }
    }
    emit<T>(p, h, t, count, out, stride);
  }
}

}  // namespace

void pack_context(const AttentionTapParams& p, int64_t context, int64_t kv_head,
                  PackedContext* to) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return pack_typed<float>(p, context, kv_head, to);
    case Dtype::kFloat16:
      return pack_typed<Half>(p, context, kv_head, to);
    case Dtype::kBFloat16:
      return pack_typed<BFloat>(p, context, kv_head, to);
  }
}

void attend(const AttentionTapParams& p, const AttentionHead& h, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return attend_typed<float>(p, h, begin, end);
    case Dtype::kFloat16:
      return attend_typed<Half>(p, h, begin, end);
    case Dtype::kBFloat16:
      return attend_typed<BFloat>(p, h, begin, end);
  }
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
