// SPDX-License-Identifier: Apache-2.0
// Vectors of kLanes floats and conversions to and from half types, written once with compiler
// vector types. Included INSIDE an ISA namespace, so that no function compiled with wide
// instructions can be the copy that the linker keeps for everybody.

#if SIDECHAIN_ISA_LEVEL == 2
constexpr int kLanes = 16;
#elif SIDECHAIN_ISA_LEVEL == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Minus zero changes no value, signed zeros included, which lets the compiler drop it.
inline F32 splat(float value) { return value - F32{}; }

inline U32 select(I32 mask, U32 yes, U32 no) { return mask ? yes : no; }

inline F32 widen(F32 v) { return v; }

// GCC 12 splits conversions between vectors of 2- and 4-byte integers in halves: intrinsics
// instead.
#if SIDECHAIN_ISA_LEVEL == 2
inline U32 widen_u16(U16 h) {
  return bits_as<U32>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(h)));
}
inline U16 narrow_u32(U32 u) {
  return bits_as<U16>(_mm512_maskz_cvtepi32_epi16(0xffff, bits_as<__m512i>(u)));
}
#elif SIDECHAIN_ISA_LEVEL == 1
inline U32 widen_u16(U16 h) { return bits_as<U32>(_mm256_cvtepu16_epi32(bits_as<__m128i>(h))); }
// Values below 2^16: the saturation of the pack never acts.
inline U16 narrow_u32(U32 u) {
  const __m256i lanes = bits_as<__m256i>(u);
  const __m256i packed = _mm256_packus_epi32(lanes, lanes);
  return bits_as<U16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#else
inline U32 widen_u16(U16 h) { return __builtin_convertvector(h, U32); }
inline U16 narrow_u32(U32 u) { return __builtin_convertvector(u, U16); }
#endif

// bfloat16 is the upper half of float32.
inline F32 widen_bf16(U16 h) { return bits_as<F32>(widen_u16(h) << 16); }

inline U16 narrow_bf16(F32 f) {
  const U32 u = bits_as<U32>(f);
  const U32 rounded = u + (0x7fffu + ((u >> 16) & 1u));  // to nearest, ties to even
  const I32 nan = f != f;
  return narrow_u32(select(nan, U32{} + 0x7fc00000u, rounded) >> 16);
}

#if SIDECHAIN_ISA_LEVEL == 2
// The zero-masking forms: GCC 12 warns about the undefined pass-through operand of the plain ones.
inline F32 widen_f16(U16 h) {
  return bits_as<F32>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(h)));
}
inline U16 narrow_f16(F32 f) {
  return bits_as<U16>(_mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(f), _MM_FROUND_TO_NEAREST_INT));
}
#elif SIDECHAIN_ISA_LEVEL == 1
inline F32 widen_f16(U16 h) { return bits_as<F32>(_mm256_cvtph_ps(bits_as<__m128i>(h))); }
inline U16 narrow_f16(F32 f) {
  return bits_as<U16>(_mm256_cvtps_ph(bits_as<__m256>(f), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline F32 widen_f16(U16 h) {
  const U32 u = widen_u16(h);
  const U32 magnitude = (u & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent and normalises subnormal halves in one step.
  const U32 scaled = bits_as<U32>(bits_as<F32>(magnitude) * 0x1p112f);
  const I32 special = (u & 0x7c00u) == 0x7c00u;  // infinity or NaN
  return bits_as<F32>(select(special, magnitude | 0x7f800000u, scaled) | ((u & 0x8000u) << 16));
}

inline U16 narrow_f16(F32 f) {
  const U32 u = bits_as<U32>(f);
  const U32 magnitude = u & 0x7fffffffu;
  // Adding 0.5 leaves the rounded subnormal half in the low mantissa bits.
  const U32 small = bits_as<U32>(bits_as<F32>(magnitude) + 0.5f) - 0x3f000000u;
  const U32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U32 large = select(magnitude > 0x7f800000u, U32{} + 0x7e00u, U32{} + 0x7c00u);
  U32 r = select(magnitude < 0x38800000u, small, normal);
  r = select(magnitude >= 0x47800000u, large, r);
  return narrow_u32(r | ((u >> 16) & 0x8000u));
}
#endif

inline F32 load(const float* p) {
  F32 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline F32 load(const Half* p) {
  U16 h;
  __builtin_memcpy(&h, p, sizeof(h));
  return widen_f16(h);
}
inline F32 load(const BFloat* p) {
  U16 h;
  __builtin_memcpy(&h, p, sizeof(h));
  return widen_bf16(h);
}

inline void store(float* p, F32 v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline void store(Half* p, F32 v) {
  const U16 h = narrow_f16(v);
  __builtin_memcpy(p, &h, sizeof(h));
}
inline void store(BFloat* p, F32 v) {
  const U16 h = narrow_bf16(v);
  __builtin_memcpy(p, &h, sizeof(h));
}

// The last n < kLanes elements of a row, zero beyond them.
template <class T>
inline F32 load_tail(const T* p, int64_t n) {
  T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
template <class T>
inline void store_tail(T* p, F32 v, int64_t n) {
  T padded[kLanes];
  store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

// Pairwise over the lanes.
inline float sum_lanes(F32 v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}
