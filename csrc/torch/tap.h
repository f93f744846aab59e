// SPDX-License-Identifier: Apache-2.0
// tap_: tensors to TapParams, shared by the CPU and the CUDA binding.
#pragma once

#include "sidechain/tap.h"
#include "torch/checks.h"

namespace sidechain::torch_ops {

using MaybeTensor = std::optional<Tensor>;

inline TokenMask token_mask(const char* name, const MaybeTensor& mask, const Tensor& x) {
  if (!mask) return {nullptr, 0, 0};
  check("tap_", name, *mask, ScalarType::Bool, {kAny, x.size(1)}, x);
  const bool shared = mask->size(0) == 1;
  STD_TORCH_CHECK(shared || mask->size(0) == x.size(0), "tap_: expected ", name, " of 1 or ",
                  x.size(0), " rows, got ", mask->size(0));
  return {static_cast<const uint8_t*>(mask->const_data_ptr()), shared ? 0 : mask->stride(0),
          mask->stride(1)};
}

inline SumBuffer sum_buffer(const char* name, const MaybeTensor& t, const Tensor& x) {
  if (!t) return {nullptr, 0, 0, 0};
  check("tap_", name, *t, ScalarType::Float, {kAny, x.size(0), x.size(2)}, x);
  check_last_contiguous("tap_", name, *t);
  return {static_cast<float*>(t->mutable_data_ptr()), t->size(0), t->stride(0), t->stride(1)};
}

// One value per row, with its stride; {nullptr, 0} when absent.
template <class T>
struct RowValues {
  const T* data = nullptr;
  int64_t stride = 0;
};
template <class T>
RowValues<T> row_values(const char* name, const MaybeTensor& t, ScalarType dtype, const Tensor& x) {
  if (!t) return {};
  check("tap_", name, *t, dtype, {x.size(0)}, x);
  return {static_cast<const T*>(t->const_data_ptr()), t->stride(0)};
}

inline const int64_t* slot(const char* name, const MaybeTensor& t, const Tensor& x) {
  if (!t) return nullptr;
  check("tap_", name, *t, ScalarType::Long, {1}, x);
  return static_cast<const int64_t*>(t->const_data_ptr());
}

inline TapParams tap_params(const Tensor& x, const MaybeTensor& vectors,
                            const MaybeTensor& steer_slot, const MaybeTensor& index,
                            const MaybeTensor& strength, const MaybeTensor& removal,
                            const MaybeTensor& steer_mask, bool renorm, const MaybeTensor& sums,
                            const MaybeTensor& squares, const MaybeTensor& counts,
                            const MaybeTensor& ring, const MaybeTensor& capture_slot,
                            const MaybeTensor& capture_mask, int64_t ring_stride) {
  TapParams p = {};
  STD_TORCH_CHECK(x.dim() == 3, "tap_: expected x of shape [R, T, C], got ", x.dim(), " dims");
  check_last_contiguous("tap_", "x", x);
  p.x = x.mutable_data_ptr();
  p.dtype = dtype_of("tap_", "x", x);
  p.rows = x.size(0);
  p.tokens = x.size(1);
  p.channels = x.size(2);
  p.x_row = x.stride(0);
  p.x_token = x.stride(1);
  STD_TORCH_CHECK((p.x_row != 0 || p.rows <= 1) && (p.x_token != 0 || p.tokens <= 1),
                  "tap_: expected x without repeated (expanded) elements");
  if (vectors) {
    STD_TORCH_CHECK(strength || removal, "tap_: expected strength or removal beside vectors");
    STD_TORCH_CHECK(vectors->numel() > 0 || p.channels == 0, "tap_: expected V >= 1 and S >= 1");
    check("tap_", "vectors", *vectors, ScalarType::Float, {kAny, kAny, p.channels}, x);
    check_last_contiguous("tap_", "vectors", *vectors);
    p.vectors = static_cast<const float*>(vectors->const_data_ptr());
    p.vector_count = vectors->size(0);
    p.vector_slots = vectors->size(1);
    p.vector_stride = vectors->stride(0);
    p.vector_slot_stride = vectors->stride(1);
  }
  STD_TORCH_CHECK(vectors || !(strength || removal || index || steer_slot || steer_mask),
                  "tap_: expected vectors beside what steers with them");
  p.steer_slot = slot("steer_slot", steer_slot, x);
  const auto which = row_values<int32_t>("index", index, ScalarType::Int, x);
  p.index = which.data;
  p.index_stride = which.stride;
  const auto a = row_values<float>("strength", strength, ScalarType::Float, x);
  p.strength = a.data;
  p.strength_stride = a.stride;
  const auto b = row_values<float>("removal", removal, ScalarType::Float, x);
  p.removal = b.data;
  p.removal_stride = b.stride;
  p.steer_mask = token_mask("steer_mask", steer_mask, x);
  p.renorm = renorm;

  p.sums = sum_buffer("sums", sums, x);
  p.squares = sum_buffer("squares", squares, x);
  if (counts) {
    check("tap_", "counts", *counts, ScalarType::Float, {kAny, p.rows}, x);
    p.counts = {static_cast<float*>(counts->mutable_data_ptr()), counts->size(0), counts->stride(0),
                counts->stride(1)};
  }
  if (ring) {
    STD_TORCH_CHECK(ring_stride >= 1, "tap_: expected ring_stride >= 1, got ", ring_stride);
    check("tap_", "ring", *ring, ring->scalar_type(),
          {kAny, p.rows, (p.tokens + ring_stride - 1) / ring_stride, p.channels}, x);
    check_last_contiguous("tap_", "ring", *ring);
    p.ring = {ring->mutable_data_ptr(),
              dtype_of("tap_", "ring", *ring),
              ring->size(0),
              ring->stride(0),
              ring->stride(1),
              ring->stride(2),
              ring_stride};
  }
  p.capture_slot = slot("capture_slot", capture_slot, x);
  p.capture_mask = token_mask("capture_mask", capture_mask, x);
  return p;
}

}  // namespace sidechain::torch_ops
