// SPDX-License-Identifier: Apache-2.0
#include "torch/sae_edit.h"

#include "torch/parallel.h"

namespace sidechain::torch_ops {
namespace {

void edit_cpu(Tensor x, MaybeTensor values_old, MaybeTensor values_new, Tensor indices,
              MaybeTensor offsets, Tensor w_dec, MaybeTensor strength, MaybeTensor mask) {
  const SaeEditParams p =
      sae_edit_params(x, values_old, values_new, indices, offsets, w_dec, strength, mask);
  cpu::sae_edit(p, best_isa(), parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidechain, CPU, library) {
  library.impl("sae_edit_", TORCH_BOX(&edit_cpu));
}

}  // namespace sidechain::torch_ops
