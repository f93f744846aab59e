// SPDX-License-Identifier: Apache-2.0
#include "sidechain/isa.h"

#include <cstdlib>
#include <cstring>

namespace sidechain {
namespace {

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

Isa choose() {
  Isa cap = Isa::kAvx512;
  if (const char* name = std::getenv("SIDECHAIN_ISA")) {
    for (Isa isa : kAll) {
      if (std::strcmp(name, isa_name(isa)) == 0) cap = isa;
    }
  }
  Isa best = Isa::kBaseline;
  for (Isa isa : kAll) {
    if (isa <= cap && isa_supported(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  // These builtins ask the operating system (XGETBV) as well as the processor.
  switch (isa) {
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && isa_supported(Isa::kAvx2);
    case Isa::kBaseline:
      break;
  }
  return true;
#else
  return isa == Isa::kBaseline;
#endif
}

Isa best_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace sidechain
