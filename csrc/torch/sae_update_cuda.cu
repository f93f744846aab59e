// SPDX-License-Identifier: Apache-2.0
#include "cuda/sae_launch.cuh"
#include "torch/cuda.h"
#include "torch/sae_update.h"

namespace sidechain::torch_ops {
namespace {

void update_cuda(const SaeUpdateParams& p, const Tensor& w_dec) {
  const OnDevice device("sae_update_", w_dec);
  const Tensor workspace = new_workspace(w_dec, cuda::sae_update_workspace(p));
  device.check(cuda::launch_sae_update(p, workspace.mutable_data_ptr(), device.stream()));
}

void square_cuda(const SaeGradientParams& p, const Tensor& w_dec, float* out) {
  const OnDevice device("sae_gradient_square", w_dec);
  const Tensor workspace = new_workspace(w_dec, cuda::sae_square_workspace(p));
  device.check(cuda::launch_sae_square(p, static_cast<const float*>(w_dec.const_data_ptr()), out,
                                       workspace.mutable_data_ptr(), device.stream()));
}

}  // namespace

SIDECHAIN_CUDA_LIBRARY(library) {
  library.impl("sae_update_", TORCH_BOX(&update<update_cuda>));
  library.impl("sae_gradient_square", TORCH_BOX(&gradient_square<square_cuda>));
}

}  // namespace sidechain::torch_ops
