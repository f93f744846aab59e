// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/torch/cuda.h: the bindings of the CUDA ops serve CPU tensors, and a launch
// that failed raises with the diagnosis of the emulation.
#pragma once

#include <cuda_runtime.h>

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

}  // namespace sidechain::torch_ops
