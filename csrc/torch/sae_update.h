// SPDX-License-Identifier: Apache-2.0
// sae_update_ and sae_gradient_square: arguments of the schemas to params, and the bodies of both
// ops, which the CPU and the CUDA binding share.
#pragma once

#include "sidechain/sae_update.h"
#include "torch/codes.h"

namespace sidechain::torch_ops {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;
using Ints = std::vector<int64_t>;

// Structs of the public functions (python/sidechain/ops/sae_structs.py), with the columns of the
// groups as the schemas have them.
struct WeightTensors {
  const Tensor &w_enc, &w_dec;
  const MaybeTensor &b_enc, &b_pre;
};
struct StateTensors {
  const Tensor &enc_mean, &enc_square, &dec_mean, &dec_square;
  const MaybeTensor &bias_mean, &bias_square;
};
struct InputTensors {
  const Tensor& x;
  const Tensors &values, &indices;
  const MaybeTensors& offsets;
  const Tensors &dvalues, &error;
  const MaybeTensors& row_weight;
  bool project;
  const Ints& prefixes;
  int64_t first_feature;
};

inline CodeGroup code_group(const char* op, const InputTensors& t, size_t i,
                            const SaeGradientParams& p, const Tensor& like) {
  CodeGroup g = {};
  g.codes = codes_of(op, t.values[i], t.indices[i], t.offsets[i], like);
  STD_TORCH_CHECK(g.codes.rows == p.rows, op, ": expected codes of ", p.rows, " rows, got ",
                  g.codes.rows);
  g.dvalues_row = check_values(op, "dvalues", t.dvalues[i], t.indices[i], like);
  g.dvalues = static_cast<const float*>(t.dvalues[i].const_data_ptr());
  const Tensor& error = t.error[i];
  if (p.prefix_count > 0) {
    check(op, "error", error, ScalarType::Float, {p.prefix_count, p.rows, p.d_out}, like);
    g.error_level = error.stride(0), g.error_row = error.stride(1);
  } else {
    check(op, "error", error, ScalarType::Float, {p.rows, p.d_out}, like);
    g.error_row = row_stride(error);
  }
  check_last_contiguous(op, "error", error);
  g.error = static_cast<const float*>(error.const_data_ptr());
  check_vector(op, "row_weight", t.row_weight[i], ScalarType::Float, p.rows, like);
  g.row_weight = read<float>(t.row_weight[i]);
  return g;
}

inline SaeGradientParams gradient_params(const char* op, const WeightTensors& w,
                                         const InputTensors& in) {
  SaeGradientParams p = {};
  check(op, "w_dec", w.w_dec, ScalarType::Float, {kAny, kAny}, w.w_dec);
  check_contiguous(op, "w_dec", w.w_dec);
  p.features = w.w_dec.size(0);
  p.d_out = w.w_dec.size(1);
  check(op, "w_enc", w.w_enc, ScalarType::Float, {p.features, kAny}, w.w_dec);
  check_contiguous(op, "w_enc", w.w_enc);
  p.d_in = w.w_enc.size(1);
  check_matrix(op, "x", in.x, in.x.scalar_type(), kAny, p.d_in, w.w_dec);
  p.rows = in.x.size(0);
  p.x = in.x.const_data_ptr();
  p.x_dtype = dtype_of(op, "x", in.x);
  p.x_row = row_stride(in.x);
  check_vector(op, "b_pre", w.b_pre, ScalarType::Float, p.d_in, w.w_dec);
  p.b_pre = read<float>(w.b_pre);
  p.project = in.project;
  p.bias = w.b_enc.has_value();
  p.first_feature = in.first_feature;

  STD_TORCH_CHECK(in.prefixes.size() <= kMaxPrefixes, op, ": expected at most ", kMaxPrefixes,
                  " prefixes, got ", in.prefixes.size());
  p.prefix_count = static_cast<int32_t>(in.prefixes.size());
  for (size_t i = 0; i < in.prefixes.size(); ++i) p.prefixes[i] = in.prefixes[i];

  const size_t count = in.values.size();
  STD_TORCH_CHECK(count <= kMaxCodeGroups, op, ": expected at most ", kMaxCodeGroups,
                  " groups of codes, got ", count);
  STD_TORCH_CHECK(in.indices.size() == count && in.offsets.size() == count &&
                      in.dvalues.size() == count && in.error.size() == count &&
                      in.row_weight.size() == count,
                  op, ": expected lists of equal length");
  p.group_count = static_cast<int32_t>(count);
  for (size_t i = 0; i < count; ++i) p.groups[i] = code_group(op, in, i, p, w.w_dec);
  return p;
}

// Running statistics like a weight.
inline void* statistic(const Tensor& t, const Tensor& weight, ScalarType dtype) {
  check("sae_update_", "state", t, dtype, {weight.size(0), weight.size(1)}, weight);
  check_contiguous("sae_update_", "state", t);
  return t.mutable_data_ptr();
}

inline SaeState state_of(const WeightTensors& w, const StateTensors& t) {
  const char* op = "sae_update_";
  SaeState s = {};
  s.w_enc = static_cast<float*>(w.w_enc.mutable_data_ptr());
  s.w_dec = static_cast<float*>(w.w_dec.mutable_data_ptr());
  const ScalarType dtype = t.enc_mean.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": expected a state of float32 | bfloat16");
  s.dtype = dtype_of(op, "state", t.enc_mean);
  s.enc_mean = statistic(t.enc_mean, w.w_enc, dtype);
  s.enc_square = statistic(t.enc_square, w.w_enc, dtype);
  s.dec_mean = statistic(t.dec_mean, w.w_dec, dtype);
  s.dec_square = statistic(t.dec_square, w.w_dec, dtype);
  STD_TORCH_CHECK(w.b_enc.has_value() == t.bias_mean.has_value() &&
                      w.b_enc.has_value() == t.bias_square.has_value(),
                  op, ": expected b_enc and its state together");
  const int64_t features = w.w_dec.size(0);
  check_vector(op, "b_enc", w.b_enc, ScalarType::Float, features, w.w_dec);
  check_vector(op, "bias_mean", t.bias_mean, ScalarType::Float, features, w.w_dec);
  check_vector(op, "bias_square", t.bias_square, ScalarType::Float, features, w.w_dec);
  s.b_enc = write<float>(w.b_enc);
  s.bias_mean = write<float>(t.bias_mean);
  s.bias_square = write<float>(t.bias_square);
  return s;
}

// The body of sae_update_ on a backend, which runs the params on the device of w_dec.
template <void (*kRun)(const SaeUpdateParams&, const Tensor& w_dec)>
void update(Tensor w_enc, Tensor w_dec, MaybeTensor b_enc, MaybeTensor b_pre, Tensor enc_mean,
            Tensor enc_square, Tensor dec_mean, Tensor dec_square, MaybeTensor bias_mean,
            MaybeTensor bias_square, Tensor x, Tensors values, Tensors indices,
            MaybeTensors offsets, Tensors dvalues, Tensors error, MaybeTensors row_weight,
            bool project, Ints prefixes, int64_t first_feature, Tensor lr, Tensor step,
            double beta1, double beta2, double eps, double weight_decay, MaybeTensor clip_scale,
            bool unit_norm, MaybeTensor last_fired, MaybeTensor b_pre_grad) {
  const char* op = "sae_update_";
  const WeightTensors weights = {w_enc, w_dec, b_enc, b_pre};
  SaeUpdateParams p = {};
  p.gradient = gradient_params(
      op, weights,
      {x, values, indices, offsets, dvalues, error, row_weight, project, prefixes, first_feature});
  p.state = state_of(weights, {enc_mean, enc_square, dec_mean, dec_square, bias_mean, bias_square});
  check_vector(op, "lr", lr, ScalarType::Float, 1, w_dec);
  check_vector(op, "step", step, ScalarType::Long, 1, w_dec);
  check_vector(op, "clip_scale", clip_scale, ScalarType::Float, 1, w_dec);
  check_vector(op, "last_fired", last_fired, ScalarType::Long, p.gradient.features, w_dec);
  check_vector(op, "b_pre_grad", b_pre_grad, ScalarType::Float, p.gradient.d_in, w_dec);
  p.lr = read<float>(lr), p.step = read<int64_t>(step), p.clip_scale = read<float>(clip_scale);
  p.beta1 = beta1, p.beta2 = beta2, p.eps = eps, p.weight_decay = weight_decay;
  p.unit_norm = unit_norm;
  p.last_fired = write<int64_t>(last_fired);
  p.b_pre_grad = write<float>(b_pre_grad);
  kRun(p, w_dec);
}

// The body of sae_gradient_square, likewise.
template <void (*kRun)(const SaeGradientParams&, const Tensor& w_dec, float* out)>
Tensor gradient_square(Tensor w_enc, Tensor w_dec, MaybeTensor b_enc, MaybeTensor b_pre, Tensor x,
                       Tensors values, Tensors indices, MaybeTensors offsets, Tensors dvalues,
                       Tensors error, MaybeTensors row_weight, bool project, Ints prefixes,
                       int64_t first_feature) {
  const SaeGradientParams p = gradient_params(
      "sae_gradient_square", {w_enc, w_dec, b_enc, b_pre},
      {x, values, indices, offsets, dvalues, error, row_weight, project, prefixes, first_feature});
  Tensor out = new_like(w_dec, {1});
  kRun(p, w_dec, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace sidechain::torch_ops
