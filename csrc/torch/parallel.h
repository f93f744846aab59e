// SPDX-License-Identifier: Apache-2.0
// The threads of torch for the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "sidechain/parallel.h"

namespace sidechain::torch_ops {

inline void parallel_for(int64_t n, int64_t grain, cpu::Body body, void* context) {
  torch::stable::parallel_for(0, n, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace sidechain::torch_ops
