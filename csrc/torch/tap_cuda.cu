// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/tap.cuh"
#include "torch/tap.h"

namespace sidechain::torch_ops {
namespace {

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void tap_cuda(Tensor x, MaybeTensor vectors, MaybeTensor steer_slot, MaybeTensor index,
              MaybeTensor strength, MaybeTensor removal, MaybeTensor steer_mask, bool renorm,
              MaybeTensor sums, MaybeTensor squares, MaybeTensor counts, MaybeTensor ring,
              MaybeTensor capture_slot, MaybeTensor capture_mask, int64_t ring_stride) {
  STD_TORCH_CHECK(x.is_cuda(), "tap_: expected x on a CUDA device");
  const TapParams params =
      tap_params(x, vectors, steer_slot, index, strength, removal, steer_mask, renorm, sums,
                 squares, counts, ring, capture_slot, capture_mask, ring_stride);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t floats = cuda::tap_workspace_floats(params);
  std::optional<Tensor> workspace;
  if (floats > 0) workspace = torch::stable::new_empty(x, {floats}, ScalarType::Float);
  float* data = workspace ? static_cast<float*>(workspace->mutable_data_ptr()) : nullptr;
  STD_CUDA_CHECK(cuda::launch_tap(params, data, current_stream(x)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidechain, CUDA, library) { library.impl("tap_", TORCH_BOX(&tap_cuda)); }

}  // namespace sidechain::torch_ops
