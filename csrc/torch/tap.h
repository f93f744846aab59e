// SPDX-License-Identifier: Apache-2.0
// tap_: tensors to TapParams, shared by the CPU and the CUDA binding.
#pragma once

#include "sidechain/tap.h"
#include "torch/captures.h"

namespace sidechain::torch_ops {

// `Steering` of python/sidechain/reference/tap_structs.py, as the op's arguments hold it.
struct Steering {
  const MaybeTensor &vectors, &slot, &index, &strength, &removal, &mask;
  bool renorm;
};

inline void fill_steering(TapParams& p, const Steering& steering, const Tensor& x) {
  const auto& [vectors, steer_slot, index, strength, removal, mask, renorm] = steering;
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
  STD_TORCH_CHECK(vectors || !(strength || removal || index || steer_slot || mask),
                  "tap_: expected vectors beside what steers with them");
  p.steer_slot = slot("tap_", "steer_slot", steer_slot, x);
  const auto which = row_values<int32_t>("tap_", "index", index, ScalarType::Int, x);
  p.index = which.data, p.index_stride = which.stride;
  const auto a = row_values<float>("tap_", "strength", strength, ScalarType::Float, x);
  p.strength = a.data, p.strength_stride = a.stride;
  const auto b = row_values<float>("tap_", "removal", removal, ScalarType::Float, x);
  p.removal = b.data, p.removal_stride = b.stride;
  p.steer_mask = token_mask("tap_", "steer_mask", mask, p.rows, p.tokens, x);
  p.renorm = renorm;
}

inline TapParams tap_params(const Tensor& x, const Steering& steering, const Capture& capture) {
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
  fill_steering(p, steering, x);
  fill_captures("tap_", p, p.channels, capture, x);
  return p;
}

// The op with the arguments of its schema; `run(x, params)` is what a device does about it.
template <void (*run)(const Tensor&, const TapParams&)>
void tap_op(Tensor x, MaybeTensor vectors, MaybeTensor steer_slot, MaybeTensor index,
            MaybeTensor strength, MaybeTensor removal, MaybeTensor steer_mask, bool renorm,
            MaybeTensor sums, MaybeTensor squares, MaybeTensor counts, MaybeTensor ring,
            MaybeTensor capture_slot, MaybeTensor capture_mask) {
  run(x, tap_params(x, {vectors, steer_slot, index, strength, removal, steer_mask, renorm},
                    {sums, squares, counts, ring, capture_slot, capture_mask}));
}

}  // namespace sidechain::torch_ops
