// SPDX-License-Identifier: Apache-2.0
// What a CUDA binding needs of torch beside tensors: the dispatch key, the device, its stream, and
// the check of a launch. The emulation of tests/native/emulation puts its own in place of this
// file.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "torch/checks.h"

#define SIDECHAIN_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(sidechain, CUDA, library)

namespace sidechain::torch_ops {

// Makes the device of x the current one for the life of the object.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& x) : guard_(checked(op, x)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  void check(cudaError_t status) const { STD_CUDA_CHECK(status); }

 private:
  static int32_t checked(const char* op, const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), op, ": expected x on a CUDA device");
    return x.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Scratch memory of a launch on the device of `like`; at least one element, so that it has an
// address. The allocator orders its reuse behind the stream.
inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes / 8 + 1}, ScalarType::Double);
}

}  // namespace sidechain::torch_ops
