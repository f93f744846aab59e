// SPDX-License-Identifier: Apache-2.0
// Capture buffers, slots and token masks to params, for every op that captures.
#pragma once

#include "sidechain/tap.h"
#include "torch/checks.h"

namespace sidechain::torch_ops {

using MaybeTensor = std::optional<Tensor>;

// A mask [R | 1, T] or [rows, T].
inline TokenMask token_mask(const char* op, const char* name, const MaybeTensor& mask, int64_t rows,
                            int64_t tokens, const Tensor& like) {
  if (!mask) return {nullptr, 0, 0};
  check(op, name, *mask, ScalarType::Bool, {kAny, tokens}, like);
  const bool shared = mask->size(0) == 1;
  STD_TORCH_CHECK(shared || mask->size(0) == rows, op, ": expected ", name, " of 1 or ", rows,
                  " rows, got ", mask->size(0));
  return {static_cast<const uint8_t*>(mask->const_data_ptr()), shared ? 0 : mask->stride(0),
          mask->stride(1)};
}

// One value per row, with its stride; {nullptr, 0} when absent.
template <class T>
struct RowValues {
  const T* data = nullptr;
  int64_t stride = 0;
};
template <class T>
RowValues<T> row_values(const char* op, const char* name, const MaybeTensor& t, ScalarType dtype,
                        const Tensor& like) {
  if (!t) return {};
  check(op, name, *t, dtype, {like.size(0)}, like);
  return {static_cast<const T*>(t->const_data_ptr()), t->stride(0)};
}

inline const int64_t* slot(const char* op, const char* name, const MaybeTensor& t,
                           const Tensor& like) {
  if (!t) return nullptr;
  check(op, name, *t, ScalarType::Long, {1}, like);
  return static_cast<const int64_t*>(t->const_data_ptr());
}

inline SumBuffer sum_buffer(const char* op, const char* name, const MaybeTensor& t, int64_t rows,
                            int64_t channels, const Tensor& like) {
  if (!t) return {nullptr, 0, 0, 0};
  check(op, name, *t, ScalarType::Float, {kAny, rows, channels}, like);
  check_last_contiguous(op, name, *t);
  return {static_cast<float*>(t->mutable_data_ptr()), t->size(0), t->stride(0), t->stride(1)};
}

// `Capture` of python/sidechain/reference/tap_structs.py, as an op's arguments hold it.
struct Capture {
  const MaybeTensor &sums, &squares, &counts, &ring, &slot, &mask;
};

// Fills the capture buffers, slot and mask of `p`, whose rows and tokens are set.
template <class Params>
void fill_captures(const char* op, Params& p, int64_t channels, const Capture& capture,
                   const Tensor& like) {
  p.sums = sum_buffer(op, "sums", capture.sums, p.rows, channels, like);
  p.squares = sum_buffer(op, "squares", capture.squares, p.rows, channels, like);
  if (const MaybeTensor& counts = capture.counts) {
    check(op, "counts", *counts, ScalarType::Float, {kAny, p.rows}, like);
    p.counts = {static_cast<float*>(counts->mutable_data_ptr()), counts->size(0), counts->stride(0),
                counts->stride(1)};
  }
  if (const MaybeTensor& ring = capture.ring) {
    check(op, "ring", *ring, ring->scalar_type(), {kAny, p.rows, p.tokens, channels}, like);
    check_last_contiguous(op, "ring", *ring);
    p.ring = {ring->mutable_data_ptr(),
              dtype_of(op, "ring", *ring),
              ring->size(0),
              ring->stride(0),
              ring->stride(1),
              ring->stride(2)};
  }
  p.capture_slot = slot(op, "capture_slot", capture.slot, like);
  p.capture_mask = token_mask(op, "capture_mask", capture.mask, p.rows, p.tokens, like);
}

}  // namespace sidechain::torch_ops
