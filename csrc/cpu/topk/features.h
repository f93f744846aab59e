// SPDX-License-Identifier: Apache-2.0
// The features of a dictionary: as the exact products read them, and packed for the screen.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "cpu/topk/support.h"

namespace sidechain::cpu {

// Rows of w_enc as float32, biases and thresholds.
class Features {
 public:
  explicit Features(const TopkCall& given);

  int64_t size() const { return call.p.features; }
  int64_t padded() const { return padded_; }  // width of a row
  float bias(int64_t feature) const { return bias_.empty() ? 0.0f : bias_[feature]; }
  // What a value must exceed; 0 where there is no threshold.
  float limit(int64_t feature) const { return limit_.empty() ? 0.0f : limit_[feature]; }

  // A row, zero up to padded(): itself, or a copy in `to`.
  const float* row(int64_t feature, float* to) const;
  // Where row() will read a feature from.
  const void* source(int64_t feature) const { return row_of(call.p.w_enc, feature); }

  const TopkCall& call;

 private:
  int64_t padded_;
  std::vector<float> bias_, limit_;
};

// Rows [first, first + count) of x - b_pre as float32, zero up to the padded width.
struct Activations {
  Activations(const Features& features, int64_t first, int64_t count);

  const float* row(int64_t i) const { return values.get() + i * padded; }

  int64_t first, count, padded;
  std::unique_ptr<float[]> values;
};

// The elements with most of the energy of the rows, as long as one has more than 16 times the mean
// of the others: transformers write a few such, and one scale for a whole row would leave the
// others without bits.
std::vector<int32_t> find_outliers(const Activations& x, int64_t width);

// Packed codes, aligned to cache lines.
struct FreeCodes {
  void operator()(uint8_t* codes) const {
    ::operator delete(codes, std::align_val_t(kCodeAlignment));
  }
  static constexpr size_t kCodeAlignment = 64;
};
using PackedBytes = std::unique_ptr<uint8_t[], FreeCodes>;
inline uint8_t* allocate_codes(int64_t bytes) {
  return static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(FreeCodes::kCodeAlignment)));
}

// All features in 8 bits with scales and error bounds, in panels; the outliers stay float32.
class PackedFeatures {
 public:
  PackedFeatures(const Features& features, std::vector<int32_t> outliers);

  const Features& features() const { return features_; }
  const TopkCall& call() const { return features_.call; }
  int64_t padded() const { return features_.padded(); }
  int64_t panels() const { return panels_; }
  int64_t panel_features() const { return panel_; }
  FeaturePanel panel(int64_t i) const;
  // At least the bound of a feature's error as a share of that of its panel.
  float share(int32_t feature) const { return share_[feature]; }
  // c of the bound (kernels/topk_encode.h).
  float confidence() const { return confidence_; }

  int64_t outliers() const { return static_cast<int64_t>(outliers_.size()); }
  // Moves the outliers of a row to `out`, leaves zeros in their place and returns their length.
  float take_outliers(float* row, float* out) const;

 private:
  struct Bounds {
    float norm2, step2, slack, outlier_length;
  };

  void pack_panel(int64_t panel, float* copy);

  const Features& features_;
  int64_t panel_, panels_;
  float confidence_;
  std::vector<int32_t> outliers_;
  PackedBytes codes_;
  std::vector<float> bias_, step_, share_, outlier_weights_;
  std::vector<int32_t> start_;
  std::vector<Bounds> bounds_;
};

}  // namespace sidechain::cpu
