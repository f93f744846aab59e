// SPDX-License-Identifier: Apache-2.0
#include "cuda/encode_reduce.cuh"
#include "torch/cuda.h"
#include "torch/encode_reduce.h"

namespace sidechain::torch_ops {
namespace {

void code_sums_cuda(Tensor values, Tensor indices, MaybeTensor offsets, MaybeTensor label,
                    Tensor sums, Tensor squares, Tensor counts, Tensor rows) {
  const OnDevice device("code_sums_", sums);
  const CodeSumsParams p =
      code_sums_params(values, indices, offsets, label, sums, squares, counts, rows);
  STD_TORCH_CHECK(p.labels * p.features < std::numeric_limits<int32_t>::max(),
                  "code_sums_: expected fewer than 2^31 sums, got ", p.labels, " labels of ",
                  p.features, " features");
  const Tensor workspace = new_workspace(sums, cuda::code_sums_workspace(p));
  device.check(cuda::launch_code_sums(p, workspace.mutable_data_ptr(), device.stream()));
}

}  // namespace

SIDECHAIN_CUDA_LIBRARY(library) { library.impl("code_sums_", TORCH_BOX(&code_sums_cuda)); }

}  // namespace sidechain::torch_ops
