// SPDX-License-Identifier: Apache-2.0
// attention_tap: tensors to AttentionTapParams, and the CPU binding.
#include "sidechain/attention_tap.h"

#include "torch/captures.h"
#include "torch/parallel.h"

namespace sidechain::torch_ops {
namespace {

constexpr char kOp[] = "attention_tap";
constexpr int64_t kWidestHead = 128;

ContextBank context_bank(const char* name, const Tensor& bank, int64_t width, const Tensor& q) {
  check(kOp, name, bank, q.scalar_type(), {kAny, kAny, kAny, width}, q);
  check_last_contiguous(kOp, name, bank);
  return {bank.const_data_ptr(), bank.stride(0), bank.stride(1), bank.stride(2)};
}

AttentionTapParams params_of(const Tensor& out, const Tensor& q, const Tensor& k_bank,
                             const Tensor& v_bank, const MaybeTensor& context_index,
                             const MaybeTensor& context_mask, std::optional<double> scale) {
  AttentionTapParams p = {};
  STD_TORCH_CHECK(q.dim() == 4, kOp, ": expected q of shape [R, T, H, D], got ", q.dim(), " dims");
  check_last_contiguous(kOp, "q", q);
  p.dtype = dtype_of(kOp, "q", q);
  p.rows = q.size(0), p.tokens = q.size(1), p.heads = q.size(2), p.width = q.size(3);
  STD_TORCH_CHECK(p.heads >= 1 && p.width >= 1 && p.width <= kWidestHead, kOp,
                  ": expected q with H >= 1 and 1 <= D <= ", kWidestHead);
  p.q = q.const_data_ptr();
  p.q_row = q.stride(0), p.q_token = q.stride(1), p.q_head = q.stride(2);
  check(kOp, "out", out, q.scalar_type(), {p.rows, p.tokens, p.heads, p.width}, q);
  STD_TORCH_CHECK(out.is_contiguous(), kOp, ": expected out to be contiguous");
  p.out = out.mutable_data_ptr();
  p.keys = context_bank("k_bank", k_bank, p.width, q);
  p.values = context_bank("v_bank", v_bank, p.width, q);
  p.contexts = k_bank.size(0), p.length = k_bank.size(1), p.kv_heads = k_bank.size(2);
  STD_TORCH_CHECK(p.contexts >= 1 && p.length >= 1 && p.kv_heads >= 1, kOp,
                  ": expected k_bank with M, S, Hkv >= 1");
  STD_TORCH_CHECK(p.heads % p.kv_heads == 0, kOp, ": expected Hkv that divides H");
  STD_TORCH_CHECK(
      v_bank.size(0) == p.contexts && v_bank.size(1) == p.length && v_bank.size(2) == p.kv_heads,
      kOp, ": expected v_bank of the shape of k_bank");
  const auto index = row_values<int32_t>(kOp, "context_index", context_index, ScalarType::Int, q);
  p.context_index = index.data;
  p.context_index_stride = index.stride;
  if (context_mask) {
    check(kOp, "context_mask", *context_mask, ScalarType::Bool, {p.contexts, p.length}, q);
    p.context_mask = {static_cast<const uint8_t*>(context_mask->const_data_ptr()),
                      context_mask->stride(0), context_mask->stride(1)};
  }
  p.scale =
      scale ? static_cast<float>(*scale) : 1.0f / __builtin_sqrtf(static_cast<float>(p.width));
  return p;
}

void attention_tap_cpu(Tensor out, Tensor q, Tensor k_bank, Tensor v_bank,
                       MaybeTensor context_index, MaybeTensor context_mask,
                       std::optional<double> scale, MaybeTensor sums, MaybeTensor squares,
                       MaybeTensor counts, MaybeTensor ring, MaybeTensor capture_slot,
                       MaybeTensor capture_mask) {
  AttentionTapParams p = params_of(out, q, k_bank, v_bank, context_index, context_mask, scale);
  fill_captures(kOp, p, p.heads * p.width,
                {sums, squares, counts, ring, capture_slot, capture_mask}, q);
  cpu::attention_tap(p, best_isa(), parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidechain, CPU, library) {
  library.impl("attention_tap", TORCH_BOX(&attention_tap_cpu));
}

}  // namespace sidechain::torch_ops
