// SPDX-License-Identifier: Apache-2.0
#include "cuda/decode_table.cuh"
#include "cuda/sparse_decode.cuh"
#include "torch/cuda.h"
#include "torch/sparse_decode.h"

namespace sidechain::torch_ops {
namespace {

Tensor decode_cuda(Tensor values, Tensor indices, Tensor w_dec, MaybeTensor b_dec,
                   MaybeTensor offsets) {
  const OnDevice device("sparse_decode", w_dec);
  Tensor out;
  const DecodeParams p =
      decode_params("sparse_decode", values, indices, w_dec, b_dec, offsets, out);
  device.check(cuda::launch_sparse_decode(p, device.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> loss_cuda(Tensor values, Tensor indices, Tensor w_dec,
                                             MaybeTensor b_dec, Tensor target, MaybeTensor offsets,
                                             MaybeTensor row_weight) {
  const OnDevice device("sparse_decode_loss", w_dec);
  DecodeLossTensors out;
  const DecodeParams p =
      decode_loss_params(values, indices, w_dec, b_dec, target, offsets, row_weight, out);
  device.check(cuda::launch_sparse_decode(p, device.stream()));
  return {out.error, out.loss, out.dvalues};
}

std::tuple<Tensor, Tensor> backward_cuda(Tensor grad, Tensor values, Tensor indices, Tensor w_dec,
                                         MaybeTensor offsets, bool need_values, bool need_table) {
  const OnDevice device("sparse_decode_backward", w_dec);
  Tensor dvalues, dw_dec;
  const DecodeBackwardParams p = decode_backward_params(grad, values, indices, w_dec, offsets,
                                                        need_values, need_table, dvalues, dw_dec);
  if (need_values) device.check(cuda::launch_decode_dvalues(p, device.stream()));
  if (need_table) {
    const Tensor workspace = new_workspace(w_dec, cuda::decode_table_workspace(p));
    device.check(cuda::launch_decode_table(p, workspace.mutable_data_ptr(), device.stream()));
  }
  return {dvalues, dw_dec};
}

}  // namespace

SIDECHAIN_CUDA_LIBRARY(library) {
  library.impl("sparse_decode", TORCH_BOX(&decode_cuda));
  library.impl("sparse_decode_loss", TORCH_BOX(&loss_cuda));
  library.impl("sparse_decode_backward", TORCH_BOX(&backward_cuda));
}

}  // namespace sidechain::torch_ops
