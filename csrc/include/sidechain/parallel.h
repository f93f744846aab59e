// SPDX-License-Identifier: Apache-2.0
// How the CPU kernels hand their work to the threads of the caller.
#pragma once

#include <cstdint>

namespace sidechain::cpu {

// Runs body(begin, end) over [0, n) split in any way; `grain` = fewest iterations worth a thread.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, int64_t grain, Body body, void* context);

// Everything at once, in the calling thread.
inline void serial(int64_t n, int64_t /*grain*/, Body body, void* context) { body(0, n, context); }

// What an entry point was given, or `serial` where it was given nothing.
inline ParallelFor or_serial(ParallelFor given) { return given != nullptr ? given : serial; }

}  // namespace sidechain::cpu
