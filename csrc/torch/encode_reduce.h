// SPDX-License-Identifier: Apache-2.0
// code_sums_: tensors to CodeSumsParams, shared by the CPU and the CUDA binding.
#pragma once

#include "sidechain/encode_reduce.h"
#include "torch/codes.h"

namespace sidechain::torch_ops {

inline CodeSumsParams code_sums_params(const Tensor& values, const Tensor& indices,
                                       const MaybeTensor& offsets, const MaybeTensor& label,
                                       const Tensor& sums, const Tensor& squares,
                                       const Tensor& counts, const Tensor& rows) {
  const char* op = "code_sums_";
  CodeSumsParams p = {};
  check(op, "sums", sums, ScalarType::Float, {kAny, kAny}, sums);
  p.labels = sums.size(0);
  p.features = sums.size(1);
  check(op, "squares", squares, ScalarType::Float, {p.labels, p.features}, sums);
  check(op, "counts", counts, ScalarType::Long, {p.labels, p.features}, sums);
  check(op, "rows", rows, ScalarType::Long, {p.labels}, sums);
  for (const Tensor* t : {&sums, &squares, &counts, &rows}) check_contiguous(op, "sums", *t);
  p.codes = codes_of(op, values, indices, offsets, sums);
  if (label) {
    check(op, "label", *label, ScalarType::Long, {p.codes.rows}, sums);
    p.label = read<int64_t>(label);
    p.label_stride = label->stride(0);
  }
  p.sums = static_cast<float*>(sums.mutable_data_ptr());
  p.squares = static_cast<float*>(squares.mutable_data_ptr());
  p.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  p.rows = static_cast<int64_t*>(rows.mutable_data_ptr());
  return p;
}

}  // namespace sidechain::torch_ops
