// SPDX-License-Identifier: Apache-2.0
// The product of packed bytes, four rows by one panel of features, per instruction set. Included
// INSIDE an ISA namespace, after vec-inl.h.
//
// AVX2 multiplies 32 pairs of bytes an instruction, twice what 16-bit and four times what float32
// products do; the adds into 16 bits cost as much again, which is why sums are widened only once
// per group. Four rows by two vectors keep the eight 16-bit sums, two features and one broadcast in
// 16 registers; the 32-bit sums live in the first-level cache (4 x 1, 6 x 2, 3 x 3 and 4 x 3 tiles
// were measured and are not faster).

#if SIDECHAIN_ISA_LEVEL > 0
constexpr int kVectors = 2;
#if SIDECHAIN_ISA_LEVEL == 2
typedef __m512i Packed;
inline Packed load_packed(const void* p) { return _mm512_loadu_si512(p); }
inline Packed broadcast(int32_t four) { return _mm512_set1_epi32(four); }
inline Packed multiply_bytes(Packed a, Packed b) { return _mm512_maddubs_epi16(a, b); }
inline Packed add_words(Packed a, Packed b) { return _mm512_add_epi16(a, b); }
inline Packed widen_words(Packed a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
inline uint32_t not_below(F32 v, float limit) {
  return _mm512_cmp_ps_mask(bits_as<__m512>(v), _mm512_set1_ps(limit), _CMP_NLT_UQ);
}
#else
typedef __m256i Packed;
inline Packed load_packed(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline Packed broadcast(int32_t four) { return _mm256_set1_epi32(four); }
inline Packed multiply_bytes(Packed a, Packed b) { return _mm256_maddubs_epi16(a, b); }
inline Packed add_words(Packed a, Packed b) { return _mm256_add_epi16(a, b); }
inline Packed widen_words(Packed a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
inline uint32_t not_below(F32 v, float limit) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(bits_as<__m256>(v), _mm256_set1_ps(limit), _CMP_NLT_UQ)));
}
#endif
constexpr int kPanel = kVectors * kLanes;

// sums[row][vector] = start + <row, features>.
inline void multiply(const uint8_t* x, const int8_t* w, const int32_t* start, int64_t groups,
                     I32* sums) {
  for (int r = 0; r < kRowPanel; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r * kVectors + v] = bits_as<I32>(load_packed(start + v * kLanes));
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    Packed words[kRowPanel][kVectors];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Packed features[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) features[v] = load_packed(w + v * 4 * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRowPanel; ++r) {
        int32_t four;
        __builtin_memcpy(&four, x + 4 * r, 4);
        const Packed row = broadcast(four);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const Packed product = multiply_bytes(row, features[v]);
          words[r][v] = half == 0 ? product : add_words(words[r][v], product);
        }
      }
      x += 4 * kRowPanel;
      w += 4 * kPanel;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRowPanel; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[r * kVectors + v] += bits_as<I32>(widen_words(words[r][v]));
      }
    }
  }
}

#else
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;

inline uint32_t not_below(F32 v, float limit) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(!(v[i] < limit)) << i;
  return mask;
}

inline void multiply(const uint8_t* x, const int8_t* w, const int32_t* start, int64_t groups,
                     I32* sums) {
  for (int r = 0; r < kRowPanel; ++r) {
    for (int j = 0; j < kPanel; ++j) sums[r * kVectors + j / kLanes][j % kLanes] = start[j];
  }
  for (int64_t g = 0; g < 2 * groups; ++g) {
    for (int r = 0; r < kRowPanel; ++r) {
      for (int j = 0; j < kPanel; ++j) {
        int32_t sum = 0;
        for (int b = 0; b < 4; ++b) sum += x[4 * r + b] * w[4 * j + b];
        sums[r * kVectors + j / kLanes][j % kLanes] += sum;
      }
    }
    x += 4 * kRowPanel;
    w += 4 * kPanel;
  }
}
#endif
