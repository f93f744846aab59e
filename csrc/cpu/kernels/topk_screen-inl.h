// SPDX-License-Identifier: Apache-2.0
// The product of packed bytes, six rows by one panel of features, per instruction set. Included
// INSIDE an ISA namespace, after vec-inl.h.
//
// AVX2 multiplies 32 pairs of bytes an instruction, twice what 16-bit and four times what float32
// products do; adding them in 16 bits costs as much again, so sums are widened only once a group.
// Two vectors of twelve 16-bit sums, two of features and two of products fill the 16 registers; the
// 32-bit sums live in the first-level cache.

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

#if SIDECHAIN_ISA_LEVEL == 1
alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// One step of a group: two vectors of features by six rows of four elements, at x and w. Written
// in assembly because GCC 12 hoists the broadcasts, spills the products and loses a third of the
// speed (92 against 150 G multiply-adds a second at 3.2 GHz, all operands in the first-level
// cache).
template <int kStep>
__attribute__((always_inline)) inline void multiply_step(const uint8_t* x, const int8_t* w,
                                                         Packed (&words)[kRowPanel][2]) {
  const Packed low = load_packed(w + kStep * 64);
  const Packed high = load_packed(w + kStep * 64 + 32);
#pragma GCC unroll 6
  for (int r = 0; r < kRowPanel; ++r) {
    Packed row, product;
    if constexpr (kStep == 0) {
      asm volatile(
          "vpbroadcastd %[x], %[row]\n\t"
          "vpmaddubsw %[low], %[row], %[sum0]\n\t"
          "vpmaddubsw %[high], %[row], %[sum1]"
          : [row] "=&x"(row), [sum0] "=&x"(words[r][0]), [sum1] "=&x"(words[r][1])
          : [x] "m"(*reinterpret_cast<const int32_t(*)>(x + (kStep * kRowPanel + r) * 4)),
            [low] "x"(low), [high] "x"(high));
    } else {
      asm volatile(
          "vpbroadcastd %[x], %[row]\n\t"
          "vpmaddubsw %[low], %[row], %[product]\n\t"
          "vpmaddubsw %[high], %[row], %[row]\n\t"
          "vpaddw %[product], %[sum0], %[sum0]\n\t"
          "vpaddw %[row], %[sum1], %[sum1]"
          : [row] "=&x"(row), [product] "=&x"(product), [sum0] "+x"(words[r][0]),
            [sum1] "+x"(words[r][1])
          : [x] "m"(*reinterpret_cast<const int32_t(*)>(x + (kStep * kRowPanel + r) * 4)),
            [low] "x"(low), [high] "x"(high));
    }
  }
}

inline void multiply_group(const uint8_t* x, const int8_t* w, I32* sums) {
  Packed words[kRowPanel][2];
  multiply_step<0>(x, w, words);
  multiply_step<1>(x, w, words);
  multiply_step<2>(x, w, words);
  multiply_step<3>(x, w, words);
#pragma GCC unroll 12
  for (int i = 0; i < 2 * kRowPanel; ++i) {
    asm volatile(
        "vpmaddwd %[ones], %[words], %[words]\n\t"
        "vpaddd %[sum], %[words], %[words]\n\t"
        "vmovdqa %[words], %[sum]"
        : [words] "+x"(words[i / 2][i % 2]), [sum] "+m"(sums[i])
        : [ones] "m"(kOnes));
  }
}
#else
inline void multiply_group(const uint8_t* x, const int8_t* w, I32* sums) {
  Packed words[kRowPanel][kVectors];
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    Packed features[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      features[v] = load_packed(w + step * 4 * kPanel + v * 4 * kLanes);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRowPanel; ++r) {
      int32_t four;
      __builtin_memcpy(&four, x + (step * kRowPanel + r) * 4, 4);
      const Packed row = broadcast(four);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Packed product = multiply_bytes(row, features[v]);
        words[r][v] = step == 0 ? product : add_words(words[r][v], product);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kVectors * kRowPanel; ++i) {
    sums[i] += bits_as<I32>(widen_words(words[i / kVectors][i % kVectors]));
  }
}
#endif

// sums[row][vector] += <row, features> over `groups`.
__attribute__((noinline)) void multiply(const uint8_t* x, const int8_t* w, int64_t groups,
                                        I32* sums) {
  for (int64_t g = 0; g < groups; ++g) {
    multiply_group(x, w, sums);
    x += kGroup * kRowPanel;
    w += kGroup * kPanel;
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

inline void multiply(const uint8_t* x, const int8_t* w, int64_t groups, I32* sums) {
  for (int64_t g = 0; g < groups * kGroup / 4; ++g) {
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
