// SPDX-License-Identifier: Apache-2.0
#include "torch/sparse_decode.h"

#include "torch/parallel.h"

namespace sidechain::torch_ops {
namespace {

Tensor decode_cpu(Tensor values, Tensor indices, Tensor w_dec, MaybeTensor b_dec,
                  MaybeTensor offsets) {
  Tensor out;
  const DecodeParams p =
      decode_params("sparse_decode", values, indices, w_dec, b_dec, offsets, out);
  cpu::sparse_decode(p, best_isa(), parallel_for);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> loss_cpu(Tensor values, Tensor indices, Tensor w_dec,
                                            MaybeTensor b_dec, Tensor target, MaybeTensor offsets,
                                            MaybeTensor row_weight) {
  DecodeLossTensors out;
  const DecodeParams p =
      decode_loss_params(values, indices, w_dec, b_dec, target, offsets, row_weight, out);
  cpu::sparse_decode(p, best_isa(), parallel_for);
  return {out.error, out.loss, out.dvalues};
}

std::tuple<Tensor, Tensor> backward_cpu(Tensor grad, Tensor values, Tensor indices, Tensor w_dec,
                                        MaybeTensor offsets, bool need_values, bool need_table) {
  Tensor dvalues, dw_dec;
  const DecodeBackwardParams p = decode_backward_params(grad, values, indices, w_dec, offsets,
                                                        need_values, need_table, dvalues, dw_dec);
  cpu::sparse_decode_backward(p, best_isa(), parallel_for);
  return {dvalues, dw_dec};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidechain, CPU, library) {
  library.impl("sparse_decode", TORCH_BOX(&decode_cpu));
  library.impl("sparse_decode_loss", TORCH_BOX(&loss_cpu));
  library.impl("sparse_decode_backward", TORCH_BOX(&backward_cpu));
}

}  // namespace sidechain::torch_ops
