// SPDX-License-Identifier: Apache-2.0
// sae_edit_ on the CPU: decides which rows change and by what, and hands them to the threads.
#include "sidechain/sae_edit.h"

#include <algorithm>
#include <memory>

#include "cpu/kernels/sae_edit.h"

namespace sidechain::cpu {
namespace {

// Elements below which a thread costs more than it saves (the grain of torch's own kernels).
constexpr int64_t kGrain = 32768;

using EditRow = void (*)(const SaeEditParams&, int64_t, const RowEntry*, int64_t);

EditRow entry(Isa isa) {
  switch (isa) {
#define SIDECHAIN_CASE(ID, NAME) \
  case Isa::ID:                  \
    return NAME::edit_row;
    SIDECHAIN_FOR_EACH_ISA(SIDECHAIN_CASE)
#undef SIDECHAIN_CASE
    default:
      return baseline::edit_row;
  }
}

struct Job {
  const SaeEditParams& p;
  EditRow edit;
  int64_t longest;

  // The entries of row n that change it; 0 where nothing does.
  int64_t changes(int64_t n, RowEntry* entries) const {
    if (p.mask != nullptr && p.mask[n * p.mask_stride] == 0) return 0;
    const float strength = p.strength != nullptr ? p.strength[n * p.strength_stride] : 1.0f;
    if (strength == 0.0f) return 0;
    const CodeRow at = code_row(p.codes, n);
    const int64_t old_at = p.codes.offsets != nullptr ? at.values : n * p.values_old_row;
    int64_t count = 0;
    for (int64_t j = 0; j < at.count; ++j) {
      const int64_t feature = p.codes.indices[at.indices + j];
      if (feature < 0 || feature >= p.features) continue;
      const float now = p.codes.values != nullptr ? p.codes.values[at.values + j] : 0.0f;
      const float old = p.values_old != nullptr ? p.values_old[old_at + j] : 0.0f;
      const float change = now - old;
      if (change != 0.0f) entries[count++] = {feature * p.w_dec_row, 0, strength * change};
    }
    return count;
  }

  void run(int64_t begin, int64_t end) const {
    const std::unique_ptr<RowEntry[]> entries(new RowEntry[longest]);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t count = changes(n, entries.get());
      if (count > 0) edit(p, n, entries.get(), count);
    }
  }
};

void call(int64_t begin, int64_t end, void* job) { static_cast<const Job*>(job)->run(begin, end); }

}  // namespace

void sae_edit(const SaeEditParams& p, Isa isa, ParallelFor parallel_for) {
  int64_t longest = 0;
  for (int64_t n = 0; n < p.codes.rows; ++n) {
    longest = std::max(longest, code_row(p.codes, n).count);
  }
  Job job = {p, entry(isa), longest};
  const int64_t elements = std::max<int64_t>(1, (longest + 1) * p.width);
  parallel_for = or_serial(parallel_for);
  parallel_for(p.codes.rows, std::max<int64_t>(1, kGrain / elements), call, &job);
}

}  // namespace sidechain::cpu
