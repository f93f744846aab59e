// SPDX-License-Identifier: Apache-2.0
// Sums of scaled rows and products with rows that are picked by entries. Included INSIDE an ISA
// namespace, after vec-inl.h.

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

// Four sums of lanes, or four lanes of one sum.
#if SIDECHAIN_ISA_LEVEL == 2
inline F4 fold_lanes(F32 v) {
  // The zero-masking forms: GCC 12 warns about the undefined operand of the plain ones.
  const __m512d whole = bits_as<__m512d>(v);
  const __m256d low = _mm512_maskz_extractf64x4_pd(0xf, whole, 0);
  const __m256d high = _mm512_maskz_extractf64x4_pd(0xf, whole, 1);
  const __m256 half = _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
  return bits_as<F4>(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#elif SIDECHAIN_ISA_LEVEL == 1
inline F4 fold_lanes(F32 v) {
  const __m256 whole = bits_as<__m256>(v);
  return bits_as<F4>(_mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1)));
}
#else
inline F4 fold_lanes(F32 v) { return bits_as<F4>(v); }
#endif

// The sums of the lanes of four vectors.
inline F4 sum_lanes4(F32 a, F32 b, F32 c, F32 d) {
  const F4 fa = fold_lanes(a), fb = fold_lanes(b), fc = fold_lanes(c), fd = fold_lanes(d);
  const F4 ab =
      __builtin_shuffle(fa, fb, I4{0, 4, 1, 5}) + __builtin_shuffle(fa, fb, I4{2, 6, 3, 7});
  const F4 cd =
      __builtin_shuffle(fc, fd, I4{0, 4, 1, 5}) + __builtin_shuffle(fc, fd, I4{2, 6, 3, 7});
  return __builtin_shuffle(ab, cd, I4{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, I4{2, 3, 6, 7});
}

template <class T>
inline F32 load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_tail(p, n);
}
template <class T>
inline void store_upto(T* p, F32 v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  store_tail(p, v, n);
}

// body(c, n) for the vectors of columns [begin, end): n is the constant kLanes but in the tail, so
// that load_upto and store_upto cost nothing in between.
template <class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) body(c, static_cast<int64_t>(kLanes));
  if (c < end) body(c, end - c);
}

// dvalues[place] += weight * <row, table[offset]> for every entry, over columns [begin, end).
// Four entries share each load of the row.
template <class T>
void dot_entries(const float* row, const T* table, int64_t begin, int64_t end,
                 const RowEntry* entries, int64_t count, float weight, float* dvalues) {
  for (int64_t j = 0; j < count; j += 4) {
    const int64_t last = count - 1;
    const T* w[4];
    for (int i = 0; i < 4; ++i) w[i] = table + entries[j + i < last ? j + i : last].offset;
    F32 dot[4] = {};
    for_vectors(begin, end, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const F32 e = load_upto(row + c, n);
      for (int i = 0; i < 4; ++i) dot[i] += e * load_upto(w[i] + c, n);
    });
    const F4 sums = sum_lanes4(dot[0], dot[1], dot[2], dot[3]);
    for (int i = 0; i < 4 && j + i < count; ++i) dvalues[entries[j + i].place] += weight * sums[i];
  }
}

// The number of an entry that scales its row.
template <bool kDvalue>
inline float scale_of(const CscEntry& entry) {
  return kDvalue ? entry.dvalue : entry.value;
}

// sum <- (sum, or 0 where kFresh) + scale * (row - centre) of kCount entries, in their order.
template <class T, bool kDvalue, bool kFresh, bool kCentre, int kCount>
void add_block(float* sum, int64_t width, const CscEntry* entries, const T* rows, int64_t stride,
               const float* centre) {
  const T* row[kCount];
  F32 scale[kCount];
  for (int i = 0; i < kCount; ++i) {
    row[i] = rows + entries[i].row * stride;
    scale[i] = splat(scale_of<kDvalue>(entries[i]));
  }
  for_vectors(0, width, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    F32 total = {};
    if constexpr (!kFresh) total = load_upto(sum + c, n);
    if constexpr (kCentre) {
      const F32 middle = load_upto(centre + c, n);
      for (int i = 0; i < kCount; ++i) total += scale[i] * (load_upto(row[i] + c, n) - middle);
    } else {
      for (int i = 0; i < kCount; ++i) total += scale[i] * load_upto(row[i] + c, n);
    }
    store_upto(sum + c, total, n);
  });
}

template <class T, bool kDvalue, bool kFresh, bool kCentre>
void add_upto4(float* sum, int64_t width, const CscEntry* entries, int64_t count, const T* rows,
               int64_t stride, const float* centre) {
  switch (count) {
    case 1:
      return add_block<T, kDvalue, kFresh, kCentre, 1>(sum, width, entries, rows, stride, centre);
    case 2:
      return add_block<T, kDvalue, kFresh, kCentre, 2>(sum, width, entries, rows, stride, centre);
    case 3:
      return add_block<T, kDvalue, kFresh, kCentre, 3>(sum, width, entries, rows, stride, centre);
    default:
      return add_block<T, kDvalue, kFresh, kCentre, 4>(sum, width, entries, rows, stride, centre);
  }
}

template <class T, bool kDvalue, bool kCentre>
void add_all(float* sum, int64_t width, const CscEntry* entries, int64_t count, const T* rows,
             int64_t stride, const float* centre, bool fresh) {
  for (int64_t j = 0; j < count; j += 4) {
    const int64_t n = count - j < 4 ? count - j : 4;
    if (fresh && j == 0) {
      add_upto4<T, kDvalue, true, kCentre>(sum, width, entries, n, rows, stride, centre);
    } else {
      add_upto4<T, kDvalue, false, kCentre>(sum, width, entries + j, n, rows, stride, centre);
    }
  }
}

// sum [width] <- (sum, or 0 where `fresh`) + sum over the entries of scale * (row - centre). Rows
// are streamed four at a time while the sum stays in the first-level cache.
template <class T, bool kDvalue>
void add_entries(float* sum, int64_t width, const CscEntry* entries, int64_t count, const T* rows,
                 int64_t stride, const float* centre, bool fresh) {
  if (fresh && count == 0) {
    for (int64_t c = 0; c < width; ++c) sum[c] = 0.0f;
  }
  if (centre != nullptr) {
    return add_all<T, kDvalue, true>(sum, width, entries, count, rows, stride, centre, fresh);
  }
  add_all<T, kDvalue, false>(sum, width, entries, count, rows, stride, nullptr, fresh);
}
