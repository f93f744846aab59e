// SPDX-License-Identifier: Apache-2.0
#include "cuda/sae_edit.cuh"
#include "torch/cuda.h"
#include "torch/sae_edit.h"

namespace sidechain::torch_ops {
namespace {

void edit_cuda(Tensor x, MaybeTensor values_old, MaybeTensor values_new, Tensor indices,
               MaybeTensor offsets, Tensor w_dec, MaybeTensor strength, MaybeTensor mask) {
  const OnDevice device("sae_edit_", x);
  const SaeEditParams p =
      sae_edit_params(x, values_old, values_new, indices, offsets, w_dec, strength, mask);
  device.check(cuda::launch_sae_edit(p, device.stream()));
}

}  // namespace

SIDECHAIN_CUDA_LIBRARY(library) { library.impl("sae_edit_", TORCH_BOX(&edit_cuda)); }

}  // namespace sidechain::torch_ops
