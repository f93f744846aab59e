// SPDX-License-Identifier: Apache-2.0
#include "cuda/sae_launch.cuh"
#include "torch/cuda.h"
#include "torch/sae_update.h"

namespace sidechain::torch_ops {
namespace {

void update_cuda(Tensor w_enc, Tensor w_dec, MaybeTensor b_enc, Tensor enc_mean, Tensor enc_square,
                 Tensor dec_mean, Tensor dec_square, MaybeTensor bias_mean, MaybeTensor bias_square,
                 Tensor x, MaybeTensor b_pre, Tensors values, Tensors indices, MaybeTensors offsets,
                 Tensors dvalues, Tensors error, MaybeTensors row_weight, Tensor lr, Tensor step,
                 double beta1, double beta2, double eps, double weight_decay, bool unit_norm,
                 bool project, MaybeTensor clip_scale, Ints prefixes, int64_t first_feature,
                 MaybeTensor last_fired, MaybeTensor fire_count, MaybeTensor row_step,
                 MaybeTensor enc_copy, MaybeTensor dec_copy, MaybeTensor b_pre_grad,
                 MaybeTensor grad_square) {
  const OnDevice device("sae_update_", w_dec);
  SaeUpdateParams p = {};
  p.gradient = gradient_params("sae_update_", w_enc, w_dec, x, b_pre,
                               {values, indices, offsets, dvalues, error, row_weight}, project,
                               b_enc.has_value(), prefixes, first_feature);
  p.state = state_of(w_enc, w_dec, b_enc, enc_mean, enc_square, dec_mean, dec_square, bias_mean,
                     bias_square);
  p.lr = number<float>("lr", lr, ScalarType::Float, w_dec);
  p.step = number<int64_t>("step", step, ScalarType::Long, w_dec);
  p.clip_scale = number<float>("clip_scale", clip_scale, ScalarType::Float, w_dec);
  p.beta1 = beta1, p.beta2 = beta2, p.eps = eps, p.weight_decay = weight_decay;
  p.unit_norm = unit_norm;
  set_outputs({last_fired, fire_count, row_step, enc_copy, dec_copy, b_pre_grad, grad_square},
              w_enc, w_dec, p);
  const Tensor workspace = new_workspace(w_dec, cuda::sae_update_workspace(p));
  device.check(cuda::launch_sae_update(p, workspace.mutable_data_ptr(), device.stream()));
}

Tensor square_cuda(Tensor w_enc, Tensor w_dec, Tensor x, MaybeTensor b_pre, Tensors values,
                   Tensors indices, MaybeTensors offsets, Tensors dvalues, Tensors error,
                   MaybeTensors row_weight, bool bias, bool project, Ints prefixes,
                   int64_t first_feature) {
  const OnDevice device("sae_gradient_square", w_dec);
  const SaeGradientParams p =
      gradient_params("sae_gradient_square", w_enc, w_dec, x, b_pre,
                      {values, indices, offsets, dvalues, error, row_weight}, project, bias,
                      prefixes, first_feature);
  Tensor out = new_like(w_dec, {1});
  const Tensor workspace = new_workspace(w_dec, cuda::sae_square_workspace(p));
  device.check(cuda::launch_sae_square(p, static_cast<const float*>(w_dec.const_data_ptr()),
                                       static_cast<float*>(out.mutable_data_ptr()),
                                       workspace.mutable_data_ptr(), device.stream()));
  return out;
}

}  // namespace

SIDECHAIN_CUDA_LIBRARY(library) {
  library.impl("sae_update_", TORCH_BOX(&update_cuda));
  library.impl("sae_gradient_square", TORCH_BOX(&square_cuda));
}

}  // namespace sidechain::torch_ops
