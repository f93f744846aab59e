// SPDX-License-Identifier: Apache-2.0
// Loop body of tap_, compiled once per instruction set. Bound by memory: groups of four tokens are
// read once from memory, stay in the first-level cache between the two passes, and are written
// once.
#include "cpu/kernels/tap.h"

#include <cstdint>
#if SIDECHAIN_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {
namespace {

#include "cpu/kernels/vec-inl.h"

// Four tokens share each load of v and of the partial sums, and give the two dot products enough
// independent chains to hide the latency of fused multiply-add.
constexpr int kGroup = 4;

template <class T, int G>
struct Tokens {
  T* x[G];
};

// One pass over G tokens: <x, x> and <x, v> where kDots, and their sums into `partial` where
// kCapture.
template <class T, int G, bool kDots, bool kCapture>
void measure(const Tokens<T, G>& g, const float* v, int64_t channels, float* sums, float* squares,
             float* xx, float* xv) {
  constexpr int kUnroll = G == 1 ? 4 : 1;
  F32 dot_xx[G][kUnroll] = {};
  F32 dot_xv[G][kUnroll] = {};
  const auto step = [&](int64_t c, int u, int64_t tail) __attribute__((always_inline)) {
    F32 total = {}, total_square = {};
    F32 direction = {};
    if constexpr (kDots) direction = tail ? load_tail(v + c, tail) : load(v + c);
    for (int i = 0; i < G; ++i) {
      const F32 value = tail ? load_tail(g.x[i] + c, tail) : load(g.x[i] + c);
      if constexpr (kDots) {
        dot_xx[i][u] += value * value;
        dot_xv[i][u] += value * direction;
      }
      if constexpr (kCapture) {
        total += value;
        total_square += value * value;
      }
    }
    if constexpr (kCapture) {
      store(sums + c, load(sums + c) + total);
      store(squares + c, load(squares + c) + total_square);
    }
  };
  int64_t c = 0;
  for (; c + kLanes * kUnroll <= channels; c += kLanes * kUnroll) {
    for (int u = 0; u < kUnroll; ++u) step(c + u * kLanes, u, 0);
  }
  for (; c + kLanes <= channels; c += kLanes) step(c, 0, 0);
  if (c < channels) step(c, 0, channels - c);
  if constexpr (kDots) {
    for (int i = 0; i < G; ++i) {
      for (int u = 1; u < kUnroll; ++u) {
        dot_xx[i][0] += dot_xx[i][u];
        dot_xv[i][0] += dot_xv[i][u];
      }
      xx[i] = sum_lanes(dot_xx[i][0]);
      xv[i] = sum_lanes(dot_xv[i][0]);
    }
  }
}

// x <- (x + along * v) * scale for G tokens.
template <class T, int G, bool kScale>
void move(const Tokens<T, G>& g, const float* v, int64_t channels, const float* along,
          const float* scale) {
  F32 by[G], times[G];
  for (int i = 0; i < G; ++i) {
    by[i] = splat(along[i]);
    times[i] = splat(kScale ? scale[i] : 1.0f);
  }
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const F32 direction = load(v + c);
    for (int i = 0; i < G; ++i) {
      F32 y = load(g.x[i] + c) + by[i] * direction;
      if constexpr (kScale) y *= times[i];
      store(g.x[i] + c, y);
    }
  }
  if (c < channels) {
    const int64_t n = channels - c;
    const F32 direction = load_tail(v + c, n);
    for (int i = 0; i < G; ++i) {
      F32 y = load_tail(g.x[i] + c, n) + by[i] * direction;
      if constexpr (kScale) y *= times[i];
      store_tail(g.x[i] + c, y, n);
    }
  }
}

// |x + along * v|^2 from the elements themselves.
template <class T>
float norm_after(const T* x, const float* v, int64_t channels, float along) {
  F32 total = {};
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const F32 y = load(x + c) + along * load(v + c);
    total += y * y;
  }
  if (c < channels) {
    const int64_t n = channels - c;
    const F32 y = load_tail(x + c, n) + along * load_tail(v + c, n);
    total += y * y;
  }
  return sum_lanes(total);
}

// |x| / |y| with y = x + along * v; 1 where y = 0.
template <class T>
float renorm_scale(const T* x, const float* v, int64_t channels, float along, float xx, float xv,
                   float vv) {
  const float apart = xx + along * along * vv;
  float yy = apart + 2.0f * along * xv;
  // The expansion is free but cancels when y is much shorter than its parts (or is not finite).
  if (!(yy >= 0.5f * apart)) yy = norm_after(x, v, channels, along);
  return yy == 0.0f ? 1.0f : __builtin_sqrtf(xx) / __builtin_sqrtf(yy);
}

template <class To, class From>
void copy_row(To* to, const From* from, int64_t channels) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(to + c, load(from + c));
  if (c < channels) store_tail(to + c, load_tail(from + c, channels - c), channels - c);
}
template <class T>
void copy_row(T* to, const T* from, int64_t channels) {
  __builtin_memcpy(to, from, channels * sizeof(T));
}

template <class T>
void copy_to_ring(const TapParams& p, const TapRow& plan, int64_t token, const T* x) {
  const int64_t offset = token * p.ring.token;
  switch (p.ring.dtype) {
    case Dtype::kFloat32:
      return copy_row(static_cast<float*>(plan.ring) + offset, x, p.channels);
    case Dtype::kFloat16:
      return copy_row(static_cast<Half*>(plan.ring) + offset, x, p.channels);
    case Dtype::kBFloat16:
      return copy_row(static_cast<BFloat*>(plan.ring) + offset, x, p.channels);
  }
}

// G tokens that are all captured or all not, and all steered or all not.
template <class T, int G>
void tap_group(const TapParams& p, const TapRow& plan, const Tokens<T, G>& g, bool capture,
               bool steer, float vv, float* partial, int64_t padded) {
  float xx[G] = {}, xv[G] = {}, along[G], scale[G];
  const bool dots = steer && (p.renorm || plan.b != 0.0f);
  float* squares = partial + padded;
  if (dots && capture) {
    measure<T, G, true, true>(g, plan.v, p.channels, partial, squares, xx, xv);
  } else if (dots) {
    measure<T, G, true, false>(g, plan.v, p.channels, nullptr, nullptr, xx, xv);
  } else if (capture) {
    measure<T, G, false, true>(g, nullptr, p.channels, partial, squares, nullptr, nullptr);
  }
  if (!steer) return;
  for (int i = 0; i < G; ++i) {
    along[i] = plan.a;
    // Written so that a NaN projection stays NaN.
    if (plan.b != 0.0f) along[i] -= plan.b * (xv[i] < 0.0f ? 0.0f : xv[i]);
  }
  if (!p.renorm) {
    // One token after the other: one stream is what prefetchers follow. Steering [8, 1025, 1536]
    // alone takes a third less time so than four tokens side by side (Zen 4, AVX-512).
    for (int i = 0; i < G; ++i) {
      move<T, 1, false>({{g.x[i]}}, plan.v, p.channels, along + i, nullptr);
    }
    return;
  }
  for (int i = 0; i < G; ++i) {
    scale[i] = renorm_scale(g.x[i], plan.v, p.channels, along[i], xx[i], xv[i], vv);
  }
  move<T, G, true>(g, plan.v, p.channels, along, scale);
}

inline bool holds(const TokenMask& mask, int64_t row, int64_t token) {
  return mask.data == nullptr || mask.data[row * mask.row + token * mask.token] != 0;
}

template <class T>
void tap_typed(const TapParams& p, const TapRow& plan, int64_t row, int64_t begin, int64_t end,
               float* partial, int64_t padded) {
  T* base = static_cast<T*>(p.x) + row * p.x_row;
  if (partial != nullptr) {
    for (int64_t i = 0; i < 2 * padded; ++i) partial[i] = 0.0f;
  }
  float vv = 0.0f;
  if (plan.v != nullptr && p.renorm) vv = norm_after(plan.v, plan.v, p.channels, 0.0f);

  for (int64_t t = begin; t < end;) {
    const bool captured = holds(p.capture_mask, row, t);
    const bool steer = plan.v != nullptr && holds(p.steer_mask, row, t);
    int alike = 1;
    while (alike < kGroup && t + alike < end && holds(p.capture_mask, row, t + alike) == captured &&
           (plan.v != nullptr && holds(p.steer_mask, row, t + alike)) == steer) {
      ++alike;
    }
    if (captured && plan.ring != nullptr) {
      for (int i = 0; i < alike; ++i) copy_to_ring(p, plan, t + i, base + (t + i) * p.x_token);
    }
    const bool capture = captured && partial != nullptr;
    if (alike == kGroup) {
      Tokens<T, kGroup> g;
      for (int i = 0; i < kGroup; ++i) g.x[i] = base + (t + i) * p.x_token;
      tap_group(p, plan, g, capture, steer, vv, partial, padded);
    } else {
      for (int i = 0; i < alike; ++i) {
        const Tokens<T, 1> g = {{base + (t + i) * p.x_token}};
        tap_group(p, plan, g, capture, steer, vv, partial, padded);
      }
    }
    t += alike;
  }
}

}  // namespace

void tap_tokens(const TapParams& p, const TapRow& plan, int64_t row, int64_t begin, int64_t end,
                float* partial, int64_t padded) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return tap_typed<float>(p, plan, row, begin, end, partial, padded);
    case Dtype::kFloat16:
      return tap_typed<Half>(p, plan, row, begin, end, partial, padded);
    case Dtype::kBFloat16:
      return tap_typed<BFloat>(p, plan, row, begin, end, partial, padded);
  }
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
