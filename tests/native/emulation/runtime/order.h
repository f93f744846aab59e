// SPDX-License-Identifier: Apache-2.0
// The order checker: every load and store of a kernel, as ThreadSanitizer instruments them, is held
// against those before it. Found without luck of the schedule: two threads that touch the same
// bytes, at least one of them writing, with no barrier between; a read of shared memory that
// nothing in the block wrote; an access to what an asynchronous copy still writes. Blocks of one
// launch are never ordered. Atomics do not race with atomics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "image.h"

namespace emulation::order {

#if defined(EMULATION_ORDER)
constexpr bool kActive = true;
#else
constexpr bool kActive = false;
#endif

// What the scheduler tells.
void begin_launch(const std::vector<SharedArray>& static_shared);
void begin_block(const void* dynamic_shared, size_t bytes);
void barrier();            // all threads of the block have met
void sync_warp(int warp);  // all its lanes have met at __syncwarp
void atomic(const void* address, size_t size);
// An asynchronous copy of the running thread reads `taken` bytes and writes `size`: at any time
// from its issue to its wait, when it has arrived.
void begin_copy(const void* dst, size_t size, const void* src, size_t taken);
void end_copy(const void* dst, size_t size, const void* src, size_t taken);

}  // namespace emulation::order
