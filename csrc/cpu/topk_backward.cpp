// SPDX-License-Identifier: Apache-2.0
// Gradients of topk_encode: sums of the rows of w_enc over the codes of a row, and of those of x
// over the codes of a feature, in a fixed order.
#include <numeric>

#include "cpu/topk_dictionary.h"

namespace sidechain::cpu {

void topk_encode_backward(const TopkBackwardParams& p, Isa isa, ParallelFor parallel_for) {
  const TopkKernels kernels = topk_kernels(isa);
  const auto begin_of = [&](int64_t n) { return p.offsets ? p.offsets[n] : n * p.k; };
  const auto active = [&](int64_t i) { return p.indices[i] >= 0 && p.indices[i] < p.features; };
  if (p.dx != nullptr) {
    parallel(parallel_for, p.rows, 4, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> which;
      std::vector<float> scale;
      for (int64_t n = begin; n < end; ++n) {
        which.clear();
        scale.clear();
        for (int64_t i = begin_of(n); i < begin_of(n + 1); ++i) {
          if (!active(i)) continue;
          which.push_back(p.indices[i]);
          scale.push_back(p.grad[i]);
        }
        kernels.sum_rows(p.w_enc, which.data(), scale.data(), which.size(), p.width, nullptr,
                         p.bf16, p.dx + n * p.width);
      }
    });
  }
  // The codes by feature, rows ascending.
  std::vector<int64_t> at(p.features + 1, 0);
  const int64_t codes = begin_of(p.rows);
  for (int64_t i = 0; i < codes; ++i) {
    if (active(i)) ++at[p.indices[i] + 1];
  }
  std::partial_sum(at.begin(), at.end(), at.begin());
  std::vector<int32_t> which(at.back());
  std::vector<float> scale(at.back());
  std::vector<int64_t> next(at.begin(), at.end() - 1);
  for (int64_t n = 0; n < p.rows; ++n) {
    for (int64_t i = begin_of(n); i < begin_of(n + 1); ++i) {
      if (!active(i)) continue;
      const int64_t to = next[p.indices[i]]++;
      which[to] = static_cast<int32_t>(n);
      scale[to] = p.grad[i];
    }
  }
  const std::vector<float> minus = floats(p.b_pre, p.width, kernels);
  parallel(parallel_for, p.features, 8, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) {
      double sum = 0.0;
      for (int64_t e = at[f]; e < at[f + 1]; ++e) sum += scale[e];
      p.db[f] = static_cast<float>(sum);
      if (p.dw == nullptr) continue;
      kernels.sum_rows(p.x, which.data() + at[f], scale.data() + at[f], at[f + 1] - at[f], p.width,
                       minus.empty() ? nullptr : minus.data(), p.bf16, p.dw + f * p.width);
    }
  });
}

}  // namespace sidechain::cpu
