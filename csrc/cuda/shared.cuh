// SPDX-License-Identifier: Apache-2.0
// Dynamic shared memory: one block of bytes per kernel, however it is typed. The emulation of
// tests/native/emulation puts its own in place of this file.
#pragma once

namespace sidechain::cuda {

template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

}  // namespace sidechain::cuda
