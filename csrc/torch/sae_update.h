// SPDX-License-Identifier: Apache-2.0
// sae_update_: tensors to params, shared by the CPU and the CUDA binding.
#pragma once

#include "sidechain/sae_update.h"
#include "torch/codes.h"

namespace sidechain::torch_ops {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;
using Ints = std::vector<int64_t>;

// The columns of the groups as the schema has them.
struct GroupTensors {
  const Tensors &values, &indices;
  const MaybeTensors& offsets;
  const Tensors &dvalues, &error;
  const MaybeTensors& row_weight;
};

inline CodeGroup code_group(const char* op, const GroupTensors& t, size_t i,
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

inline SaeGradientParams gradient_params(const char* op, const Tensor& w_enc, const Tensor& w_dec,
                                         const Tensor& x, const MaybeTensor& b_pre,
                                         const GroupTensors& groups, bool project, bool bias,
                                         const Ints& prefixes, int64_t first_feature) {
  SaeGradientParams p = {};
  check(op, "w_dec", w_dec, ScalarType::Float, {kAny, kAny}, w_dec);
  check_contiguous(op, "w_dec", w_dec);
  p.features = w_dec.size(0);
  p.d_out = w_dec.size(1);
  check(op, "w_enc", w_enc, ScalarType::Float, {p.features, kAny}, w_dec);
  check_contiguous(op, "w_enc", w_enc);
  p.d_in = w_enc.size(1);
  check_matrix(op, "x", x, x.scalar_type(), kAny, p.d_in, w_dec);
  p.rows = x.size(0);
  p.x = x.const_data_ptr();
  p.x_dtype = dtype_of(op, "x", x);
  p.x_row = row_stride(x);
  check_vector(op, "b_pre", b_pre, ScalarType::Float, p.d_in, w_dec);
  p.b_pre = read<float>(b_pre);
  p.project = project;
  p.bias = bias;
  p.first_feature = first_feature;

  STD_TORCH_CHECK(prefixes.size() <= kMaxPrefixes, op, ": expected at most ", kMaxPrefixes,
                  " prefixes, got ", prefixes.size());
  p.prefix_count = static_cast<int32_t>(prefixes.size());
  for (size_t i = 0; i < prefixes.size(); ++i) p.prefixes[i] = prefixes[i];

  const size_t count = groups.values.size();
  STD_TORCH_CHECK(count <= kMaxCodeGroups, op, ": expected at most ", kMaxCodeGroups,
                  " groups of codes, got ", count);
  STD_TORCH_CHECK(groups.indices.size() == count && groups.offsets.size() == count &&
                      groups.dvalues.size() == count && groups.error.size() == count &&
                      groups.row_weight.size() == count,
                  op, ": expected lists of equal length");
  p.group_count = static_cast<int32_t>(count);
  for (size_t i = 0; i < count; ++i) p.groups[i] = code_group(op, groups, i, p, w_dec);
  return p;
}

// A tensor of float32 or bfloat16 moments like a weight.
inline void* moment(const Tensor& t, const Tensor& weight, ScalarType dtype) {
  check("sae_update_", "moments", t, dtype, {weight.size(0), weight.size(1)}, weight);
  check_contiguous("sae_update_", "moments", t);
  return t.mutable_data_ptr();
}

inline SaeState state_of(const Tensor& w_enc, const Tensor& w_dec, const MaybeTensor& b_enc,
                         const Tensor& enc_mean, const Tensor& enc_square, const Tensor& dec_mean,
                         const Tensor& dec_square, const MaybeTensor& bias_mean,
                         const MaybeTensor& bias_square) {
  const char* op = "sae_update_";
  SaeState s = {};
  s.w_enc = static_cast<float*>(w_enc.mutable_data_ptr());
  s.w_dec = static_cast<float*>(w_dec.mutable_data_ptr());
  const ScalarType dtype = enc_mean.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": expected moments of float32 | bfloat16");
  s.moments = dtype_of(op, "moments", enc_mean);
  s.enc_mean = moment(enc_mean, w_enc, dtype);
  s.enc_square = moment(enc_square, w_enc, dtype);
  s.dec_mean = moment(dec_mean, w_dec, dtype);
  s.dec_square = moment(dec_square, w_dec, dtype);
  STD_TORCH_CHECK(
      b_enc.has_value() == bias_mean.has_value() && b_enc.has_value() == bias_square.has_value(),
      op, ": expected b_enc and its moments together");
  const int64_t features = w_dec.size(0);
  check_vector(op, "b_enc", b_enc, ScalarType::Float, features, w_dec);
  check_vector(op, "bias_mean", bias_mean, ScalarType::Float, features, w_dec);
  check_vector(op, "bias_square", bias_square, ScalarType::Float, features, w_dec);
  s.b_enc = write<float>(b_enc);
  s.bias_mean = write<float>(bias_mean);
  s.bias_square = write<float>(bias_square);
  return s;
}

// One number on the device of the weights.
template <class T>
const T* number(const char* name, const MaybeTensor& t, ScalarType dtype, const Tensor& like) {
  check_vector("sae_update_", name, t, dtype, 1, like);
  return read<T>(t);
}

inline void* copy_target(const char* name, const MaybeTensor& t, const Tensor& weight,
                         Dtype& dtype) {
  if (!t) return nullptr;
  check("sae_update_", name, *t, t->scalar_type(), {weight.size(0), weight.size(1)}, weight);
  check_contiguous("sae_update_", name, *t);
  dtype = dtype_of("sae_update_", name, *t);
  STD_TORCH_CHECK(dtype != Dtype::kFloat32, "sae_update_: expected ", name,
                  " of bfloat16 | float16");
  return t->mutable_data_ptr();
}

// What the step writes beside the weights and their moments.
struct UpdateOutputs {
  const MaybeTensor &last_fired, &fire_count, &row_step, &enc_copy, &dec_copy, &b_pre_grad,
      &grad_square;
};

inline void set_outputs(const UpdateOutputs& out, const Tensor& w_enc, const Tensor& w_dec,
                        SaeUpdateParams& p) {
  const char* op = "sae_update_";
  const int64_t features = w_dec.size(0);
  check_vector(op, "last_fired", out.last_fired, ScalarType::Long, features, w_dec);
  check_vector(op, "fire_count", out.fire_count, ScalarType::Long, features, w_dec);
  check_vector(op, "row_step", out.row_step, ScalarType::Long, features, w_dec);
  check_vector(op, "b_pre_grad", out.b_pre_grad, ScalarType::Float, w_enc.size(1), w_dec);
  check_vector(op, "grad_square", out.grad_square, ScalarType::Float, 1, w_dec);
  p.last_fired = write<int64_t>(out.last_fired);
  p.fire_count = write<int64_t>(out.fire_count);
  p.row_step = write<int64_t>(out.row_step);
  p.b_pre_grad = write<float>(out.b_pre_grad);
  p.grad_square = write<float>(out.grad_square);
  p.enc_copy = copy_target("enc_copy", out.enc_copy, w_enc, p.enc_copy_dtype);
  p.dec_copy = copy_target("dec_copy", out.dec_copy, w_dec, p.dec_copy_dtype);
}

}  // namespace sidechain::torch_ops
