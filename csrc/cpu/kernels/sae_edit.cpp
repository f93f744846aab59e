// SPDX-License-Identifier: Apache-2.0
// Loop body of sae_edit_, compiled once per instruction set. Bound by memory: x is read and written
// once, and the few decoder rows mostly come from the caches.
#include "cpu/kernels/sae_edit.h"

#include <cstdint>
#if SIDECHAIN_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE {
namespace {

#include "cpu/kernels/vec-inl.h"
// The second needs the first.
#include "cpu/kernels/rows-inl.h"

// kVectors vectors from x on, the last of `left` elements.
template <class X, class W, int kVectors>
void edit_tile(X* x, const W* table, const RowEntry* entries, int64_t count, int64_t left) {
  F32 sum[kVectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    const W* w = table + entries[j].offset;
    const F32 change = splat(entries[j].value);
    for (int i = 0; i < kVectors; ++i) sum[i] += change * load_upto(w + i * kLanes, left);
  }
  for (int i = 0; i < kVectors; ++i) {
    store_upto(x + i * kLanes, load_upto(x + i * kLanes, left) + sum[i], left);
  }
}

template <class X, class W>
void edit_typed(const SaeEditParams& p, int64_t n, const RowEntry* entries, int64_t count) {
  constexpr int kVectors = 8;  // sums that fit the registers beside a change and a decoder row
  X* x = static_cast<X*>(p.x) + n * p.x_row;
  const W* table = static_cast<const W*>(p.w_dec);
  int64_t c = 0;
  for (; c + kVectors * kLanes <= p.width; c += kVectors * kLanes) {
    edit_tile<X, W, kVectors>(x + c, table + c, entries, count, kLanes);
  }
  for (; c < p.width; c += kLanes) {
    edit_tile<X, W, 1>(x + c, table + c, entries, count, p.width - c);
  }
}

template <class X>
void edit_into(const SaeEditParams& p, int64_t n, const RowEntry* entries, int64_t count) {
  switch (p.w_dec_dtype) {
    case Dtype::kFloat32:
      return edit_typed<X, float>(p, n, entries, count);
    case Dtype::kFloat16:
      return edit_typed<X, Half>(p, n, entries, count);
    case Dtype::kBFloat16:
      return edit_typed<X, BFloat>(p, n, entries, count);
  }
}

}  // namespace

void edit_row(const SaeEditParams& p, int64_t n, const RowEntry* entries, int64_t count) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return edit_into<float>(p, n, entries, count);
    case Dtype::kFloat16:
      return edit_into<Half>(p, n, entries, count);
    case Dtype::kBFloat16:
      return edit_into<BFloat>(p, n, entries, count);
  }
}

}  // namespace sidechain::cpu::SIDECHAIN_ISA_NAMESPACE
