// SPDX-License-Identifier: Apache-2.0
// What topk_encode keeps of a dictionary: packed codes, scales and error bounds of its features.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels/topk_encode.h"

namespace sidechain::cpu {

// The entries of one instruction set.
struct TopkKernels {
  decltype(&baseline::feature_panel) feature_panel;
  decltype(&baseline::load_row) load_row;
  decltype(&baseline::quantise_row) quantise_row;
  decltype(&baseline::quantise_feature) quantise_feature;
  decltype(&baseline::screen) screen;
  decltype(&baseline::exact) exact;
  decltype(&baseline::kth_largest) kth_largest;
  decltype(&baseline::sum_rows) sum_rows;
};

inline TopkKernels topk_kernels(Isa isa) {
  switch (isa) {
#define SIDECHAIN_CASE(ID, NAME)                                                             \
  case Isa::ID:                                                                              \
    return {NAME::feature_panel, NAME::load_row, NAME::quantise_row, NAME::quantise_feature, \
            NAME::screen,        NAME::exact,    NAME::kth_largest,  NAME::sum_rows};
    SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_CASE)
#undef SIDECHAIN_CASE
    default:
      return topk_kernels(Isa::kBaseline);
  }
}

// Runs body(begin, end) over [0, n).
template <class F>
void parallel(ParallelFor parallel_for, int64_t n, int64_t grain, const F& body) {
  if (n == 0) return;
  if (parallel_for == nullptr) return body(0, n);
  const auto call = [](int64_t begin, int64_t end, void* f) {
    (*static_cast<const F*>(f))(begin, end);
  };
  parallel_for(n, grain, call, const_cast<F*>(&body));
}

inline const void* row_of(const Rows& rows, int64_t i) {
  const int64_t size = rows.dtype == Dtype::kFloat32 ? 4 : 2;
  return static_cast<const char*>(rows.data) + i * rows.row * size;
}

// Elements as float32; empty where absent.
inline std::vector<float> floats(const Vector& v, int64_t n, const TopkKernels& kernels) {
  std::vector<float> out(v.data == nullptr ? 0 : n);
  for (size_t i = 0; i < out.size(); ++i) {
    kernels.load_row(row_of({v.data, v.dtype, v.stride}, i), v.dtype, 1, nullptr, false, &out[i]);
  }
  return out;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Packed codes, aligned to cache lines.
struct FreeCodes {
  void operator()(uint8_t* codes) const {
    ::operator delete(codes, std::align_val_t(kCodeAlignment));
  }
  static constexpr size_t kCodeAlignment = 64;
};
using Codes = std::unique_ptr<uint8_t[], FreeCodes>;
inline uint8_t* allocate_codes(int64_t bytes) {
  return static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(FreeCodes::kCodeAlignment)));
}

class Dictionary {
 public:
  // The cut of the screen is what a value must exceed beyond `limit` (thresholds), if given.
  Dictionary(const TopkEncodeParams& params, const TopkKernels& kernels, ParallelFor parallel_for)
      : p_(params),
        kernels_(kernels),
        parallel_for_(parallel_for),
        padded_(round_up(params.width, kGroup)),
        panel_(kernels.feature_panel()),
        panels_(round_up(params.features, panel_) / panel_),
        bias_(floats(params.b_enc, params.features, kernels)),
        limit_(floats(params.threshold, params.features, kernels)) {
    bias_.resize(panels_ * panel_);
    for (float& limit : limit_) limit = limit > 0.0f ? limit : 0.0f;
    // Hoeffding with 2^-60 for each pair, and 0.4 % for what float32 rounds on the way. Two
    // standard deviations of rounding to nearest where no certificate is asked for.
    confidence_ = certified() ? 4.56f * 1.004f : 0.58f;
  }

  bool certified() const { return p_.precision != TopkPrecision::kInt8; }
  bool bf16() const { return p_.precision == TopkPrecision::kBFloat16; }
  int64_t padded() const { return padded_; }
  int64_t panels() const { return panels_; }
  int64_t panel_features() const { return panel_; }
  float confidence() const { return confidence_; }
  float bias(int32_t feature) const { return bias_[feature]; }
  float limit(int32_t feature) const { return limit_.empty() ? 0.0f : limit_[feature]; }
  // At least the bound of a feature's error as a share of that of its panel.
  float share(int32_t feature) const { return share_[feature]; }

  // A feature as the products see it, zero up to padded(): itself, or a copy in `to`.
  const float* row(int64_t feature, float* to) const {
    const void* from = row_of(p_.w_enc, feature);
    if (p_.w_enc.dtype == Dtype::kFloat32 && !bf16() && p_.width == padded_) {
      return static_cast<const float*>(from);
    }
    kernels_.load_row(from, p_.w_enc.dtype, p_.width, nullptr, bf16(), to);
    std::fill(to + p_.width, to + padded_, 0.0f);
    return to;
  }

  // Where row() will read a feature from.
  const void* source(int64_t feature) const { return row_of(p_.w_enc, feature); }

  // Packs all features, the elements `apart` of each as float32 beside the codes.
  void pack(std::vector<int32_t> apart) {
    apart_ = std::move(apart);
    const int64_t slots = panels_ * panel_;
    codes_.reset(allocate_codes(slots * padded_));
    step_.assign(slots, 0.0f);
    start_.assign(slots, 0);
    share_.assign(slots, 0.0f);
    shifted_ = bias_;
    for (size_t f = 0; f < limit_.size(); ++f) shifted_[f] -= limit_[f];
    bounds_.resize(panels_);
    apart_weights_.assign(slots * aparts(), 0.0f);
    parallel(parallel_for_, panels_, 4, [&](int64_t begin, int64_t end) {
      std::vector<float> copy(padded_);
      for (int64_t panel = begin; panel < end; ++panel) pack_panel(panel, copy.data());
    });
  }

  FeaturePanel panel(int64_t i) const {
    const int64_t first = i * panel_;
    return {reinterpret_cast<const int8_t*>(codes_.get()) + first * padded_,
            start_.data() + first,
            step_.data() + first,
            shifted_.data() + first,
            static_cast<int32_t>(first),
            static_cast<int32_t>(std::min(panel_, p_.features - first)),
            bounds_[i].norm2,
            bounds_[i].step2,
            bounds_[i].slack,
            apart_weights_.data() + first * aparts(),
            bounds_[i].apart_length};
  }

  int64_t aparts() const { return static_cast<int64_t>(apart_.size()); }

  // Moves the elements kept apart from a row to `out`, leaves zeros, and returns their length.
  float set_apart(float* row, float* out) const {
    float norm2 = 0.0f;
    for (int32_t c : apart_) {
      *out++ = row[c];
      norm2 += row[c] * row[c];
      row[c] = 0.0f;
    }
    return std::sqrt(norm2);
  }

 private:
  struct Bounds {
    float norm2, step2, slack, apart_length;
  };

  // 1 where the largest is not finite and so is this one; 0 of 0.
  static float share_of(float one, float largest) {
    if (!(largest > 0.0f)) return 0.0f;
    return one < largest ? one / largest : 1.0f;
  }

  void pack_panel(int64_t panel, float* copy) {
    auto* codes = reinterpret_cast<int8_t*>(codes_.get()) + panel * panel_ * padded_;
    std::vector<Bounds> own(panel_);
    Bounds most = {};
    for (int64_t j = 0; j < panel_; ++j) {
      const int64_t f = panel * panel_ + j;
      if (f >= p_.features) std::fill(copy, copy + padded_, 0.0f);
      const float* values = f < p_.features ? row(f, copy) : copy;
      if (aparts() > 0 && f < p_.features) {
        std::copy(values, values + padded_, copy);
        values = copy;
        float weights[kMostApart];
        own[j].apart_length = set_apart(copy, weights);
        float* to = apart_weights_.data() + panel * panel_ * aparts() + j;
        for (int64_t a = 0; a < aparts(); ++a) to[a * panel_] = weights[a];
      }
      // Odd salts: the rows of x have the even ones.
      const int64_t salt = certified() ? 2 * f + 1 : -1;
      const Quantised q = kernels_.quantise_feature(values, padded_, salt, codes + 4 * j);
      step_[f] = q.step;
      start_[f] = q.start;
      own[j].norm2 = q.norm2;
      own[j].step2 = q.step * q.step;
      own[j].slack = kRounding * std::abs(shifted_[f]);
      most.norm2 = std::max(most.norm2, own[j].norm2);
      most.step2 = std::max(most.step2, own[j].step2);
      most.slack = std::max(most.slack, own[j].slack);
      most.apart_length = std::max(most.apart_length, own[j].apart_length);
    }
    bounds_[panel] = most;
    // No term of the bound grows by more than the largest of these.
    for (int64_t j = 0; j < panel_; ++j) {
      share_[panel * panel_ + j] = std::max({std::sqrt(share_of(own[j].norm2, most.norm2)),
                                             std::sqrt(share_of(own[j].step2, most.step2)),
                                             share_of(own[j].slack, most.slack),
                                             share_of(own[j].apart_length, most.apart_length)});
    }
  }

  const TopkEncodeParams& p_;
  TopkKernels kernels_;
  ParallelFor parallel_for_;
  int64_t padded_, panel_, panels_;
  float confidence_;
  std::vector<int32_t> apart_;
  std::vector<float> bias_, limit_, shifted_, step_, share_, apart_weights_;
  std::vector<int32_t> start_;
  std::vector<Bounds> bounds_;
  Codes codes_;
};

}  // namespace sidechain::cpu
