// SPDX-License-Identifier: Apache-2.0
#include "cpu/topk/features.h"

#include <algorithm>
#include <cmath>

namespace sidechain::cpu {
namespace {

// Rows that tell which elements are large.
constexpr int64_t kSampledRows = 128;

// 1 where the largest is not finite and so is this one; 0 of 0.
float share_of(float one, float largest) {
  if (!(largest > 0.0f)) return 0.0f;
  return one < largest ? one / largest : 1.0f;
}

}  // namespace

Features::Features(const TopkCall& given)
    : call(given),
      padded_(round_up(given.p.width, kGroup)),
      bias_(floats(given.p.b_enc, given.p.features, given.kernels)),
      limit_(floats(given.p.threshold, given.p.features, given.kernels)) {
  for (float& limit : limit_) limit = limit > 0.0f ? limit : 0.0f;
}

const float* Features::row(int64_t feature, float* to) const {
  const TopkEncodeParams& p = call.p;
  const void* from = row_of(p.w_enc, feature);
  if (p.w_enc.dtype == Dtype::kFloat32 && p.width == padded_) {
    return static_cast<const float*>(from);
  }
  call.kernels.load_row(from, p.w_enc.dtype, p.width, nullptr, to);
  std::fill(to + p.width, to + padded_, 0.0f);
  return to;
}

Activations::Activations(const Features& features, int64_t first_row, int64_t rows)
    : first(first_row), count(rows), padded(features.padded()), values(new float[count * padded]) {
  const TopkCall& call = features.call;
  const std::vector<float> b_pre = floats(call.p.b_pre, call.p.width, call.kernels);
  parallel(call.parallel_for, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = values.get() + i * padded;
      call.kernels.load_row(row_of(call.p.x, first + i), call.p.x.dtype, call.p.width,
                            b_pre.empty() ? nullptr : b_pre.data(), to);
      std::fill(to + call.p.width, to + padded, 0.0f);
    }
  });
}

std::vector<int32_t> find_outliers(const Activations& x, int64_t width) {
  const int64_t every = round_up(x.count, kSampledRows) / kSampledRows;
  std::vector<float> energy(width, 0.0f);
  for (int64_t i = 0; i < x.count; i += every) {
    const float* row = x.row(i);
    const float norm2 = std::inner_product(row, row + width, row, 0.0f);
    if (!(norm2 < std::numeric_limits<float>::infinity())) continue;
    for (int64_t c = 0; c < width; ++c) energy[c] += row[c] * row[c] / (norm2 + 1e-30f);
  }
  double rest = std::accumulate(energy.begin(), energy.end(), 0.0);
  std::vector<int32_t> order(width);
  std::iota(order.begin(), order.end(), 0);
  const int64_t most = std::min(kMostOutliers, width / 2);
  std::partial_sort(order.begin(), order.begin() + most, order.end(), [&](int32_t a, int32_t b) {
    return energy[a] != energy[b] ? energy[a] > energy[b] : a < b;
  });
  std::vector<int32_t> outliers;
  for (int64_t j = 0; j < most; ++j) {
    rest -= energy[order[j]];
    if (!(energy[order[j]] > 16.0 * rest / static_cast<double>(width - j - 1))) break;
    outliers.push_back(order[j]);
  }
  return outliers;
}

PackedFeatures::PackedFeatures(const Features& features, std::vector<int32_t> outliers)
    : features_(features),
      panel_(features.call.kernels.feature_panel()),
      panels_(round_up(features.size(), panel_) / panel_),
      // Hoeffding with 2^-60 for each pair, and 0.4 % for what float32 rounds on the way. Two
      // standard deviations of rounding to nearest where no certificate is asked for.
      confidence_(features.call.certified() ? 4.56f * 1.004f : 0.58f),
      outliers_(std::move(outliers)) {
  const int64_t slots = panels_ * panel_;
  codes_.reset(allocate_codes(slots * padded()));
  step_.assign(slots, 0.0f);
  start_.assign(slots, 0);
  share_.assign(slots, 0.0f);
  bias_.assign(slots, 0.0f);
  for (int64_t f = 0; f < features.size(); ++f) bias_[f] = features.bias(f) - features.limit(f);
  bounds_.resize(panels_);
  outlier_weights_.assign(slots * this->outliers(), 0.0f);
  parallel(call().parallel_for, panels_, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> copy(padded());
    for (int64_t panel = begin; panel < end; ++panel) pack_panel(panel, copy.data());
  });
}

FeaturePanel PackedFeatures::panel(int64_t i) const {
  const int64_t first = i * panel_;
  return {reinterpret_cast<const int8_t*>(codes_.get()) + first * padded(),
          start_.data() + first,
          step_.data() + first,
          bias_.data() + first,
          static_cast<int32_t>(first),
          static_cast<int32_t>(std::min(panel_, features_.size() - first)),
          bounds_[i].norm2,
          bounds_[i].step2,
          bounds_[i].slack,
          outlier_weights_.data() + first * outliers(),
          bounds_[i].outlier_length};
}

float PackedFeatures::take_outliers(float* row, float* out) const {
  float norm2 = 0.0f;
  for (int32_t c : outliers_) {
    *out++ = row[c];
    norm2 += row[c] * row[c];
    row[c] = 0.0f;
  }
  return std::sqrt(norm2);
}

void PackedFeatures::pack_panel(int64_t panel, float* copy) {
  auto* codes = reinterpret_cast<int8_t*>(codes_.get()) + panel * panel_ * padded();
  std::vector<Bounds> own(panel_);
  Bounds most = {};
  for (int64_t j = 0; j < panel_; ++j) {
    const int64_t f = panel * panel_ + j;
    const bool exists = f < features_.size();
    if (!exists) std::fill(copy, copy + padded(), 0.0f);
    const float* values = exists ? features_.row(f, copy) : copy;
    if (outliers() > 0 && exists) {
      std::copy(values, values + padded(), copy);
      values = copy;
      float weights[kMostOutliers];
      own[j].outlier_length = take_outliers(copy, weights);
      float* to = outlier_weights_.data() + panel * panel_ * outliers() + j;
      for (int64_t a = 0; a < outliers(); ++a) to[a * panel_] = weights[a];
    }
    // Odd salts: the rows of x have the even ones.
    const int64_t salt = call().certified() ? 2 * f + 1 : -1;
    const Quantised q = call().kernels.quantise_feature(values, padded(), salt, codes + 4 * j);
    step_[f] = q.step;
    start_[f] = q.start;
    own[j].norm2 = q.norm2;
    own[j].step2 = q.step * q.step;
    own[j].slack = kRounding * std::abs(bias_[f]);
    most.norm2 = std::max(most.norm2, own[j].norm2);
    most.step2 = std::max(most.step2, own[j].step2);
    most.slack = std::max(most.slack, own[j].slack);
    most.outlier_length = std::max(most.outlier_length, own[j].outlier_length);
  }
  bounds_[panel] = most;
  // No term of the bound grows by more than the largest of these.
  for (int64_t j = 0; j < panel_; ++j) {
    share_[panel * panel_ + j] =
        std::max({std::sqrt(share_of(own[j].norm2, most.norm2)),
                  std::sqrt(share_of(own[j].step2, most.step2)), share_of(own[j].slack, most.slack),
                  share_of(own[j].outlier_length, most.outlier_length)});
  }
}

}  // namespace sidechain::cpu
