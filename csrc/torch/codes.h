// SPDX-License-Identifier: Apache-2.0
// Sparse codes and matrices: tensors to what the kernels take, shared by the ops on them.
#pragma once

#include <limits>
#include <vector>

#include "sidechain/codes.h"
#include "torch/checks.h"

namespace sidechain::torch_ops {

using MaybeTensor = std::optional<Tensor>;

template <class T>
const T* read(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <class T>
T* write(const MaybeTensor& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// Row stride of a matrix; 0 where a single row leaves it open.
inline int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : 0; }

// Contiguous vector of n elements.
inline void check_vector(const char* op, const char* name, const MaybeTensor& t, ScalarType dtype,
                         int64_t n, const Tensor& like) {
  if (!t) return;
  check(op, name, *t, dtype, {n}, like);
  check_last_contiguous(op, name, *t);
}

// Matrix [rows, columns] of a dtype with a contiguous last dim.
inline void check_matrix(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                         int64_t rows, int64_t columns, const Tensor& like) {
  check(op, name, t, dtype, {rows, columns}, like);
  check_last_contiguous(op, name, t);
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": expected ", name, " to be contiguous");
}

// Codes without their values: indices [N, K] or, with offsets, [nnz].
inline Codes codes_of(const char* op, const Tensor& indices, const MaybeTensor& offsets,
                      const Tensor& like) {
  Codes codes = {};
  STD_TORCH_CHECK(indices.numel() < std::numeric_limits<int32_t>::max(), op,
                  ": expected fewer than 2^31 codes");
  if (offsets) {
    check(op, "indices", indices, ScalarType::Int, {kAny}, like);
    check(op, "offsets", *offsets, ScalarType::Long, {kAny}, like);
    STD_TORCH_CHECK(offsets->size(0) > 0, op, ": expected offsets of shape [N + 1]");
    check_last_contiguous(op, "offsets", *offsets);
    codes.offsets = read<int64_t>(offsets);
    codes.rows = offsets->size(0) - 1;
    codes.capacity = indices.size(0);
  } else {
    check(op, "indices", indices, ScalarType::Int, {kAny, kAny}, like);
    codes.rows = indices.size(0);
    codes.width = indices.size(1);
    codes.indices_row = row_stride(indices);
  }
  STD_TORCH_CHECK(codes.rows < std::numeric_limits<int32_t>::max(), op,
                  ": expected fewer than 2^31 rows");
  check_last_contiguous(op, "indices", indices);
  codes.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  return codes;
}

// Numbers beside the codes: float32 of the shape of the indices. Returns their row stride.
inline int64_t check_values(const char* op, const char* name, const Tensor& values,
                            const Tensor& indices, const Tensor& like) {
  if (indices.dim() == 1) {
    check(op, name, values, ScalarType::Float, {indices.size(0)}, like);
  } else {
    check(op, name, values, ScalarType::Float, {indices.size(0), indices.size(1)}, like);
  }
  check_last_contiguous(op, name, values);
  return indices.dim() == 1 ? 0 : row_stride(values);
}

inline Codes codes_of(const char* op, const Tensor& values, const Tensor& indices,
                      const MaybeTensor& offsets, const Tensor& like) {
  Codes codes = codes_of(op, indices, offsets, like);
  codes.values_row = check_values(op, "values", values, indices, like);
  codes.values = static_cast<const float*>(values.const_data_ptr());
  return codes;
}

// Uninitialised contiguous tensors on the device of `like`.
inline Tensor new_like(const Tensor& like, std::vector<int64_t> shape,
                       ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(like, shape, dtype);
}
inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
  return shape;
}

}  // namespace sidechain::torch_ops
