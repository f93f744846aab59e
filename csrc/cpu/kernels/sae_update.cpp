// SPDX-License-Identifier: Apache-2.0
// Loop bodies of sae_update_, compiled once per instruction set. A feature gathers the rows of x,
// or of the error, from its list into a row that stays in the first-level cache, then Adam streams
// over its weights and their statistics: those come from memory and set the pace.
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

int64_t entries_of(const SaeGradientParams& p, const FeatureLists& lists, int64_t feature) {
  int64_t count = 0;
  for (int32_t i = 0; i < p.group_count; ++i) {
    count += lists.start[i][feature + 1] - lists.start[i][feature];
  }
  return count;
}

// add(entries, count, group, first) for the groups of a feature's list that have entries, and for
// the first one, which starts the sums, in any case.
template <class Add>
void for_groups(const SaeGradientParams& p, const FeatureLists& lists, int64_t feature, Add add) {
  for (int32_t i = 0; i < p.group_count; ++i) {
    const int64_t begin = lists.start[i][feature], count = lists.start[i][feature + 1] - begin;
    if (i == 0 || count > 0) add(lists.entries[i] + begin, count, p.groups[i], i == 0);
  }
}

// Sums a feature's list into the gradient of its encoder row; returns that of its bias.
template <class T>
float gather_enc(const SaeGradientParams& p, const FeatureLists& lists, int64_t feature,
                 float* sum) {
  float bias = 0.0f;
  for_groups(p, lists, feature,
             [&](const CscEntry* entries, int64_t count, const CodeGroup&, bool first) {
               add_entries<T, true>(sum, p.d_in, entries, count, static_cast<const T*>(p.x),
                                    p.x_row, p.b_pre, first);
               for (int64_t j = 0; j < count; ++j) bias += entries[j].dvalue;
             });
  return bias;
}

// The same into the gradient of its decoder row.
void gather_dec(const SaeGradientParams& p, const FeatureLists& lists, int64_t feature,
                float* sum) {
  const int level = error_level(p, feature);
  for_groups(p, lists, feature,
             [&](const CscEntry* entries, int64_t count, const CodeGroup& group, bool first) {
               add_entries<float, false>(sum, p.d_out, entries, count,
                                         group.error + level * group.error_level, group.error_row,
                                         nullptr, first);
             });
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

void update_bias(const SaeState& s, const AdamStep& a, int64_t f, float gradient) {
  const float g = gradient * a.clip;
  float mean = s.bias_mean[f];
  mean += a.rest1 * (g - mean);
  const float square = a.beta2 * s.bias_square[f] + a.rest2 * (g * g);
  s.bias_mean[f] = mean;
  s.bias_square[f] = square;
  s.b_enc[f] -= a.size * (mean / (__builtin_sqrtf(square) * a.correction + a.eps));
}

// The encoder row and the bias.
template <class T, class M>
void update_enc(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& a, int64_t f,
                FeatureScratch& scratch) {
  const SaeGradientParams& q = p.gradient;
  const SaeState& s = p.state;
  const float bias = gather_enc<T>(q, lists, f, scratch.row);
  const AdamRow<M> row = {s.w_enc + f * q.d_in,
                          static_cast<M*>(s.enc_mean) + f * q.d_in,
                          static_cast<M*>(s.enc_square) + f * q.d_in,
                          scratch.row,
                          q.d_in,
                          0.0f,
                          mix(a.noise ^ (2 * static_cast<uint32_t>(q.first_feature + f))),
                          -bias,
                          scratch.b_pre};
  if (scratch.b_pre != nullptr && bias != 0.0f) {
    adam_row<M, true>(row, a);
  } else {
    adam_row<M, false>(row, a);
  }
  if (s.b_enc != nullptr) update_bias(s, a, f, bias);
}

// The decoder row.
template <class M>
void update_dec(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& a, int64_t f,
                FeatureScratch& scratch) {
  const SaeGradientParams& q = p.gradient;
  const SaeState& s = p.state;
  gather_dec(q, lists, f, scratch.row);
  float* w_dec = s.w_dec + f * q.d_out;
  const bool project = q.project && entries_of(q, lists, f) > 0;
  const AdamRow<M> row = {w_dec,
                          static_cast<M*>(s.dec_mean) + f * q.d_out,
                          static_cast<M*>(s.dec_square) + f * q.d_out,
                          scratch.row,
                          q.d_out,
                          project ? projection(scratch.row, w_dec, q.d_out) : 0.0f,
                          mix(a.noise ^ (2 * static_cast<uint32_t>(q.first_feature + f) + 1)),
                          0.0f,
                          nullptr};
  const F32 squares = adam_row<M, false>(row, a);
  if (!p.unit_norm) return;
  const float norm = __builtin_sqrtf(sum_lanes(squares));
  if (norm != 0.0f) scale_row(w_dec, q.d_out, 1.0f / norm);
}

template <class T, class M>
void update_enc_range(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& a,
                      int64_t begin, int64_t end, FeatureScratch& scratch) {
  for (int64_t f = begin; f < end; ++f) update_enc<T, M>(p, lists, a, f, scratch);
}

template <class M>
void update_dec_range(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& a,
                      int64_t begin, int64_t end, FeatureScratch& scratch) {
  for (int64_t f = begin; f < end; ++f) {
    update_dec<M>(p, lists, a, f, scratch);
    const bool fired = lists.start[0][f + 1] > lists.start[0][f];
    if (p.last_fired != nullptr && fired) p.last_fired[f] = a.step;
  }
}

template <class T>
void update_enc_typed(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& a,
                      int64_t begin, int64_t end, FeatureScratch& scratch) {
  if (p.state.dtype == Dtype::kBFloat16) {
    return update_enc_range<T, BFloat>(p, lists, a, begin, end, scratch);
  }
  update_enc_range<T, float>(p, lists, a, begin, end, scratch);
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
    if (entries_of(p, lists, f) == 0) continue;
    const float bias = gather_enc<T>(p, lists, f, scratch.row);
    scratch.square += row_square(scratch.row, scratch.row, 0.0f, p.d_in);
    gather_dec(p, lists, f, scratch.row);
    const float* w = w_dec + f * p.d_out;
    const float along = p.project ? projection(scratch.row, w, p.d_out) : 0.0f;
    scratch.square += row_square(scratch.row, w, along, p.d_out);
    if (p.bias) scratch.square += static_cast<double>(bias) * bias;
  }
}

}  // namespace

void update_encoders(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& adam,
                     int64_t begin, int64_t end, FeatureScratch& scratch) {
  switch (p.gradient.x_dtype) {
    case Dtype::kFloat32:
      return update_enc_typed<float>(p, lists, adam, begin, end, scratch);
    case Dtype::kFloat16:
      return update_enc_typed<Half>(p, lists, adam, begin, end, scratch);
    case Dtype::kBFloat16:
      return update_enc_typed<BFloat>(p, lists, adam, begin, end, scratch);
  }
}

void update_decoders(const SaeUpdateParams& p, const FeatureLists& lists, const AdamStep& adam,
                     int64_t begin, int64_t end, FeatureScratch& scratch) {
  if (p.state.dtype == Dtype::kBFloat16) {
    return update_dec_range<BFloat>(p, lists, adam, begin, end, scratch);
  }
  update_dec_range<float>(p, lists, adam, begin, end, scratch);
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
