// SPDX-License-Identifier: Apache-2.0
#include "torch/encode_reduce.h"

#include "torch/parallel.h"

namespace sidechain::torch_ops {
namespace {

void code_sums_cpu(Tensor values, Tensor indices, MaybeTensor offsets, MaybeTensor label,
                   Tensor sums, Tensor squares, Tensor counts, Tensor rows) {
  const CodeSumsParams p =
      code_sums_params(values, indices, offsets, label, sums, squares, counts, rows);
  cpu::code_sums(p, best_isa(), parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidechain, CPU, library) {
  library.impl("code_sums_", TORCH_BOX(&code_sums_cpu));
}

}  // namespace sidechain::torch_ops
