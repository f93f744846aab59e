// SPDX-License-Identifier: Apache-2.0
// One row of Adam. Included INSIDE an ISA namespace, after vec-inl.h and rows-inl.h.

#if SIDECHAIN_ISA_LEVEL == 2
inline F32 sqrt_lanes(F32 v) {
  return bits_as<F32>(_mm512_maskz_sqrt_ps(0xffff, bits_as<__m512>(v)));
}
#elif SIDECHAIN_ISA_LEVEL == 1
inline F32 sqrt_lanes(F32 v) { return bits_as<F32>(_mm256_sqrt_ps(bits_as<__m256>(v))); }
#else
inline F32 sqrt_lanes(F32 v) {
  F32 root;
  for (int i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(v[i]);
  return root;
}
#endif

inline U32 lane_numbers() {
  U32 n;
  for (int i = 0; i < kLanes; ++i) n[i] = static_cast<uint32_t>(i);
  return n;
}

inline U32 mix_lanes(U32 x) {
  x = (x ^ (x >> 16)) * kMix1;
  x = (x ^ (x >> 15)) * kMix2;
  return x ^ (x >> 16);
}

// Adds the 16 random bits below the last bit kept, then cuts. Infinities stay as they are, because
// their low bits are 0; a NaN is kept from overflowing.
inline void store_rounded(BFloat* p, F32 v, U32 noise, int64_t n) {
  const I32 nan = v != v;
  const U16 h = narrow_u32(select(nan, U32{} + 0x7fc00000u, bits_as<U32>(v) + noise) >> 16);
  if (n >= kLanes) {
    __builtin_memcpy(p, &h, sizeof(h));
  } else {
    for (int64_t i = 0; i < n; ++i) p[i].bits = h[i];
  }
}
inline void store_rounded(float* p, F32 v, U32, int64_t n) { store_upto(p, v, n); }

template <class T>
constexpr bool kNarrow = sizeof(T) == 2;

// A row of a weight with its running statistics, and the gradient that moves it.
template <class M>
struct AdamRow {
  float* weight;
  M *mean, *square;
  const float* grad;
  int64_t width;
  float along;     // the gradient loses along * weight
  uint32_t noise;  // of this row
  float shift;     // b_pre += shift * weight as it was
  float* b_pre;    // nullptr = not wanted
};

// Returns the squares of the new weight, lane by lane.
template <class M, bool kShift>
F32 adam_row(const AdamRow<M>& row, const AdamStep& step) {
  // Copies, which the stores below cannot change: their numbers stay in registers.
  const AdamRow<M> r = row;
  const AdamStep a = step;
  F32 squares = {};
  // Rows of neighbours lie one behind the other: while this one is worked on, the same place of the
  // next is on its way, past the gathers that come between them.
  const int64_t ahead = r.width;
  for_vectors(0, r.width, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    __builtin_prefetch(r.weight + c + ahead, 1, 2);
    __builtin_prefetch(r.mean + c + ahead, 1, 2);
    __builtin_prefetch(r.square + c + ahead, 1, 2);
    const F32 weight = load_upto(r.weight + c, n);
    F32 g = load_upto(r.grad + c, n) - r.along * weight;
    g *= a.clip;
    if constexpr (kShift) {
      store_upto(r.b_pre + c, load_upto(r.b_pre + c, n) + r.shift * weight, n);
    }
    F32 mean = load_upto(r.mean + c, n);
    mean += a.rest1 * (g - mean);
    const F32 square = a.beta2 * load_upto(r.square + c, n) + a.rest2 * (g * g);
    const F32 denominator = sqrt_lanes(square) * a.correction + a.eps;
    const F32 moved = a.decay * weight - a.size * (mean / denominator);
    squares += moved * moved;
    store_upto(r.weight + c, moved, n);
    U32 noise = {};
    if constexpr (kNarrow<M>) {
      noise = mix_lanes(lane_numbers() + (r.noise + static_cast<uint32_t>(c)));
    }
    store_rounded(r.mean + c, mean, noise & 0xffffu, n);
    store_rounded(r.square + c, square, noise >> 16, n);
  });
  return squares;
}

// weight *= scale
inline void scale_row(float* weight, int64_t width, float scale) {
  for_vectors(0, width, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    store_upto(weight + c, scale * load_upto(weight + c, n), n);
  });
}
