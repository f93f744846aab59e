// SPDX-License-Identifier: Apache-2.0
#include "cpu/topk/screened_rows.h"

#include <algorithm>
#include <cmath>

namespace sidechain::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kTiny = 1e-20f;
// Rows of a block pass a panel of features together: the block stays in the second-level cache,
// the panel in the first.
constexpr int64_t kBlockRows = kMostRows;
static_assert(kBlockRows % kRowPanel == 0, "blocks hold whole panels");
// Candidates from which on raising the cut is worth its time, at least four times k. (On Zen 4 with
// AVX-512, 256 and eight times k cost 4 to 12 % more at k = 10 and 32.)
constexpr int64_t kLeastLook = 64;

}  // namespace

ScreenedRows::ScreenedRows(const PackedFeatures& packed, const Activations& x,
                           std::vector<int32_t> ids)
    : packed_(packed), x_(x), ids_(std::move(ids)), slots_(round_up(size(), kRowPanel)) {
  codes_.reset(allocate_codes(slots_ * packed_.padded()));
  step_.assign(slots_, kTiny);
  inverse_.assign(slots_, 1.0f / kTiny);
  reach_.assign(slots_, 0.0f);
  length_.assign(slots_, 0.0f);
  outliers_.assign(slots_ * packed_.outliers(), 0.0f);
  outlier_length_.assign(slots_, 0.0f);
  cut.assign(slots_, kInfinity);
  dropped.assign(slots_, 1);
  lists.resize(slots_);
  blocks([&](int64_t begin, int64_t end) { quantise(begin, end); });
}

void ScreenedRows::start_at(int64_t i, float at) {
  if (!dropped[i]) cut[i] = at > 0.0f && at < kInfinity ? at : 0.0f;
}

void ScreenedRows::screen(int64_t begin, int64_t end, int64_t k, float share) {
  blocks([&](int64_t first, int64_t last) { screen_block(first, last, begin, end, k, share); });
}

void ScreenedRows::raise(int64_t i, int64_t k, float share) {
  std::vector<uint32_t> orders;
  lower_bounds(i, share, orders);
  raise_to(i, cut_at(kth_largest(packed_.call().kernels, orders, k)));
}

void ScreenedRows::raise_to(int64_t i, float bound) {
  const float raised = std::max(cut[i], bound);
  cut[i] = raised;
  List& list = lists[i];
  size_t kept = 0;
  for (const Candidate& c : list) {
    list[kept] = c;
    kept += may_reach(c, raised);
  }
  list.resize(kept);
}

void ScreenedRows::lower_bounds(int64_t i, float share, std::vector<uint32_t>& orders) const {
  for (const Candidate& c : lists[i]) {
    const float bound = c.z - share * c.error;
    orders.push_back(bound == bound ? order_of(bound) : 0);
  }
}

template <class F>
void ScreenedRows::blocks(const F& body) {
  const int64_t n = round_up(slots_, kBlockRows) / kBlockRows;
  parallel(packed_.call().parallel_for, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      body(b * kBlockRows, std::min((b + 1) * kBlockRows, slots_));
    }
  });
}

void ScreenedRows::quantise(int64_t begin, int64_t end) {
  const TopkCall& call = packed_.call();
  const int64_t padded = packed_.padded();
  std::vector<float> copy(padded, 0.0f);
  for (int64_t i = begin; i < end; ++i) {
    const bool exists = i < size();
    const float* row = exists ? x_.row(ids_[i]) : copy.data();
    if (!exists) {
      std::fill(copy.begin(), copy.end(), 0.0f);
    } else if (packed_.outliers() > 0) {
      std::copy(row, row + padded, copy.begin());
      outlier_length_[i] =
          packed_.take_outliers(copy.data(), outliers_.data() + i * packed_.outliers());
      row = copy.data();
    }
    const int64_t salt = call.certified() ? 2 * (x_.first + (exists ? ids_[i] : 0)) : -1;
    const Quantised q = call.kernels.quantise_row(row, padded, salt, codes(i));
    if (!exists || !(q.norm2 + outlier_length_[i] < kInfinity)) continue;
    step_[i] = q.step;
    inverse_[i] = 1.0f / q.step;
    // |x'| <= |x| + |error of rounding|.
    const float rest = std::sqrt(q.norm2);
    length_[i] = std::hypot(rest, outlier_length_[i]);
    const float most = rest * inverse_[i] + std::sqrt(static_cast<float>(padded));
    reach_[i] = most * most;
    cut[i] = 0.0f;
    dropped[i] = 0;
  }
}

void ScreenedRows::screen_block(int64_t first, int64_t last, int64_t begin, int64_t end, int64_t k,
                                float share) {
  const int64_t n = last - first, features = packed_.features().size();
  // A list of half the dictionary is no screen; for large k it is the result.
  const auto most = static_cast<size_t>(std::max(features / 2, std::min(8 * k, features)));
  const std::unique_ptr<float[]> z(new float[n * packed_.panel_features() + kFoundSlack]);
  int32_t row[kBlockRows];
  uint32_t mask[kBlockRows];
  float error[kBlockRows];
  const Found found = {row, mask, z.get(), error};
  std::vector<int64_t> look(n, std::max(kLeastLook, 4 * k));
  for (int64_t i = first; k > 0 && i < last; ++i) lists[i].reserve(std::min(kLeastLook, k) + k);
  const ScreenRows rows = {codes(first),
                           n / kRowPanel,
                           packed_.padded() / kGroup,
                           step_.data() + first,
                           inverse_.data() + first,
                           reach_.data() + first,
                           cut.data() + first,
                           packed_.confidence(),
                           outliers_.data() + first * packed_.outliers(),
                           outlier_length_.data() + first,
                           packed_.outliers()};
  for (int64_t panel = begin; panel < end; ++panel) {
    const FeaturePanel columns = packed_.panel(panel);
    const int64_t hits = packed_.call().kernels.screen(rows, columns, found);
    const float* next = z.get();
    for (int64_t hit = 0; hit < hits; ++hit) {
      const int64_t i = first + row[hit];
      List& list = lists[i];
      if (dropped[i]) {
        next += __builtin_popcount(mask[hit]);
        continue;
      }
      for (uint32_t left = mask[hit]; left != 0; left &= left - 1) {
        const int32_t feature = columns.first + __builtin_ctz(left);
        list.push_back({*next++, feature, error[row[hit]] * packed_.share(feature)});
      }
      if (k == 0 || static_cast<int64_t>(list.size()) < look[row[hit]]) continue;
      raise(i, k, share);
      look[row[hit]] = std::max<int64_t>(2 * list.size(), look[row[hit]]);
      if (list.size() > most) {
        dropped[i] = 1;
        cut[i] = kInfinity;
        List().swap(list);
      }
    }
  }
}

}  // namespace sidechain::cpu
