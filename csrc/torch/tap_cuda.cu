// SPDX-License-Identifier: Apache-2.0
#include "cuda/tap.cuh"
#include "torch/cuda.h"
#include "torch/tap.h"

namespace sidechain::torch_ops {
namespace {

void tap_cuda(const Tensor& x, const TapParams& params) {
  const OnDevice device("tap_", x);
  const int64_t floats = cuda::tap_workspace_floats(params);
  std::optional<Tensor> workspace;
  if (floats > 0) workspace = torch::stable::new_empty(x, {floats}, ScalarType::Float);
  float* data = workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr;
  device.check(cuda::launch_tap(params, data, device.stream()));
}

}  // namespace

SIDECHAIN_CUDA_LIBRARY(library) { library.impl("tap_", TORCH_BOX(&tap_op<tap_cuda>)); }

}  // namespace sidechain::torch_ops
