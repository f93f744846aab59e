// SPDX-License-Identifier: Apache-2.0
// Stands in for the header of the CUDA toolkit when kernels are compiled as host C++.
#pragma once

#include "emulation/device.h"
#include "emulation/host.h"
#include "emulation/math.h"
