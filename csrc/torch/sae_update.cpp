// SPDX-License-Identifier: Apache-2.0
#include "torch/sae_update.h"

#include "torch/parallel.h"

namespace sidechain::torch_ops {
namespace {

void update_cpu(const SaeUpdateParams& p, const Tensor&) {
  cpu::sae_update(p, best_isa(), parallel_for);
}

void square_cpu(const SaeGradientParams& p, const Tensor& w_dec, float* out) {
  cpu::sae_gradient_square(p, static_cast<const float*>(w_dec.const_data_ptr()), out, best_isa(),
                           parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidechain, CPU, library) {
  library.impl("sae_update_", TORCH_BOX(&update<update_cpu>));
  library.impl("sae_gradient_square", TORCH_BOX(&gradient_square<square_cpu>));
}

}  // namespace sidechain::torch_ops
