// SPDX-License-Identifier: Apache-2.0
#include "torch/tap.h"

#include "torch/parallel.h"

namespace sidechain::torch_ops {
namespace {

void tap_cpu(const Tensor&, const TapParams& params) { cpu::tap(params, best_isa(), parallel_for); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidechain, CPU, library) {
  library.impl("tap_", TORCH_BOX(&tap_op<tap_cpu>));
}

}  // namespace sidechain::torch_ops
