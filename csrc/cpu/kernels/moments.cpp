// SPDX-License-Identifier: Apache-2.0
// Loop body of moments, compiled once per instruction set. A chunk of rows is widened once and then
// read twice from the cache, for its mean and for the squares about that mean; no sum of squares of
// the raw values is ever formed, which would cancel where the mean is large.
#include "cpu/kernels/moments.h"

#include <cstdint>
#if SIDECHAIN_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {
namespace {

#include "cpu/kernels/vec-inl.h"

// Half as many lanes as F32, which fill one register as doubles: GCC 12 takes vectors of two
// registers through memory.
constexpr int kHalf = kLanes / 2;
typedef float F32Half __attribute__((vector_size(4 * kHalf)));
typedef double F64 __attribute__((vector_size(8 * kHalf)));

inline F64 load64(const float* p) {
  F32Half v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, F64);
}

inline double sum64(F64 v) {
  double total = 0.0;
  for (int i = 0; i < kHalf; ++i) total += v[i];
  return total;
}

// One row into `target`, zeros behind it; returns its sum of squares.
template <class T>
double widen_row(const T* row, int64_t width, float* target) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) store(target + c, load(row + c));
  if (c < width) store(target + c, load_tail(row + c, width - c));
  F64 low = {}, high = {};
  for (c = 0; c < width; c += kLanes) {
    const F64 a = load64(target + c), b = load64(target + c + kHalf);
    low += a * a;
    high += b * b;
  }
  return sum64(low + high);
}

template <class T>
void widen_rows(MomentsParams& p, int64_t begin, int64_t end, int64_t padded, float* scratch) {
  for (int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(p.rows) + r * p.width;
    const double squares = widen_row(row, p.width, scratch + (r - begin) * padded);
    const double norm = __builtin_sqrt(squares);
    p.norm_sum += norm;
    p.norm_squares += squares;
    // Written so that NaN is kept.
    p.norm_max = norm <= p.norm_max ? p.norm_max : norm;
  }
}

// Joins the mean and the squares of `count` new rows to those of `seen` old ones.
// Source: Chan, Golub and LeVeque 1979.
inline void merge(double* mean, double* m2, double seen, double count, double new_mean,
                  double new_m2) {
  const double delta = new_mean - *mean;
  *mean += delta * (count / (seen + count));
  *m2 += new_m2 + delta * delta * (seen * count / (seen + count));
}

}  // namespace

void moments_chunk(MomentsParams& p, int64_t begin, int64_t end, int64_t padded, float* scratch) {
  switch (p.dtype) {
    case Dtype::kFloat16:
      widen_rows<Half>(p, begin, end, padded, scratch);
      break;
    case Dtype::kBFloat16:
      widen_rows<BFloat>(p, begin, end, padded, scratch);
      break;
    case Dtype::kFloat32:
      widen_rows<float>(p, begin, end, padded, scratch);
      break;
  }
  const int64_t rows = end - begin;
  const double count = static_cast<double>(rows);
  const double seen = static_cast<double>(p.seen);
  for (int64_t c = 0; c < p.width; c += kLanes) {
    const float* column = scratch + c;
    F64 low = {}, high = {};
    for (int64_t r = 0; r < rows; ++r) {
      low += load64(column + r * padded);
      high += load64(column + r * padded + kHalf);
    }
    const F64 means[2] = {low / count, high / count};
    low = high = F64{};
    for (int64_t r = 0; r < rows; ++r) {
      const F64 a = load64(column + r * padded) - means[0];
      const F64 b = load64(column + r * padded + kHalf) - means[1];
      low += a * a;
      high += b * b;
    }
    const F64 squares[2] = {low, high};
    const int64_t left = p.width - c < kLanes ? p.width - c : kLanes;
    for (int64_t i = 0; i < left; ++i) {
      merge(p.mean + c + i, p.m2 + c + i, seen, count, means[i / kHalf][i % kHalf],
            squares[i / kHalf][i % kHalf]);
    }
  }
  p.seen += rows;
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
