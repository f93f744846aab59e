// SPDX-License-Identifier: Apache-2.0
// sparse_decode: tensors to params, shared by the CPU and the CUDA binding.
#pragma once

#include <tuple>

#include "sidechain/sparse_decode.h"
#include "torch/codes.h"

namespace sidechain::torch_ops {

inline Matrix matrix_of(const char* op, const char* name, const Tensor& t, int64_t rows,
                        int64_t columns, const Tensor& like) {
  check_matrix(op, name, t, t.scalar_type(), rows, columns, like);
  return {t.const_data_ptr(), dtype_of(op, name, t), row_stride(t)};
}

inline DecodeParams decode_params(const char* op, const Tensor& values, const Tensor& indices,
                                  const Tensor& w_dec, const MaybeTensor& b_dec,
                                  const MaybeTensor& offsets, Tensor& out) {
  DecodeParams p = {};
  p.codes = codes_of(op, values, indices, offsets, w_dec);
  p.w_dec = matrix_of(op, "w_dec", w_dec, kAny, kAny, w_dec);
  p.features = w_dec.size(0);
  p.width = w_dec.size(1);
  check_vector(op, "b_dec", b_dec, ScalarType::Float, p.width, w_dec);
  p.b_dec = read<float>(b_dec);
  out = new_like(w_dec, {p.codes.rows, p.width});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  return p;
}

struct DecodeLossTensors {
  Tensor error, loss, dvalues;
};

inline DecodeParams decode_loss_params(const Tensor& values, const Tensor& indices,
                                       const Tensor& w_dec, const MaybeTensor& b_dec,
                                       const Tensor& target, const MaybeTensor& offsets,
                                       const MaybeTensor& row_weight, DecodeLossTensors& out) {
  const char* op = "sparse_decode_loss";
  DecodeParams p = decode_params(op, values, indices, w_dec, b_dec, offsets, out.error);
  p.compare = true;
  p.target = matrix_of(op, "target", target, p.codes.rows, p.width, w_dec);
  check_vector(op, "row_weight", row_weight, ScalarType::Float, p.codes.rows, w_dec);
  p.row_weight = read<float>(row_weight);
  out.loss = new_like(w_dec, {p.codes.rows});
  out.dvalues = new_like(w_dec, shape_of(indices));
  p.loss = static_cast<float*>(out.loss.mutable_data_ptr());
  p.dvalues = static_cast<float*>(out.dvalues.mutable_data_ptr());
  return p;
}

inline DecodeBackwardParams decode_backward_params(const Tensor& grad, const Tensor& values,
                                                   const Tensor& indices, const Tensor& w_dec,
                                                   const MaybeTensor& offsets, bool need_values,
                                                   bool need_table, Tensor& dvalues,
                                                   Tensor& dw_dec) {
  const char* op = "sparse_decode_backward";
  DecodeBackwardParams p = {};
  p.codes = codes_of(op, values, indices, offsets, w_dec);
  p.w_dec = matrix_of(op, "w_dec", w_dec, kAny, kAny, w_dec);
  p.features = w_dec.size(0);
  p.width = w_dec.size(1);
  check_matrix(op, "grad", grad, ScalarType::Float, p.codes.rows, p.width, w_dec);
  p.grad = static_cast<const float*>(grad.const_data_ptr());
  p.grad_row = row_stride(grad);
  dvalues = new_like(w_dec, need_values ? shape_of(indices) : std::vector<int64_t>{0});
  dw_dec =
      new_like(w_dec, need_table ? shape_of(w_dec) : std::vector<int64_t>{0}, w_dec.scalar_type());
  if (need_values) p.dvalues = static_cast<float*>(dvalues.mutable_data_ptr());
  if (need_table) p.dw_dec = dw_dec.mutable_data_ptr();
  return p;
}

}  // namespace sidechain::torch_ops
