// SPDX-License-Identifier: Apache-2.0
// sparse_decode on the CPU: cuts columns into slices that the caches hold, rows among the threads.
#include "sidechain/sparse_decode.h"

#include <algorithm>
#include <memory>

#include "cpu/csc.h"
#include "cpu/kernels/sparse_decode.h"

namespace sidechain::cpu {
namespace {

// Elements below which a thread costs more than it saves (the grain of torch's own kernels).
constexpr int64_t kGrain = 32768;
// Bytes of a slice of the whole table, to be read from memory once and from the last-level cache
// afterwards, and of the gathered rows of one token, to stay in the second-level cache. At
// N, d, F, k = 1024, 768, 12288, 32 (32 MB last-level cache) slices of 8 MB cost 10 ms, of 64 MB,
// which is no slicing there, 7.5 ms.
constexpr int64_t kTableBytes = 64 << 20;
constexpr int64_t kRowBytes = 200 << 10;
constexpr int64_t kColumns = 64;  // slices are multiples of this: four cache lines of floats

struct Kernels {
  void (*columns)(const DecodeParams&, int64_t, int64_t, int64_t, const RowEntry*, int64_t,
                  const RowEntry*, int64_t);
  void (*prefetch)(const DecodeParams&, int64_t, int64_t, const RowEntry*, int64_t);
  void (*dvalues)(const DecodeBackwardParams&, int64_t, int64_t, int64_t, const RowEntry*, int64_t);
  void (*row_gradient)(const DecodeBackwardParams&, int64_t, const CscEntry*, int64_t, float*);
};

Kernels kernels(Isa isa) {
  switch (isa) {
#define SIDECHAIN_CASE(ID, NAME)                                                \
  case Isa::ID:                                                                 \
    return {NAME::decode_columns, NAME::prefetch_columns, NAME::decode_dvalues, \
            NAME::decode_row_gradient};
    SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_CASE)
#undef SIDECHAIN_CASE
    default:
      return kernels(Isa::kBaseline);
  }
}

int64_t longest_row(const Codes& codes) {
  int64_t longest = 0;
  for (int64_t n = 0; n < codes.rows; ++n) longest = std::max(longest, code_row(codes, n).count);
  return longest;
}

int64_t slice_columns(int64_t features, int64_t width, int64_t count, int64_t size) {
  const int64_t by_table = kTableBytes / std::max<int64_t>(1, features * size);
  const int64_t by_row = kRowBytes / std::max<int64_t>(1, count * size);
  const int64_t most = std::max(kColumns, std::min(by_table, by_row) / kColumns * kColumns);
  // Slices of about equal width, so that none is left too narrow for the prefetcher.
  const int64_t slices = std::max<int64_t>(1, (width + most - 1) / most);
  const int64_t columns = (width + slices - 1) / slices;
  return (columns + kColumns - 1) / kColumns * kColumns;
}

// The entries of row n that stand for something.
int64_t row_entries(const Codes& codes, int64_t n, int64_t features, int64_t w_row,
                    RowEntry* entries) {
  const CodeRow at = code_row(codes, n);
  const int64_t place = codes.offsets ? at.values : n * codes.width;
  int64_t count = 0;
  for (int64_t j = 0; j < at.count; ++j) {
    const int64_t feature = codes.indices[at.indices + j];
    if (feature < 0 || feature >= features) continue;
    entries[count++] = {feature * w_row, place + j, codes.values[at.values + j]};
  }
  return count;
}

void clear(const Codes& codes, float* dvalues) {
  const int64_t n = codes.offsets ? codes.capacity : codes.rows * codes.width;
  std::fill(dvalues, dvalues + n, 0.0f);
}

struct Decode {
  const DecodeParams& p;
  Kernels kernel;
  int64_t longest, begin, end;

  void run(int64_t first, int64_t last) const {
    // One row is decoded while the next one's decoder rows are on their way.
    const std::unique_ptr<RowEntry[]> lists(new RowEntry[2 * longest]);
    RowEntry *now = lists.get(), *next = now + longest;
    int64_t count = row_entries(p.codes, first, p.features, p.w_dec.row, now);
    for (int64_t n = first; n < last; ++n) {
      int64_t coming = 0;
      if (n + 1 < last) {
        coming = row_entries(p.codes, n + 1, p.features, p.w_dec.row, next);
        if (coming > count) kernel.prefetch(p, begin, end, next + count, coming - count);
      }
      kernel.columns(p, n, begin, end, now, count, next, coming);
      std::swap(now, next);
      count = coming;
    }
  }
};

struct Backward {
  const DecodeBackwardParams& p;
  Kernels kernel;
  int64_t longest, begin, end;
  const Csc* csc;

  void dvalues(int64_t first, int64_t last) const {
    const std::unique_ptr<RowEntry[]> entries(new RowEntry[longest]);
    for (int64_t n = first; n < last; ++n) {
      const int64_t count = row_entries(p.codes, n, p.features, p.w_dec.row, entries.get());
      kernel.dvalues(p, n, begin, end, entries.get(), count);
    }
  }

  void table(int64_t first, int64_t last) const {
    const std::unique_ptr<float[]> sum(new float[p.width]);
    for (int64_t f = first; f < last; ++f) {
      const int64_t start = csc->start[f];
      kernel.row_gradient(p, f, csc->entries.get() + start, csc->start[f + 1] - start, sum.get());
    }
  }
};

template <class Job, void (Job::*kMethod)(int64_t, int64_t) const>
void call(int64_t begin, int64_t end, void* job) {
  if (begin < end) (static_cast<const Job*>(job)->*kMethod)(begin, end);
}

}  // namespace

void sparse_decode(const DecodeParams& p, Isa isa, ParallelFor parallel_for) {
  parallel_for = or_serial(parallel_for);
  if (p.compare) {
    clear(p.codes, p.dvalues);
    std::fill(p.loss, p.loss + p.codes.rows, 0.0f);
  }
  if (p.codes.rows == 0) return;
  const int64_t longest = longest_row(p.codes);
  const int64_t size = p.w_dec.dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t columns = slice_columns(p.features, p.width, longest, size);
  for (int64_t begin = 0; begin < p.width; begin += columns) {
    Decode job = {p, kernels(isa), longest, begin, std::min(begin + columns, p.width)};
    const int64_t elements = std::max<int64_t>(1, (longest + 1) * columns);
    parallel_for(p.codes.rows, std::max<int64_t>(1, kGrain / elements), call<Decode, &Decode::run>,
                 &job);
  }
}

void sparse_decode_backward(const DecodeBackwardParams& p, Isa isa, ParallelFor parallel_for) {
  parallel_for = or_serial(parallel_for);
  const int64_t longest = longest_row(p.codes);
  if (p.dvalues != nullptr) {
    clear(p.codes, p.dvalues);
    const int64_t size = p.w_dec.dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t columns = slice_columns(p.features, p.width, 1, size);
    for (int64_t begin = 0; begin < p.width; begin += columns) {
      Backward job = {p, kernels(isa), longest, begin, std::min(begin + columns, p.width), nullptr};
      const int64_t elements = std::max<int64_t>(1, (longest + 1) * columns);
      parallel_for(p.codes.rows, std::max<int64_t>(1, kGrain / elements),
                   call<Backward, &Backward::dvalues>, &job);
    }
  }
  if (p.dw_dec != nullptr && p.width > 0) {
    const Csc csc = build_csc({p.codes, nullptr, 0, nullptr, p.features, 0, true});
    Backward job = {p, kernels(isa), longest, 0, p.width, &csc};
    parallel_for(p.features, std::max<int64_t>(1, kGrain / p.width),
                 call<Backward, &Backward::table>, &job);
  }
}

}  // namespace sidechain::cpu
