// SPDX-License-Identifier: Apache-2.0
// From float32 to packed bytes. Included INSIDE an ISA namespace, after vec-inl.h and
// topk_screen-inl.h.

// A vector of quantisation: 16 elements with AVX-512, 8 elsewhere, so that two fill a group.
constexpr int kWide = kLanes > 8 ? kLanes : 8;
typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef int32_t WideInt __attribute__((vector_size(4 * kWide)));
typedef uint32_t WideUint __attribute__((vector_size(4 * kWide)));
static_assert(kGroup % kWide == 0, "a group is whole vectors");

inline Wide load_wide(const float* p) {
  Wide v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// a > b ? a : b and a < b ? a : b, which GCC 12 does not turn into one instruction. It warns about
// the unmasked forms of AVX-512.
#if SIDECHAIN_ISA_LEVEL == 2
inline Wide larger(Wide a, Wide b) {
  return bits_as<Wide>(_mm512_maskz_max_ps(0xffff, bits_as<__m512>(a), bits_as<__m512>(b)));
}
inline Wide smaller(Wide a, Wide b) {
  return bits_as<Wide>(_mm512_maskz_min_ps(0xffff, bits_as<__m512>(a), bits_as<__m512>(b)));
}
inline WideInt larger(WideInt a, WideInt b) {
  return bits_as<WideInt>(_mm512_maskz_max_epi32(0xffff, bits_as<__m512i>(a), bits_as<__m512i>(b)));
}
inline WideInt smaller(WideInt a, WideInt b) {
  return bits_as<WideInt>(_mm512_maskz_min_epi32(0xffff, bits_as<__m512i>(a), bits_as<__m512i>(b)));
}
#elif SIDECHAIN_ISA_LEVEL == 1
inline Wide larger(Wide a, Wide b) {
  return bits_as<Wide>(_mm256_max_ps(bits_as<__m256>(a), bits_as<__m256>(b)));
}
inline Wide smaller(Wide a, Wide b) {
  return bits_as<Wide>(_mm256_min_ps(bits_as<__m256>(a), bits_as<__m256>(b)));
}
inline WideInt larger(WideInt a, WideInt b) {
  return bits_as<WideInt>(_mm256_max_epi32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
}
inline WideInt smaller(WideInt a, WideInt b) {
  return bits_as<WideInt>(_mm256_min_epi32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
}
#else
inline Wide larger(Wide a, Wide b) { return a > b ? a : b; }
inline Wide smaller(Wide a, Wide b) { return a < b ? a : b; }
inline WideInt larger(WideInt a, WideInt b) { return a > b ? a : b; }
inline WideInt smaller(WideInt a, WideInt b) { return a < b ? a : b; }
#endif

inline float largest(Wide v) {
  float most = v[0];
  for (int i = 1; i < kWide; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

inline float total(Wide v) {
  float sum = 0.0f;
  for (int i = 0; i < kWide; ++i) sum += v[i];
  return sum;
}

// What is added to each element of one row or feature before its lower 16 bits are cut off: random
// numbers of 16 bits for stochastic rounding, made from a counter (the finalizer of MurmurHash3,
// two from each), or one half for rounding to nearest.
struct RoundingBits {
  uint32_t seed, twist;
  bool stochastic;

  explicit RoundingBits(int64_t salt) : stochastic(salt >= 0) {
    uint64_t s = (static_cast<uint64_t>(salt) + 1) * 0x9e3779b97f4a7c15u;
    s = (s ^ (s >> 29)) * 0xbf58476d1ce4e5b9u;
    seed = static_cast<uint32_t>(s);
    twist = static_cast<uint32_t>(s >> 32);
  }
  // Those of pair number `pair` of vectors.
  void draw(int64_t pair, WideInt (&bits)[2]) const {
    if (!stochastic) {
      bits[0] = bits[1] = WideInt{} + 0x8000;
      return;
    }
    WideUint h;
    for (int i = 0; i < kWide; ++i) h[i] = static_cast<uint32_t>(i);
    h = (h + kWide * static_cast<uint32_t>(pair)) * 0x9e3779b1u + seed;
    h = (h ^ (h >> 16)) * 0x85ebca6bu + twist;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    h ^= h >> 16;
    bits[0] = bits_as<WideInt>(h & 0xffffu);
    bits[1] = bits_as<WideInt>(h >> 16);
  }
};

// The low bytes of v, four at a time every `stride` bytes.
inline void store_bytes(WideInt v, int64_t stride, uint8_t* to) {
#if SIDECHAIN_ISA_LEVEL == 2
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, bits_as<__m512i>(v));
  const int fours[] = {_mm_cvtsi128_si32(bytes), _mm_extract_epi32(bytes, 1),
                       _mm_extract_epi32(bytes, 2), _mm_extract_epi32(bytes, 3)};
#elif SIDECHAIN_ISA_LEVEL == 1
  const __m256i low = bits_as<__m256i>(v & 255);
  const __m256i words = _mm256_packus_epi32(low, low);
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const int fours[] = {_mm_cvtsi128_si32(_mm256_castsi256_si128(bytes)),
                       _mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1))};
#else
  uint8_t fours[kWide / 4][4];
  for (int i = 0; i < kWide; ++i) fours[i / 4][i % 4] = static_cast<uint8_t>(v[i]);
#endif
#pragma GCC unroll 4
  for (int i = 0; i < kWide / 4; ++i) __builtin_memcpy(to + i * stride, &fours[i], 4);
}

// Numbers from 0 to 2^24, rounded to integers.
#if SIDECHAIN_ISA_LEVEL == 2
inline WideInt nearest(Wide v) {
  return bits_as<WideInt>(_mm512_maskz_cvtps_epi32(0xffff, bits_as<__m512>(v)));
}
#elif SIDECHAIN_ISA_LEVEL == 1
inline WideInt nearest(Wide v) { return bits_as<WideInt>(_mm256_cvtps_epi32(bits_as<__m256>(v))); }
#else
inline WideInt nearest(Wide v) { return __builtin_convertvector(v + 0.5f, WideInt); }
#endif

// Writes v / step + zero, rounded, within [0, most], less `shift` as signed bytes; returns their
// sum. Numbers are multiples of 1 / 65536, whose own rounding `confidence` allows for: stochastic
// rounding is then one addition.
inline int32_t write_codes(const float* v, int64_t n, int64_t salt, float step, int zero, int most,
                           int shift, int64_t stride, uint8_t* codes) {
  const RoundingBits rounding(salt);
  const float scale = 65536.0f / step, start = 65536.0f * static_cast<float>(zero);
  WideInt sums = {};
  for (int64_t i = 0; i < n; i += 2 * kWide) {
    WideInt bits[2];
    rounding.draw(i / (2 * kWide), bits);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + half * kWide;
      if (at == n) break;
      // Without it packing waits for memory: 7.4 -> 3.8 ms for 12288 features of 768 on Zen 4.
      __builtin_prefetch(v + at + n, 0, 2);
      WideInt code = (nearest(load_wide(v + at) * scale + start) + bits[half]) >> 16;
      code = smaller(larger(code, WideInt{}), WideInt{} + most) - shift;
      sums += code;
      store_bytes(code, stride, codes + at / 4 * stride);
    }
  }
  int32_t sum = 0;
  for (int i = 0; i < kWide; ++i) sum += sums[i];
  return sum;
}

inline void zero_codes(int64_t n, int fill, int64_t stride, uint8_t* codes) {
  for (int64_t i = 0; i < n; i += 4) __builtin_memset(codes + i / 4 * stride, fill, 4);
}

struct Size {
  float largest, norm2;
};

// The largest |v| and |v|^2; n is whole groups.
inline Size size_of(const float* v, int64_t n) {
  Wide most[2] = {}, squares[2] = {};
  for (int64_t i = 0; i < n; i += 2 * kWide) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if (i + half * kWide == n) break;
      const Wide x = load_wide(v + i + half * kWide);
      most[half] = larger(most[half], larger(x, -x));
      squares[half] += x * x;
    }
  }
  return {largest(larger(most[0], most[1])), total(squares[0] + squares[1])};
}
