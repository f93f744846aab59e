// SPDX-License-Identifier: Apache-2.0
// Loop bodies of sparse_decode, compiled once per instruction set. Bound by the gather of decoder
// rows: a slice of columns of all rows of one token stays in the first-level cache between the sum
// and the products with the error.
#include "cpu/kernels/sparse_decode.h"

#include <cstdint>
#if SIDECHAIN_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {
namespace {

#include "cpu/kernels/vec-inl.h"
// The second needs the first.
#include "cpu/kernels/rows-inl.h"

template <class T>
const T* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const T*>(m.data) + row * m.row + column;
}

// n elements of a matrix of any dtype.
F32 load_any(const Matrix& m, int64_t row, int64_t column, int64_t n) {
  switch (m.dtype) {
    case Dtype::kFloat16:
      return load_upto(at<Half>(m, row, column), n);
    case Dtype::kBFloat16:
      return load_upto(at<BFloat>(m, row, column), n);
    case Dtype::kFloat32:
      break;
  }
  return load_upto(at<float>(m, row, column), n);
}

// The entries of the next token; its decoder rows are fetched while those of this one are summed.
struct Coming {
  const RowEntry* entries;
  int64_t count;  // not 0

  int64_t offset(int64_t j) const { return entries[j < count ? j : count - 1].offset; }
};

// Entries whose products are summed by themselves, so that long rows lose no more to rounding than
// a matrix product; the sum before them waits in the output.
constexpr int64_t kRun = 64;

struct Tile {
  const DecodeParams& p;
  int64_t n;
  const RowEntry* entries;
  int64_t count;
  Coming coming;

  // kVectors vectors from column c on, the last of `left` elements. Returns the squares.
  template <class T, int kVectors>
  F32 run(int64_t c, int64_t left) const {
    F32 sum[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      sum[i] = p.b_dec ? load_upto(p.b_dec + c + i * kLanes, left) : F32{};
    }
    const T* table = static_cast<const T*>(p.w_dec.data) + c;
    float* const out = p.out + n * p.width + c;
    for (int64_t first = 0; first < count; first += kRun) {
      if (first > 0) {
        for (int i = 0; i < kVectors; ++i) {
          store_upto(out + i * kLanes, sum[i], left);
          sum[i] = F32{};
        }
      }
      const int64_t stop = first + kRun < count ? first + kRun : count;
      for (int64_t j = first; j < stop; ++j) {
        const T* w = table + entries[j].offset;
        const T* ahead = table + coming.offset(j);
        const F32 value = splat(entries[j].value);
        constexpr int kLine = 64 / sizeof(T);
        for (int i = 0; i < kVectors * kLanes; i += kLine) __builtin_prefetch(ahead + i, 0, 2);
        for (int i = 0; i < kVectors; ++i) sum[i] += value * load_upto(w + i * kLanes, left);
      }
      if (first > 0) {
        for (int i = 0; i < kVectors; ++i) sum[i] += load_upto(out + i * kLanes, left);
      }
    }
    F32 squares = {};
    for (int i = 0; i < kVectors; ++i) {
      if (p.compare) {
        sum[i] -= load_any(p.target, n, c + i * kLanes, left);
        squares += sum[i] * sum[i];
      }
      store_upto(out + i * kLanes, sum[i], left);
    }
    return squares;
  }
};

template <class T>
void decode_typed(const DecodeParams& p, int64_t n, int64_t begin, int64_t end,
                  const RowEntry* entries, int64_t count, Coming coming) {
  constexpr int kVectors = 8;  // sums that fit the registers beside a value and a decoder row
  const Tile tile = {p, n, entries, count, coming};
  F32 squares = {};
  int64_t c = begin;
  for (; c + kVectors * kLanes <= end; c += kVectors * kLanes) {
    squares += tile.run<T, kVectors>(c, kLanes);
  }
  for (; c + kLanes <= end; c += kLanes) squares += tile.run<T, 1>(c, kLanes);
  if (c < end) squares += tile.run<T, 1>(c, end - c);
  if (!p.compare) return;
  p.loss[n] += sum_lanes(squares);
  const float weight = p.row_weight ? p.row_weight[n] : 1.0f;
  dot_entries(p.out + n * p.width, static_cast<const T*>(p.w_dec.data), begin, end, entries, count,
              weight, p.dvalues);
}

template <class T>
void row_gradient_typed(const DecodeBackwardParams& p, int64_t feature, const CscEntry* entries,
                        int64_t count, float* sum) {
  T* out = static_cast<T*>(p.dw_dec) + feature * p.width;
  add_entries<float, false>(sum, p.width, entries, count, p.grad, p.grad_row, nullptr, true);
  for_vectors(0, p.width, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    store_upto(out + c, load_upto(sum + c, n), n);
  });
}

}  // namespace

void decode_columns(const DecodeParams& p, int64_t n, int64_t begin, int64_t end,
                    const RowEntry* entries, int64_t count, const RowEntry* next,
                    int64_t next_count) {
  const Coming coming = next_count > 0 ? Coming{next, next_count} : Coming{entries, count};
  switch (p.w_dec.dtype) {
    case Dtype::kFloat32:
      return decode_typed<float>(p, n, begin, end, entries, count, coming);
    case Dtype::kFloat16:
      return decode_typed<Half>(p, n, begin, end, entries, count, coming);
    case Dtype::kBFloat16:
      return decode_typed<BFloat>(p, n, begin, end, entries, count, coming);
  }
}

void prefetch_columns(const DecodeParams& p, int64_t begin, int64_t end, const RowEntry* entries,
                      int64_t count) {
  const int64_t size = p.w_dec.dtype == Dtype::kFloat32 ? 4 : 2;
  const char* table = static_cast<const char*>(p.w_dec.data);
  for (int64_t j = 0; j < count; ++j) {
    const char* row = table + (entries[j].offset + begin) * size;
    // Into the second-level cache: the rows of a token are several times the first one.
    for (int64_t at = 0; at < (end - begin) * size; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

void decode_dvalues(const DecodeBackwardParams& p, int64_t n, int64_t begin, int64_t end,
                    const RowEntry* entries, int64_t count) {
  const float* grad = p.grad + n * p.grad_row;
  switch (p.w_dec.dtype) {
    case Dtype::kFloat32:
      return dot_entries(grad, at<float>(p.w_dec, 0, 0), begin, end, entries, count, 1.0f,
                         p.dvalues);
    case Dtype::kFloat16:
      return dot_entries(grad, at<Half>(p.w_dec, 0, 0), begin, end, entries, count, 1.0f,
                         p.dvalues);
    case Dtype::kBFloat16:
      return dot_entries(grad, at<BFloat>(p.w_dec, 0, 0), begin, end, entries, count, 1.0f,
                         p.dvalues);
  }
}

void decode_row_gradient(const DecodeBackwardParams& p, int64_t feature, const CscEntry* entries,
                         int64_t count, float* sum) {
  switch (p.w_dec.dtype) {
    case Dtype::kFloat32:
      return row_gradient_typed<float>(p, feature, entries, count, sum);
    case Dtype::kFloat16:
      return row_gradient_typed<Half>(p, feature, entries, count, sum);
    case Dtype::kBFloat16:
      return row_gradient_typed<BFloat>(p, feature, entries, count, sum);
  }
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
