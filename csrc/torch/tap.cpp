// SPDX-License-Identifier: Apache-2.0
#include "torch/tap.h"

#include "torch/parallel.h"

namespace sidechain::torch_ops {
namespace {

void tap_cpu(Tensor x, MaybeTensor vectors, MaybeTensor steer_slot, MaybeTensor index,
             MaybeTensor strength, MaybeTensor removal, MaybeTensor steer_mask, bool renorm,
             MaybeTensor sums, MaybeTensor squares, MaybeTensor counts, MaybeTensor ring,
             MaybeTensor capture_slot, MaybeTensor capture_mask, int64_t ring_stride) {
  const TapParams params =
      tap_params(x, vectors, steer_slot, index, strength, removal, steer_mask, renorm, sums,
                 squares, counts, ring, capture_slot, capture_mask, ring_stride);
  cpu::tap(params, best_isa(), parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidechain, CPU, library) { library.impl("tap_", TORCH_BOX(&tap_cpu)); }

}  // namespace sidechain::torch_ops
