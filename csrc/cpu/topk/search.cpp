// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <numeric>

#include "cpu/topk/steps.h"

namespace sidechain::cpu {
namespace {

// Rows from which on it pays to screen a few of them first.
constexpr int64_t kEstimateFrom = 256;
constexpr int64_t kSampleRows = 2 * kRowPanel;
constexpr int64_t kJointSampleRows = 64;
constexpr float kSampleShare = 0.9f;

}  // namespace

float estimate_start(const PackedFeatures& packed, const Activations& x) {
  const TopkCall& call = packed.call();
  const bool joint = call.p.mode == TopkMode::kBatch;
  const int64_t n = std::min(joint ? kJointSampleRows : kSampleRows, x.count);
  std::vector<int32_t> ids(n);
  for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(i * x.count / n);
  ScreenedRows set(packed, x, ids);
  screen(set, {joint ? n * call.p.k : call.p.k, joint}, estimated_share(call));
  float start = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    if (set.dropped[i]) continue;
    if (!joint) set.raise(i, call.p.k, kLikelyShare);
    start = std::min(start, kSampleShare * set.cut[i] / (joint ? 1.0f : set.length(i)));
  }
  return start < std::numeric_limits<float>::infinity() ? start : 0.0f;
}

std::vector<int32_t> search(const PackedFeatures& packed, const Activations& x,
                            std::vector<List>& lists) {
  const TopkEncodeParams& p = packed.call().p;
  std::vector<int32_t> ids(x.count);
  std::iota(ids.begin(), ids.end(), 0);
  const bool given = p.guess != nullptr;
  if (p.mode != TopkMode::kThreshold && (given || x.count >= kEstimateFrom)) {
    const float start = given ? 0.0f : estimate_start(packed, x);
    ScreenedRows set(packed, x, ids);
    for (int64_t i = 0; i < set.size(); ++i) {
      const float own = p.mode == TopkMode::kBatch ? start : start * set.length(i);
      set.start_at(i, given ? p.guess[(x.first + i) * p.guess_stride] : own);
    }
    ids = prove(set, Start::kEstimate, lists);
  }
  if (ids.empty()) return ids;
  ScreenedRows set(packed, x, ids);
  return prove(set, Start::kZero, lists);
}

}  // namespace sidechain::cpu
