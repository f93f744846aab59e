// SPDX-License-Identifier: Apache-2.0
#include "cuda/tap.cuh"
#include "torch/cuda.h"
#include "torch/tap.h"

namespace sidechain::torch_ops {
namespace {

void tap_cuda(Tensor x, MaybeTensor vectors, MaybeTensor steer_slot, MaybeTensor index,
              MaybeTensor strength, MaybeTensor removal, MaybeTensor steer_mask, bool renorm,
              MaybeTensor sums, MaybeTensor squares, MaybeTensor counts, MaybeTensor ring,
              MaybeTensor capture_slot, MaybeTensor capture_mask, int64_t ring_stride) {
  const OnDevice device("tap_", x);
  const TapParams params =
      tap_params(x, vectors, steer_slot, index, strength, removal, steer_mask, renorm, sums,
                 squares, counts, ring, capture_slot, capture_mask, ring_stride);
  const int64_t floats = cuda::tap_workspace_floats(params);
  std::optional<Tensor> workspace;
  if (floats > 0) workspace = torch::stable::new_empty(x, {floats}, ScalarType::Float);
  float* data = workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr;
  device.check(cuda::launch_tap(params, data, device.stream()));
}

}  // namespace

SIDECHAIN_CUDA_LIBRARY(library) { library.impl("tap_", TORCH_BOX(&tap_cuda)); }

}  // namespace sidechain::torch_ops
