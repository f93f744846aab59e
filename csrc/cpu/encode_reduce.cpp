// SPDX-License-Identifier: Apache-2.0
// code_sums_ on the CPU: cuts the features into ranges, so that no two threads meet in a cell.
#include "sidechain/encode_reduce.h"

#include <algorithm>

#include "cpu/kernels/encode_reduce.h"

namespace sidechain::cpu {
namespace {

// Entries that a thread must have to be worth scanning the indices once more.
constexpr int64_t kEntries = 32768;

using SumCodes = void (*)(const CodeSumsParams&, int64_t, int64_t);

SumCodes entry(Isa isa) {
  switch (isa) {
#define SIDECHAIN_CASE(ID, NAME) \
  case Isa::ID:                  \
    return NAME::sum_codes;
    SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_CASE)
#undef SIDECHAIN_CASE
    default:
      return baseline::sum_codes;
  }
}

struct Job {
  const CodeSumsParams& p;
  SumCodes sum;
};

void call(int64_t begin, int64_t end, void* job) {
  const Job* self = static_cast<const Job*>(job);
  self->sum(self->p, begin, end);
}

}  // namespace

void code_sums(const CodeSumsParams& p, Isa isa, ParallelFor parallel_for) {
  for (int64_t n = 0; n < p.codes.rows; ++n) {
    const int64_t label = p.label != nullptr ? p.label[n * p.label_stride] : 0;
    if (label >= 0 && label < p.labels) ++p.rows[label];
  }
  Job job = {p, entry(isa)};
  if (parallel_for == nullptr) return call(0, p.features, &job);
  const int64_t entries = p.codes.offsets ? p.codes.capacity : p.codes.rows * p.codes.width;
  const int64_t threads = std::max<int64_t>(1, entries / kEntries);
  parallel_for(p.features, std::max<int64_t>(1, (p.features + threads - 1) / threads), call, &job);
}

}  // namespace sidechain::cpu
