// SPDX-License-Identifier: Apache-2.0
// Gradients of topk_encode: sums of the rows of w_enc over the codes of a row, and of those of x
// over the codes of a feature, in a fixed order.
#include "cpu/topk/support.h"

namespace sidechain::cpu {

void topk_encode_backward(const TopkBackwardParams& p, Isa isa, ParallelFor parallel_for) {
  const TopkKernels kernels = topk_kernels(isa);
  // Calls visit(feature, gradient) for the active codes of row n.
  const auto codes_of = [&](int64_t n, const auto& visit) {
    const int64_t end = p.offsets ? p.offsets[n + 1] : (n + 1) * p.k;
    for (int64_t i = p.offsets ? p.offsets[n] : n * p.k; i < end; ++i) {
      if (p.indices[i] >= 0 && p.indices[i] < p.features) visit(p.indices[i], p.grad[i]);
    }
  };
  if (p.dx != nullptr) {
    parallel(parallel_for, p.rows, 4, [&](int64_t begin, int64_t end) {
      std::vector<Term> terms;
      for (int64_t n = begin; n < end; ++n) {
        terms.clear();
        codes_of(n, [&](int32_t feature, float grad) { terms.push_back({feature, grad}); });
        kernels.sum_rows(p.w_enc, terms.data(), terms.size(), p.width, nullptr, p.dx + n * p.width);
      }
    });
  }
  const auto codes = group_by_feature<Term>(p.features, [&](const auto& add) {
    for (int64_t n = 0; n < p.rows; ++n) {
      codes_of(n, [&](int32_t f, float grad) { add(f, {static_cast<int32_t>(n), grad}); });
    }
  });
  const std::vector<float> b_pre = floats(p.b_pre, p.width, kernels);
  parallel(parallel_for, p.features, 8, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) {
      const Term* terms = codes.entries.data() + codes.start[f];
      const int64_t count = codes.start[f + 1] - codes.start[f];
      double sum = 0.0;
      for (int64_t e = 0; e < count; ++e) sum += terms[e].scale;
      p.db[f] = static_cast<float>(sum);
      if (p.dw == nullptr) continue;
      kernels.sum_rows(p.x, terms, count, p.width, b_pre.empty() ? nullptr : b_pre.data(),
                       p.dw + f * p.width);
    }
  });
}

}  // namespace sidechain::cpu
