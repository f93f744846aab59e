// SPDX-License-Identifier: Apache-2.0
// Reading of stable-ABI tensors. The public Python functions explain bad calls; what is checked
// here is only what protects memory when an op is called directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "sidechain/dtype.h"

namespace sidechain::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;

// Shape (kAny matches every size), dtype and device of `t`; strides are for the caller to check.
inline void check(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": unexpected dtype of ", name);
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(),
                  op, ": expected ", name, " on the device of x");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), op, ": expected ", name, " with ",
                  shape.size(), " dims, got ", t.dim());
  int64_t dim = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(size == kAny || t.size(dim) == size, op, ": expected ", name, ".size(", dim,
                    ") == ", size, ", got ", t.size(dim));
    ++dim;
  }
}

inline void check_last_contiguous(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.size(-1) <= 1 || t.stride(-1) == 1, op, ": expected ", name,
                  " with a contiguous last dim");
}

inline Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": expected ", name, " of float32 | float16 | bfloat16");
  }
}

}  // namespace sidechain::torch_ops
