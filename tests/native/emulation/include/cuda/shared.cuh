// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/cuda/shared.cuh: `extern __shared__` has no form in host C++.
#pragma once

#include "emulation/runtime.h"

namespace sidechain::cuda {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared_memory());
}

}  // namespace sidechain::cuda
