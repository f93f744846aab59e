// SPDX-License-Identifier: Apache-2.0
// The one way kernels are launched: a call of the CUDA runtime instead of <<<>>>, so that the same
// files compile as host C++ with the emulation of tests/native/emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace sidechain::cuda {

// Lets `kernel` have so much dynamic shared memory on the current device. CUDA wants to be asked
// where static and dynamic bytes together exceed 48 KB; who decides by the dynamic ones alone is
// wrong just below that, so every launch asks. What was granted is never taken back: a smaller
// launch of another thread must not shrink it between the question and the launch.
inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  if (bytes == 0) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> granted;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& known = granted[{device, kernel}];
  if (bytes <= known) return cudaSuccess;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
  if (status == cudaSuccess) known = bytes;
  return status;
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...) for a grid of one dimension; a grid that
// CUDA cannot have is refused.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t grid, int64_t block, size_t shared_bytes,
                   cudaStream_t stream, Args&&... args) {
  if (grid < 1 || grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t status =
      allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace sidechain::cuda
