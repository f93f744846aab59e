// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/torch/cuda.h: the bindings of the CUDA ops serve CPU tensors, and a launch
// that failed raises with the diagnosis of the emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "torch/checks.h"

#define SIDECHAIN_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(sidechain, CPU, library)

namespace sidechain::torch_ops {

class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& x) : op_(op) {
    STD_TORCH_CHECK(x.is_cpu(), op, ": expected x in host memory");
  }
  cudaStream_t stream() const { return nullptr; }
  void check(cudaError_t status) const {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string(op_) + ": " + emulation::last_failure());
  }

 private:
  const char* op_;
};

// Filled with NaNs: kernels must not count on what it holds.
inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  Tensor memory = torch::stable::new_empty(like, {bytes / 8 + 1}, ScalarType::Double);
  std::memset(memory.mutable_data_ptr(), 0xff, (bytes / 8 + 1) * 8);
  return memory;
}

}  // namespace sidechain::torch_ops
