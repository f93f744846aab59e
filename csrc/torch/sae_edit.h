// SPDX-License-Identifier: Apache-2.0
// sae_edit_: tensors to SaeEditParams, shared by the CPU and the CUDA binding.
#pragma once

#include "sidechain/sae_edit.h"
#include "torch/codes.h"

namespace sidechain::torch_ops {

inline SaeEditParams sae_edit_params(const Tensor& x, const MaybeTensor& values_old,
                                     const MaybeTensor& values_new, const Tensor& indices,
                                     const MaybeTensor& offsets, const Tensor& w_dec,
                                     const MaybeTensor& strength, const MaybeTensor& mask) {
  const char* op = "sae_edit_";
  SaeEditParams p = {};
  p.codes = codes_of(op, indices, offsets, x);
  check_matrix(op, "x", x, x.scalar_type(), p.codes.rows, kAny, x);
  p.x = x.mutable_data_ptr();
  p.dtype = dtype_of(op, "x", x);
  p.x_row = row_stride(x);
  p.width = x.size(1);
  STD_TORCH_CHECK(p.x_row != 0 || p.codes.rows <= 1, op, ": expected x without repeated rows");
  STD_TORCH_CHECK(values_old || values_new, op, ": expected values_old or values_new");
  if (values_new) {
    p.codes.values_row = check_values(op, "values_new", *values_new, indices, x);
    p.codes.values = read<float>(values_new);
  }
  if (values_old) {
    p.values_old_row = check_values(op, "values_old", *values_old, indices, x);
    p.values_old = read<float>(values_old);
  }
  check_matrix(op, "w_dec", w_dec, w_dec.scalar_type(), kAny, p.width, x);
  p.w_dec = w_dec.const_data_ptr();
  p.w_dec_dtype = dtype_of(op, "w_dec", w_dec);
  p.w_dec_row = row_stride(w_dec);
  p.features = w_dec.size(0);
  if (strength) {
    const bool one = strength->dim() == 1 && strength->size(0) == 1;
    check(op, "strength", *strength, ScalarType::Float, {one ? 1 : p.codes.rows}, x);
    p.strength = read<float>(strength);
    p.strength_stride = one ? 0 : strength->stride(0);
  }
  if (mask) {
    check(op, "mask", *mask, ScalarType::Bool, {p.codes.rows}, x);
    p.mask = read<uint8_t>(mask);
    p.mask_stride = mask->stride(0);
  }
  return p;
}

}  // namespace sidechain::torch_ops
