// SPDX-License-Identifier: Apache-2.0
// A set of rows on their way through the screen of topk_encode.
#pragma once

#include "cpu/topk_dictionary.h"

namespace sidechain::cpu {

// Order of values: NaN above infinity above numbers; nothing below zero counts.
inline uint32_t order_of(float z) {
  if (z != z) return 0xffffffffu;
  if (!(z > 0.0f)) return 0;
  uint32_t bits;
  std::memcpy(&bits, &z, sizeof(bits));
  return bits;
}
inline float value_of(uint32_t order) {
  float z;
  std::memcpy(&z, &order, sizeof(z));
  return z;
}

// What a value of this order lets be cut off: everything that stays below it after rounding.
inline float cut_at(uint32_t order) {
  const float z = value_of(order);
  return z == z ? z - kRounding * z : std::numeric_limits<float>::infinity();
}

// The k-th largest of `orders`, 0 if there are fewer; appends zeros.
inline uint32_t kth_largest(const TopkKernels& kernels, std::vector<uint32_t>& orders, int64_t k) {
  if (static_cast<int64_t>(orders.size()) < k) return 0;
  orders.resize(round_up(orders.size(), kMostLanes), 0);
  return kernels.kth_largest(orders.data(), orders.size(), k);
}

// Rows of a block pass a panel of features together: the block stays in the second-level cache,
// the panel in the first.
constexpr int64_t kBlockRows = kMostRows;
static_assert(kBlockRows % kRowPanel == 0, "blocks hold whole panels");
// Candidates from which on raising the cut is worth its time, at least four times k. (On Zen 4 with
// AVX-512, 256 and eight times k cost 4 to 12 % more at k = 10 and 32.)
constexpr int64_t kLeastLook = 64;

class RowSet {
 public:
  // Rows `ids` of x [.., padded] float32; ids are also what the stochastic rounding depends on.
  RowSet(const Dictionary& dictionary, const TopkKernels& kernels, ParallelFor parallel_for,
         const float* x, int64_t first_row, std::vector<int32_t> ids)
      : d_(dictionary),
        kernels_(kernels),
        parallel_for_(parallel_for),
        x_(x),
        first_row_(first_row),
        ids_(std::move(ids)),
        slots_(round_up(size(), kRowPanel)) {
    codes_.reset(allocate_codes(slots_ * d_.padded()));
    step_.assign(slots_, kTiny);
    inverse_.assign(slots_, 1.0f / kTiny);
    reach_.assign(slots_, 0.0f);
    length_.assign(slots_, 0.0f);
    apart_.assign(slots_ * d_.aparts(), 0.0f);
    apart_length_.assign(slots_, 0.0f);
    cut.assign(slots_, std::numeric_limits<float>::infinity());
    dropped.assign(slots_, 1);
    lists.resize(slots_);
    blocks([&](int64_t begin, int64_t end) { quantise(begin, end); });
  }

  int64_t size() const { return static_cast<int64_t>(ids_.size()); }
  int32_t id(int64_t i) const { return ids_[i]; }

  float length(int64_t i) const { return length_[i]; }  // |x|

  // Screens panels [begin, end). With k > 0 the cut of a row rises to the k-th largest of
  // z - share * error seen so far: a proven bound for share = 1, a guess below; a row whose list
  // outgrows `most` is dropped.
  void screen(int64_t begin, int64_t end, int64_t k, int64_t most, float share) {
    blocks([&](int64_t first, int64_t last) {
      screen_block(first, last, begin, end, {k, most, share});
    });
  }

  // Drops the candidates of row i that cannot reach its cut any more.
  void prune(int64_t i) {
    auto& list = lists[i];
    size_t kept = 0;
    for (const Candidate& c : list) {
      list[kept] = c;
      kept += !(c.z + c.error < cut[i]);
    }
    list.resize(kept);
  }

  // Raises the cut of row i to the k-th largest of z - share * error of its candidates.
  void raise(int64_t i, int64_t k, float share) {
    std::vector<uint32_t> orders;
    lower_bounds(i, share, orders);
    cut[i] = std::max(cut[i], cut_at(kth_largest(kernels_, orders, k)));
    prune(i);
  }

  // Appends the orders of z - share * error of the candidates of row i.
  void lower_bounds(int64_t i, float share, std::vector<uint32_t>& orders) const {
    for (const Candidate& c : lists[i]) {
      const float bound = c.z - share * c.error;
      orders.push_back(bound == bound ? order_of(bound) : 0);
    }
  }

  // One for each row, padded to whole panels.
  std::vector<float> cut;
  std::vector<uint8_t> dropped;  // not screened: not finite, or the list outgrew its bound
  std::vector<std::vector<Candidate>> lists;

 private:
  static constexpr float kTiny = 1e-20f;

  template <class F>
  void blocks(const F& body) {
    const int64_t n = round_up(slots_, kBlockRows) / kBlockRows;
    parallel(parallel_for_, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        body(b * kBlockRows, std::min((b + 1) * kBlockRows, slots_));
      }
    });
  }

  uint8_t* codes(int64_t slot) {
    return codes_.get() + slot / kRowPanel * kRowPanel * d_.padded() + slot % kRowPanel * 4;
  }

  void quantise(int64_t begin, int64_t end) {
    std::vector<float> copy(d_.padded(), 0.0f);
    for (int64_t i = begin; i < end; ++i) {
      const float* row = i < size() ? x_ + ids_[i] * d_.padded() : copy.data();
      if (i >= size()) {
        std::fill(copy.begin(), copy.end(), 0.0f);
      } else if (d_.aparts() > 0) {
        std::copy(row, row + d_.padded(), copy.begin());
        apart_length_[i] = d_.set_apart(copy.data(), apart_.data() + i * d_.aparts());
        row = copy.data();
      }
      const int64_t salt = d_.certified() ? 2 * (first_row_ + (i < size() ? ids_[i] : 0)) : -1;
      const Quantised q = kernels_.quantise_row(row, d_.padded(), salt, codes(i));
      if (i >= size() || !(q.norm2 + apart_length_[i] < std::numeric_limits<float>::infinity())) {
        continue;
      }
      step_[i] = q.step;
      inverse_[i] = 1.0f / q.step;
      // |x'| <= |x| + |error of rounding|.
      const float rest = std::sqrt(q.norm2);
      length_[i] = std::hypot(rest, apart_length_[i]);
      const float most = rest * inverse_[i] + std::sqrt(static_cast<float>(d_.padded()));
      reach_[i] = most * most;
      cut[i] = 0.0f;
      dropped[i] = 0;
    }
  }

  struct Raising {
    int64_t k, most;
    float share;
  };

  void screen_block(int64_t first, int64_t last, int64_t begin, int64_t end,
                    const Raising& raising) {
    const int64_t k = raising.k;
    const int64_t n = last - first;
    const std::unique_ptr<float[]> z(new float[n * d_.panel_features() + kFoundSlack]);
    int32_t row[kBlockRows];
    uint32_t mask[kBlockRows];
    float error[kBlockRows];
    const Found found = {row, mask, z.get(), error};
    std::vector<int64_t> look(n, std::max(kLeastLook, 4 * k));
    for (int64_t i = first; k > 0 && i < last; ++i) lists[i].reserve(std::min(kLeastLook, k) + k);
    const ScreenRows rows = {codes(first),
                             n / kRowPanel,
                             d_.padded() / kGroup,
                             step_.data() + first,
                             inverse_.data() + first,
                             reach_.data() + first,
                             cut.data() + first,
                             d_.confidence(),
                             apart_.data() + first * d_.aparts(),
                             apart_length_.data() + first,
                             d_.aparts()};
    for (int64_t panel = begin; panel < end; ++panel) {
      const FeaturePanel features = d_.panel(panel);
      const int64_t hits = kernels_.screen(rows, features, found);
      const float* next = z.get();
      for (int64_t hit = 0; hit < hits; ++hit) {
        const int64_t i = first + row[hit];
        auto& list = lists[i];
        if (dropped[i]) {
          next += __builtin_popcount(mask[hit]);
          continue;
        }
        for (uint32_t left = mask[hit]; left != 0; left &= left - 1) {
          const int32_t feature = features.first + __builtin_ctz(left);
          list.push_back({*next++, feature, error[row[hit]] * d_.share(feature)});
        }
        const auto length = static_cast<int64_t>(list.size());
        if (k == 0 || length < look[row[hit]]) continue;
        raise(i, k, raising.share);
        look[row[hit]] = std::max<int64_t>(2 * list.size(), look[row[hit]]);
        if (static_cast<int64_t>(list.size()) > raising.most) {
          dropped[i] = 1;
          cut[i] = std::numeric_limits<float>::infinity();
          std::vector<Candidate>().swap(list);
        }
      }
    }
  }

  const Dictionary& d_;
  TopkKernels kernels_;
  ParallelFor parallel_for_;
  const float* x_;
  int64_t first_row_;
  std::vector<int32_t> ids_;
  int64_t slots_;
  Codes codes_;
  std::vector<float> step_, inverse_, reach_, length_, apart_, apart_length_;
};

}  // namespace sidechain::cpu
