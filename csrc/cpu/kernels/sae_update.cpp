// SPDX-License-Identifier: Apache-2.0
// Loop bodies of sae_update_, compiled once per instruction set. A feature gathers the rows of x
// and of the error from its list into two rows that stay in the first-level cache, then Adam
// streams over its weights and moments: those come from memory and set the pace.
#include "cpu/kernels/sae_update.h"

#include <cstdint>
#if SIDECHAIN_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {
namespace {

#include "cpu/kernels/vec-inl.h"
// These need the first.
#include "cpu/kernels/rows-inl.h"
// And this the second.
#include "cpu/kernels/adam-inl.h"

int error_level(const SaeGradientParams& p, int64_t feature) {
  const int64_t id = p.first_feature + feature;
  int level = 0;
  while (level + 1 < p.prefix_count && id >= p.prefixes[level]) ++level;
  return level;
}

struct Gradient {
  float bias;
  int64_t count;  // entries of all groups
};

// Sums the rows of a feature's list into scratch.enc and scratch.dec.
template <class T>
Gradient gather(const SaeGradientParams& p, const FeatureLists& lists, int64_t feature,
                FeatureScratch& scratch) {
  Gradient g = {0.0f, 0};
  const int level = error_level(p, feature);
  for (int32_t i = 0; i < p.group_count; ++i) {
    const CodeGroup& group = p.groups[i];
    const CscEntry* entries = lists.entries[i] + lists.start[i][feature];
    const int64_t count = lists.start[i][feature + 1] - lists.start[i][feature];
    if (i > 0 && count == 0) continue;
    add_entries<float, false>(scratch.dec, p.d_out, entries, count,
                              group.error + level * group.error_level, group.error_row, nullptr,
                              i == 0);
    add_entries<T, true>(scratch.enc, p.d_in, entries, count, static_cast<const T*>(p.x), p.x_row,
                         p.b_pre, i == 0);
    for (int64_t j = 0; j < count; ++j) g.bias += entries[j].dvalue;
    g.count += count;
  }
  return g;
}

// <gradient, w> / <w, w>, 0 for w = 0.
float projection(const float* gradient, const float* w, int64_t width) {
  F32 along = {}, square = {};
  for_vectors(0, width, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    const F32 weight = load_upto(w + c, n);
    along += load_upto(gradient + c, n) * weight;
    square += weight * weight;
  });
  const float norm = sum_lanes(square);
  return norm == 0.0f ? 0.0f : sum_lanes(along) / norm;
}

void write_copy(void* copy, Dtype dtype, int64_t feature, const float* weight, int64_t width) {
  if (copy == nullptr) return;
  if (dtype == Dtype::kFloat16) {
    copy_row_to(static_cast<Half*>(copy) + feature * width, weight, width);
  } else {
    copy_row_to(static_cast<BFloat*>(copy) + feature * width, weight, width);
  }
}

void update_bias(const SaeState& s, const AdamStep& a, int64_t f, float gradient, float wake1,
                 float wake2) {
  const float g = gradient * a.clip;
  float mean = wake1 * s.bias_mean[f];
  mean += a.rest1 * (g - mean);
  const float square = wake2 * s.bias_square[f] + a.rest2 * (g * g);
  s.bias_mean[f] = mean;
  s.bias_square[f] = square;
  s.b_enc[f] -= a.size * (mean / (__builtin_sqrtf(square) * a.correction + a.eps));
}

template <class T, class M>
void update_feature(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& a,
                    int64_t f, FeatureScratch& scratch) {
  const SaeGradientParams& q = p.gradient;
  const SaeState& s = p.state;
  const Gradient g = gather<T>(q, lists, f, scratch);
  if (p.row_step != nullptr && g.count == 0) return;  // asleep

  int64_t slept = p.row_step != nullptr ? a.step - p.row_step[f] - 1 : 0;
  slept = slept < 0 ? 0 : slept;
  const float wake1 = static_cast<float>(power(a.beta1, slept));
  const float wake2 = static_cast<float>(power(a.beta2, slept + 1));
  const float decay = static_cast<float>(power(1.0 - a.lr * a.weight_decay, slept + 1));
  if (p.row_step != nullptr) p.row_step[f] = a.step;

  const int64_t id = q.first_feature + f;
  const uint32_t key = 2 * static_cast<uint32_t>(id);
  float* w_enc = s.w_enc + f * q.d_in;
  const AdamRow<M> enc = {w_enc,
                          static_cast<M*>(s.enc_mean) + f * q.d_in,
                          static_cast<M*>(s.enc_square) + f * q.d_in,
                          scratch.enc,
                          q.d_in,
                          0.0f,
                          wake1,
                          wake2,
                          decay,
                          mix(a.noise ^ key),
                          -g.bias,
                          scratch.b_pre};
  const bool shift = scratch.b_pre != nullptr && g.bias != 0.0f;
  const RowNorms of_enc = shift ? adam_row<M, true>(enc, a) : adam_row<M, false>(enc, a);
  write_copy(p.enc_copy, p.enc_copy_dtype, f, w_enc, q.d_in);

  float* w_dec = s.w_dec + f * q.d_out;
  const bool project = q.project && g.count > 0;
  const AdamRow<M> dec = {w_dec,
                          static_cast<M*>(s.dec_mean) + f * q.d_out,
                          static_cast<M*>(s.dec_square) + f * q.d_out,
                          scratch.dec,
                          q.d_out,
                          project ? projection(scratch.dec, w_dec, q.d_out) : 0.0f,
                          wake1,
                          wake2,
                          decay,
                          mix(a.noise ^ (key + 1)),
                          0.0f,
                          nullptr};
  const RowNorms of_dec = adam_row<M, false>(dec, a);
  if (p.unit_norm) {
    const float norm = __builtin_sqrtf(sum_lanes(of_dec.weight));
    if (norm != 0.0f) divide_row(w_dec, q.d_out, norm);
  }
  write_copy(p.dec_copy, p.dec_copy_dtype, f, w_dec, q.d_out);

  scratch.square += sum_lanes(of_enc.grad);
  scratch.square += sum_lanes(of_dec.grad);
  if (s.b_enc != nullptr) {
    update_bias(s, a, f, g.bias, wake1, wake2);
    scratch.square += static_cast<double>(g.bias) * g.bias;
  }
}

template <class T, class M>
void update_range(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& a,
                  int64_t begin, int64_t end, FeatureScratch& scratch) {
  for (int64_t f = begin; f < end; ++f) {
    update_feature<T, M>(p, lists, a, f, scratch);
    const int64_t fired = lists.start[0][f + 1] - lists.start[0][f];
    if (p.last_fired != nullptr && fired > 0) p.last_fired[f] = a.step;
    if (p.fire_count != nullptr) p.fire_count[f] += fired;
  }
}

template <class T>
void update_typed(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& a,
                  int64_t begin, int64_t end, FeatureScratch& scratch) {
  if (p.state.moments == Dtype::kBFloat16) {
    return update_range<T, BFloat>(p, lists, a, begin, end, scratch);
  }
  update_range<T, float>(p, lists, a, begin, end, scratch);
}

float row_square(const float* gradient, const float* w, float along, int64_t width) {
  F32 total = {};
  for_vectors(0, width, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    const F32 g = load_upto(gradient + c, n) - along * load_upto(w + c, n);
    total += g * g;
  });
  return sum_lanes(total);
}

template <class T>
void square_typed(const SaeGradientParams& p, const float* w_dec, const FeatureLists& lists,
                  int64_t begin, int64_t end, FeatureScratch& scratch) {
  for (int64_t f = begin; f < end; ++f) {
    const Gradient g = gather<T>(p, lists, f, scratch);
    if (g.count == 0) continue;
    const float* w = w_dec + f * p.d_out;
    const float along = p.project ? projection(scratch.dec, w, p.d_out) : 0.0f;
    scratch.square += row_square(scratch.enc, scratch.enc, 0.0f, p.d_in);
    scratch.square += row_square(scratch.dec, w, along, p.d_out);
    if (p.bias) scratch.square += static_cast<double>(g.bias) * g.bias;
  }
}

}  // namespace

void update_features(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& adam,
                     int64_t begin, int64_t end, FeatureScratch& scratch) {
  switch (p.gradient.x_dtype) {
    case Dtype::kFloat32:
      return update_typed<float>(p, lists, adam, begin, end, scratch);
    case Dtype::kFloat16:
      return update_typed<Half>(p, lists, adam, begin, end, scratch);
    case Dtype::kBFloat16:
      return update_typed<BFloat>(p, lists, adam, begin, end, scratch);
  }
}

void square_features(const SaeGradientParams& p, const float* w_dec, const FeatureLists& lists,
                     int64_t begin, int64_t end, FeatureScratch& scratch) {
  switch (p.x_dtype) {
    case Dtype::kFloat32:
      return square_typed<float>(p, w_dec, lists, begin, end, scratch);
    case Dtype::kFloat16:
      return square_typed<Half>(p, w_dec, lists, begin, end, scratch);
    case Dtype::kBFloat16:
      return square_typed<BFloat>(p, w_dec, lists, begin, end, scratch);
  }
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
