// SPDX-License-Identifier: Apache-2.0
// The product of packed bytes, six rows by one panel of features, per instruction set. Included
// INSIDE an ISA namespace, after vec-inl.h.
//
// AVX-512 VNNI adds four products of bytes to a 32-bit sum in one instruction: twelve vectors of
// sums stay in registers over all groups, and both operands use their eight bits.
//
// AVX2 multiplies 32 pairs of bytes in one instruction: twice as many as 16-bit products, four
// times as many as float32. Adding them in 16 bits costs as much again, so sums are widened only
// once a group. Two vectors of twelve 16-bit sums, two of features and two of products fill the 16
// registers; the 32-bit sums live in the first-level cache.

constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
static_assert(kLanes <= kFoundSlack, "what `append` writes");
static_assert(kPanel <= kMostPanel, "a mask has a bit for each feature");

// What `multiply` fetches meanwhile: `share` bytes from `from` on for every group.
struct Ahead {
  const int8_t* from;
  int64_t share;

  void fetch() {
    for (int64_t b = 0; b < share; b += 64) __builtin_prefetch(from + b, 0, 2);
    from += share;
  }
};

#if SIDECHAIN_ISA_LEVEL < 2
// Sets the sums of all rows of a panel to `start` [kPanel].
inline void set_all(const int32_t* start, I32* sums) {
  for (int i = 0; i < kRowPanel * kVectors; ++i) {
    __builtin_memcpy(&sums[i], start + i % kVectors * kLanes, sizeof(I32));
  }
}
#endif

#if SIDECHAIN_ISA_LEVEL == 2
// Codes of x run from 0 to 2 kZero.
constexpr int kZero = 127;

// The least step of a feature at which no sum overflows.
inline float least_feature_step(const float*, int64_t) { return 0.0f; }

inline uint32_t not_below(F32 v, float limit) {
  return _mm512_cmp_ps_mask(bits_as<__m512>(v), _mm512_set1_ps(limit), _CMP_NLT_UQ);
}

// Writes the lanes of a mask to z; returns the end of what was written.
inline float* append(uint32_t reached, F32 v, float* z) {
  _mm512_storeu_ps(z,
                   _mm512_maskz_compress_ps(static_cast<__mmask16>(reached), bits_as<__m512>(v)));
  return z + __builtin_popcount(reached);
}

// In assembly because GCC 12 copies the sums twice around its intrinsic.
inline void add_products(__m512i& sum, __m512i x, __m512i w) {
  asm("vpdpbusd %[w], %[x], %[sum]" : [sum] "+v"(sum) : [x] "v"(x), [w] "v"(w));
}

// sums[row][vector] += <row, features> over `groups`; the first time, with `start` [kPanel], the
// sums are set instead.
__attribute__((noinline)) void multiply(const uint8_t* x, const int8_t* w, int64_t groups,
                                        Ahead ahead, const int32_t* start, I32* sums) {
  __m512i sum[kRowPanel][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRowPanel * kVectors; ++i) {
    const void* from = sums + i;
    if (start != nullptr) from = start + i % kVectors * kLanes;
    sum[i / kVectors][i % kVectors] = _mm512_loadu_si512(from);
  }
  for (const int8_t* end = w + groups * kGroup * kPanel; w != end;) {
    ahead.fetch();
#pragma GCC unroll 4
    for (int four = 0; four < kGroup / 4; ++four) {
      const __m512i low = _mm512_load_si512(w), high = _mm512_load_si512(w + 64);
#pragma GCC unroll 6
      for (int r = 0; r < kRowPanel; ++r) {
        int32_t bytes;
        __builtin_memcpy(&bytes, x + 4 * r, 4);
        const __m512i row = _mm512_set1_epi32(bytes);
        add_products(sum[r][0], row, low);
        add_products(sum[r][1], row, high);
      }
      x += 4 * kRowPanel;
      w += 4 * kPanel;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRowPanel * kVectors; ++i) {
    sums[i] = bits_as<I32>(sum[i / kVectors][i % kVectors]);
  }
}

#elif SIDECHAIN_ISA_LEVEL == 1
// Codes of x run from 0 to 2 kZero. A larger kZero leaves fewer bits to w in the 16-bit sums: about
// 76 minimises the sum of both errors for normal data.
constexpr int kZero = 76;

// The sums of the elements that share a 16-bit lane, each twice.
inline F32 lane_sums(F32 v) {
  const F32 halves = v + __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  return halves + __builtin_shufflevector(halves, halves, 1, 0, 3, 2, 5, 4, 7, 6);
}

inline float least_feature_step(const float* v, int64_t n) {
  F32 lanes = {};
  for (int64_t i = 0; i < n; i += kGroup) {
    const F32 w = load(v + i), next = load(v + i + kLanes);
    const F32 above = (w > 0.0f ? w : F32{}) + (next > 0.0f ? next : F32{});
    const F32 sums = lane_sums(above), negative = lane_sums(above - (w + next));
    lanes = lanes > sums ? lanes : sums;
    lanes = lanes > negative ? lanes : negative;
  }
  float most = 0.0f;
  for (int i = 0; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  // Eight elements times at most 2 kZero stay within 16 bits, each rounded up by one at most, with
  // a little for the rounding of the sums themselves.
  return most / (32767.0f / (2 * kZero) - 8.5f);
}

typedef __m256i Packed;
inline Packed load_packed(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline uint32_t not_below(F32 v, float limit) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(bits_as<__m256>(v), _mm256_set1_ps(limit), _CMP_NLT_UQ)));
}

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

// sums[row][vector] += <row, features> over `groups`; the first time, with `start` [kPanel], the
// sums are set instead.
__attribute__((noinline)) void multiply(const uint8_t* x, const int8_t* w, int64_t groups,
                                        Ahead ahead, const int32_t* start, I32* sums) {
  if (start != nullptr) set_all(start, sums);
  for (int64_t g = 0; g < groups; ++g) {
    ahead.fetch();
    multiply_group(x, w, sums);
    x += kGroup * kRowPanel;
    w += kGroup * kPanel;
  }
}

#else
constexpr int kZero = 127;

inline float least_feature_step(const float*, int64_t) { return 0.0f; }

inline uint32_t not_below(F32 v, float limit) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(!(v[i] < limit)) << i;
  return mask;
}

inline void multiply(const uint8_t* x, const int8_t* w, int64_t groups, Ahead, const int32_t* start,
                     I32* sums) {
  if (start != nullptr) set_all(start, sums);
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

#if SIDECHAIN_ISA_LEVEL < 2
inline float* append(uint32_t reached, F32 v, float* z) {
  for (; reached != 0; reached &= reached - 1) *z++ = v[__builtin_ctz(reached)];
  return z;
}
#endif
