// SPDX-License-Identifier: Apache-2.0
#include "sidechain/topk_encode.h"

#include <tuple>

#include "torch/checks.h"

namespace sidechain::torch_ops {
namespace {

using MaybeTensor = std::optional<Tensor>;

void parallel_for(int64_t n, int64_t grain, cpu::Body body, void* context) {
  torch::stable::parallel_for(0, n, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

// Rows whose elements are neighbours: a transposed dictionary is copied, which costs little beside
// its use.
Tensor with_contiguous_rows(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": expected ", name, " with 2 dims, got ", t.dim());
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

Rows rows_of(const char* op, const char* name, const Tensor& t) {
  return {t.const_data_ptr(), dtype_of(op, name, t), t.stride(0)};
}

Vector vector_of(const char* op, const char* name, const MaybeTensor& t, int64_t n,
                 const Tensor& x) {
  if (!t) return {nullptr, Dtype::kFloat32, 0};
  check(op, name, *t, t->scalar_type(), {n}, x);
  return {t->const_data_ptr(), dtype_of(op, name, *t), t->stride(0)};
}

void check_precision(const char* op, int64_t precision) {
  STD_TORCH_CHECK(precision == 0 || precision == 2, op,
                  ": expected precision 0 (fp32) or 2 (int8) on the CPU, got ", precision);
}

// `x` and `w` are copies held by the caller where their rows had to be made contiguous.
TopkEncodeParams encode_params(const char* op, const Tensor& x, const Tensor& w,
                               const MaybeTensor& b_enc, const MaybeTensor& b_pre, int64_t k,
                               int64_t precision, const MaybeTensor& guess) {
  TopkEncodeParams p = {};
  p.rows = x.size(0), p.width = x.size(1), p.features = w.size(0), p.k = k;
  check(op, "w_enc", w, w.scalar_type(), {kAny, p.width}, x);
  p.x = rows_of(op, "x", x);
  p.w_enc = rows_of(op, "w_enc", w);
  p.b_enc = vector_of(op, "b_enc", b_enc, p.features, x);
  p.b_pre = vector_of(op, "b_pre", b_pre, p.width, x);
  p.threshold = {nullptr, Dtype::kFloat32, 0};
  STD_TORCH_CHECK(p.rows < INT32_MAX && p.features < INT32_MAX, op,
                  ": expected fewer than 2^31 rows and features");
  check_precision(op, precision);
  p.precision = static_cast<TopkPrecision>(precision);
  if (guess) {
    const int64_t n = guess->dim() == 1 && guess->size(0) == 1 ? 1 : p.rows;
    check(op, "guess", *guess, ScalarType::Float, {n}, x);
    p.guess = static_cast<const float*>(guess->const_data_ptr());
    p.guess_stride = n == 1 ? 0 : guess->stride(0);
  }
  return p;
}

Tensor count_tensor(const Tensor& x, int64_t count) {
  Tensor t = torch::stable::new_empty(x, {1}, ScalarType::Long);
  *static_cast<int64_t*>(t.mutable_data_ptr()) = count;
  return t;
}

std::tuple<Tensor, Tensor, Tensor> topk_encode_cpu(Tensor x, Tensor w_enc, MaybeTensor b_enc,
                                                   MaybeTensor b_pre, int64_t k, int64_t precision,
                                                   MaybeTensor guess) {
  const char* op = "topk_encode";
  const Tensor rows = with_contiguous_rows(op, "x", x);
  const Tensor w = with_contiguous_rows(op, "w_enc", w_enc);
  TopkEncodeParams p = encode_params(op, rows, w, b_enc, b_pre, k, precision, guess);
  STD_TORCH_CHECK(k >= 1 && k <= p.features, op, ": expected 1 <= k <= F");
  p.mode = TopkMode::kRows;
  Tensor values = torch::stable::new_empty(x, {p.rows, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(x, {p.rows, k}, ScalarType::Int);
  const int64_t fallbacks =
      cpu::topk_encode(p, best_isa(), parallel_for, static_cast<float*>(values.mutable_data_ptr()),
                       static_cast<int32_t*>(indices.mutable_data_ptr()));
  return {values, indices, count_tensor(x, fallbacks)};
}

struct Lists {
  const Tensor& x;
  Tensor values, indices;
};

void allocate(int64_t count, float** values, int32_t** indices, void* context) {
  auto* lists = static_cast<Lists*>(context);
  lists->values = torch::stable::new_empty(lists->x, {count}, ScalarType::Float);
  lists->indices = torch::stable::new_empty(lists->x, {count}, ScalarType::Int);
  *values = static_cast<float*>(lists->values.mutable_data_ptr());
  *indices = static_cast<int32_t*>(lists->indices.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_encode_ragged_cpu(
    Tensor x, Tensor w_enc, MaybeTensor b_enc, MaybeTensor b_pre, int64_t k, MaybeTensor threshold,
    int64_t precision, MaybeTensor guess) {
  const char* op = "topk_encode_ragged";
  const Tensor rows = with_contiguous_rows(op, "x", x);
  const Tensor w = with_contiguous_rows(op, "w_enc", w_enc);
  TopkEncodeParams p = encode_params(op, rows, w, b_enc, b_pre, k, precision, guess);
  p.mode = threshold ? TopkMode::kThreshold : TopkMode::kBatch;
  if (threshold) {
    const int64_t n = threshold->dim() == 1 && threshold->size(0) == 1 ? 1 : p.features;
    p.threshold = vector_of(op, "threshold", threshold, n, x);
    if (n == 1) p.threshold.stride = 0;
  } else {
    STD_TORCH_CHECK(k >= 1 && k <= p.features, op, ": expected 1 <= k <= F");
  }
  Tensor offsets = torch::stable::new_empty(x, {p.rows + 1}, ScalarType::Long);
  Lists lists = {x, offsets, offsets};
  const int64_t fallbacks =
      cpu::topk_encode_ragged(p, best_isa(), parallel_for,
                              static_cast<int64_t*>(offsets.mutable_data_ptr()), allocate, &lists);
  return {lists.values, lists.indices, offsets, count_tensor(x, fallbacks)};
}

std::tuple<Tensor, Tensor, Tensor> topk_encode_backward_cpu(Tensor grad, Tensor indices,
                                                            MaybeTensor offsets, Tensor x,
                                                            Tensor w_enc, MaybeTensor b_pre,
                                                            int64_t precision, bool need_x,
                                                            bool need_w) {
  const char* op = "topk_encode_backward";
  const Tensor rows = with_contiguous_rows(op, "x", x);
  const Tensor w = with_contiguous_rows(op, "w_enc", w_enc);
  TopkBackwardParams p = {};
  p.rows = x.size(0), p.width = x.size(1), p.features = w.size(0);
  check(op, "w_enc", w, w.scalar_type(), {kAny, p.width}, x);
  p.x = rows_of(op, "x", rows);
  p.w_enc = rows_of(op, "w_enc", w);
  p.b_pre = vector_of(op, "b_pre", b_pre, p.width, x);
  check_precision(op, precision);
  const Tensor slopes = torch::stable::contiguous(grad);
  const Tensor which = torch::stable::contiguous(indices);
  const Tensor bounds = offsets ? torch::stable::contiguous(*offsets) : which;
  if (offsets) {
    check(op, "offsets", bounds, ScalarType::Long, {p.rows + 1}, x);
    check(op, "indices", which, ScalarType::Int, {kAny}, x);
    check(op, "grad", slopes, ScalarType::Float, {which.size(0)}, x);
    p.offsets = static_cast<const int64_t*>(bounds.const_data_ptr());
    bool fits = p.offsets[0] == 0 && p.offsets[p.rows] == which.size(0);
    for (int64_t n = 0; n < p.rows; ++n) fits = fits && p.offsets[n] <= p.offsets[n + 1];
    STD_TORCH_CHECK(fits, op, ": expected ascending offsets from 0 to ", which.size(0));
  } else {
    check(op, "indices", which, ScalarType::Int, {p.rows, kAny}, x);
    check(op, "grad", slopes, ScalarType::Float, {p.rows, which.size(1)}, x);
    p.k = which.size(1);
  }
  p.grad = static_cast<const float*>(slopes.const_data_ptr());
  p.indices = static_cast<const int32_t*>(which.const_data_ptr());
  const auto output = [&](bool needed, int64_t n) {
    return needed ? torch::stable::new_empty(x, {n, p.width}, ScalarType::Float)
                  : torch::stable::new_empty(x, {0}, ScalarType::Float);
  };
  Tensor dx = output(need_x, p.rows), dw = output(need_w, p.features);
  Tensor db = torch::stable::new_empty(x, {p.features}, ScalarType::Float);
  p.dx = need_x ? static_cast<float*>(dx.mutable_data_ptr()) : nullptr;
  p.dw = need_w ? static_cast<float*>(dw.mutable_data_ptr()) : nullptr;
  p.db = static_cast<float*>(db.mutable_data_ptr());
  cpu::topk_encode_backward(p, best_isa(), parallel_for);
  return {dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidechain, CPU, library) {
  library.impl("topk_encode", TORCH_BOX(&topk_encode_cpu));
  library.impl("topk_encode_ragged", TORCH_BOX(&topk_encode_ragged_cpu));
  library.impl("topk_encode_backward", TORCH_BOX(&topk_encode_backward_cpu));
}

}  // namespace sidechain::torch_ops
