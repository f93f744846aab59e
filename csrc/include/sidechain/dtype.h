// SPDX-License-Identifier: Apache-2.0
// Element types that cross the framework-free boundary.
#pragma once

#include <cstdint>

namespace sidechain {

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace sidechain
