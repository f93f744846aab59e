// SPDX-License-Identifier: Apache-2.0
// Instruction sets that the CPU kernels are compiled for, and the choice among them at run time.
// avx512 means F, BW, DQ, VL and VNNI (Cascade Lake, Ice Lake, Zen 4 and later); the few processors
// with AVX-512 but without VNNI run avx2.
#pragma once

#if defined(__x86_64__)
// clang-format off
#define SIDECHAIN_FOR_EACH_ISA(X) X(kBaseline, baseline) X(kAvx2, avx2) X(kAvx512, avx512)
// clang-format on
#else
#define SIDECHAIN_FOR_EACH_ISA(X) X(kBaseline, baseline)
#endif

namespace sidechain {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

const char* isa_name(Isa isa);

// Whether this machine and its operating system can run code compiled for `isa`, and the kernels
// hold such code.
bool isa_supported(Isa isa);

// The best supported one, capped by the environment variable SIDECHAIN_ISA (read at the first call;
// an unknown name is ignored here and warned about in Python).
Isa best_isa();

}  // namespace sidechain
