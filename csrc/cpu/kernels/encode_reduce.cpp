// SPDX-License-Identifier: Apache-2.0
// Loop body of code_sums_, compiled once per instruction set. A scatter, bound by the latency of
// its three buffers: every range of features reads all indices and keeps those of its own.
#include "cpu/kernels/encode_reduce.h"

#include <cstdint>

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {

void sum_codes(const CodeSumsParams& p, int64_t begin, int64_t end) {
  for (int64_t n = 0; n < p.codes.rows; ++n) {
    const int64_t label = p.label != nullptr ? p.label[n * p.label_stride] : 0;
    if (label < 0 || label >= p.labels) continue;
    const CodeRow at = code_row(p.codes, n);
    for (int64_t j = 0; j < at.count; ++j) {
      const int64_t feature = p.codes.indices[at.indices + j];
      if (feature < begin || feature >= end) continue;
      const float value = p.codes.values[at.values + j];
      if (value == 0.0f) continue;
      const int64_t cell = label * p.features + feature;
      p.sums[cell] += value;
      p.squares[cell] += value * value;
      ++p.counts[cell];
    }
  }
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
