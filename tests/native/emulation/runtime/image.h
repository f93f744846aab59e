// SPDX-License-Identifier: Apache-2.0
// What the symbol table of the program or library says of a kernel: its name, and the `__shared__`
// arrays that it declares. `__shared__` is `static` here, and the mangled name of a static variable
// holds that of its function.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace emulation {

struct SharedArray {
  char* begin;
  size_t size;
  bool holds(const void* address, size_t bytes) const {
    const char* at = static_cast<const char*>(address);
    return begin <= at && at + bytes <= begin + size;
  }
};

struct KernelSymbols {
  bool known = false;  // false: stripped, so the arrays cannot be counted
  std::string name = "kernel";
  std::vector<SharedArray> shared;
  size_t shared_bytes = 0;
};

// Kept for the life of the process.
const KernelSymbols& kernel_symbols(const void* kernel);

}  // namespace emulation
