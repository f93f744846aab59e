// SPDX-License-Identifier: Apache-2.0
// Host side of the emulation: the launch calls of the CUDA runtime that the launchers use. Streams
// are in order and finished at once.
#pragma once

#include <cstring>
#include <tuple>
#include <utility>

#include "emulation/runtime.h"

struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> args;
  };
  Call call = {kernel, {std::forward<Args>(args)...}};
  const emulation::Launch launch = {reinterpret_cast<const void*>(kernel), config->gridDim,
                                    config->blockDim, config->dynamicSmemBytes};
  // Every thread gets its own copy of the parameters, as on the device.
  return emulation::run(
      launch,
      [](void* context) {
        const Call& call = *static_cast<const Call*>(context);
        std::apply(call.kernel, call.args);
      },
      &call);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return emulation::allow_shared_bytes(kernel, bytes);
}
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute,
                                 int bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, bytes);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
