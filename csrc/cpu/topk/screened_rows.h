// SPDX-License-Identifier: Apache-2.0
// Rows on their way through the screen: their codes, their cuts, and the candidates found so far.
#pragma once

#include <vector>

#include "cpu/topk/features.h"

namespace sidechain::cpu {

// Whether a candidate may be as large as `bound`: an error that is not a number rules nothing out.
inline bool may_reach(const Candidate& c, float bound) { return !(c.z + c.error < bound); }

class ScreenedRows {
 public:
  // Rows `ids` of x; ids are also what the stochastic rounding depends on.
  ScreenedRows(const PackedFeatures& packed, const Activations& x, std::vector<int32_t> ids);

  int64_t size() const { return static_cast<int64_t>(ids_.size()); }
  int32_t id(int64_t i) const { return ids_[i]; }
  const PackedFeatures& packed() const { return packed_; }
  const Activations& x() const { return x_; }
  float length(int64_t i) const { return length_[i]; }  // |x|

  // Starts the cut of row i there, or at 0.
  void start_at(int64_t i, float at);

  // Screens panels [begin, end). With k > 0 the cut of a row rises to the k-th largest of
  // z - share * error seen so far, a proven bound for share = 1 and an estimate below; a row with
  // too many candidates is dropped.
  void screen(int64_t begin, int64_t end, int64_t k, float share);

  // Raises the cut of row i to the k-th largest of z - share * error of its candidates.
  void raise(int64_t i, int64_t k, float share);
  void raise_to(int64_t i, float bound);

  // Appends the orders of z - share * error of the candidates of row i.
  void lower_bounds(int64_t i, float share, std::vector<uint32_t>& orders) const;

  // One for each row, padded to whole panels.
  std::vector<float> cut;        // what a candidate must be able to reach
  std::vector<uint8_t> dropped;  // not screened: not finite, or too many candidates
  std::vector<List> lists;

 private:
  template <class F>
  void blocks(const F& body);
  void quantise(int64_t begin, int64_t end);
  // Rows [first, last) and panels [begin, end).
  void screen_block(int64_t first, int64_t last, int64_t begin, int64_t end, int64_t k,
                    float share);
  uint8_t* codes(int64_t slot) {
    return codes_.get() + slot / kRowPanel * kRowPanel * packed_.padded() + slot % kRowPanel * 4;
  }

  const PackedFeatures& packed_;
  const Activations& x_;
  std::vector<int32_t> ids_;
  int64_t slots_;
  PackedBytes codes_;
  std::vector<float> step_, inverse_, reach_, length_, outliers_, outlier_length_;
};

}  // namespace sidechain::cpu
