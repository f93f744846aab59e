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

typedef double F64 __attribute__((vector_size(8 * kLanes)));

inline F64 wide(F32 v) { return __builtin_convertvector(v, F64); }

inline double sum64(F64 v) {
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// One row into `target`, zeros behind it; returns its sum of squares.
template <class T>
double widen_row(const T* row, int64_t width, float* target) {
  F64 squares = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    const F32 v = load(row + c);
    store(target + c, v);
    squares += wide(v) * wide(v);
  }
  if (c < width) {
    const F32 v = load_tail(row + c, width - c);
    store(target + c, v);
    squares += wide(v) * wide(v);
  }
  return sum64(squares);
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
    F64 sum = {};
    for (int64_t r = 0; r < rows; ++r) sum += wide(load(scratch + r * padded + c));
    const F64 mean = sum / count;
    F64 squares = {};
    for (int64_t r = 0; r < rows; ++r) {
      const F64 off = wide(load(scratch + r * padded + c)) - mean;
      squares += off * off;
    }
    const int64_t left = p.width - c < kLanes ? p.width - c : kLanes;
    for (int64_t i = 0; i < left; ++i) {
      merge(p.mean + c + i, p.m2 + c + i, seen, count, mean[i], squares[i]);
    }
  }
  p.seen += rows;
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
