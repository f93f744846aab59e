// SPDX-License-Identifier: Apache-2.0
// The one way kernels are launched: a call of the CUDA runtime instead of <<<>>>, so that the same
// files compile as host C++ with the emulation of tests/native/emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace sidechain::cuda {

// kernel<<<grid, block, shared_bytes, stream>>>(args...) for a grid of one dimension; a grid that
// CUDA cannot have is refused.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t grid, int64_t block, size_t shared_bytes,
                   cudaStream_t stream, Args&&... args) {
  if (grid < 1 || grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace sidechain::cuda
