// SPDX-License-Identifier: Apache-2.0
// Stands in for the header of the CUDA toolkit: asynchronous copies from global to shared memory.
// The bytes of a copy arrive when its thread waits for its group, never earlier; what the checkers
// hold against it is listed in runtime/copies.h.
#pragma once

#include <cstddef>

#include "emulation/runtime.h"

inline void __pipeline_memcpy_async(void* dst_shared, const void* src_global, size_t size_and_align,
                                    size_t zfill = 0, EMULATION_SITE) {
  emulation::copy_async(dst_shared, src_global, size_and_align, zfill, {file, line});
}
inline void __pipeline_commit() { emulation::commit_copies(); }
inline void __pipeline_wait_prior(size_t prior, EMULATION_SITE) {
  emulation::wait_copies(prior, {file, line});
}
