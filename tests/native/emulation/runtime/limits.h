// SPDX-License-Identifier: Apache-2.0
// What no GPU accepts: shapes of grids and blocks, and more shared memory than a block can have.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "emulation/runtime.h"
#include "image.h"

namespace emulation {

class Limits {
 public:
  Limits() { set_capability(90); }
  void set_capability(int capability);
  // Both return why not, "" where all is well. A kernel that did not ask may have 48 KB, one that
  // asked as much dynamic memory as it asked for; static arrays count in either case.
  std::string ask_shared(const void* kernel, int bytes);
  std::string refusal(const Launch& launch, const KernelSymbols& kernel) const;

 private:
  size_t shared_;  // of a block, static and dynamic
  std::map<const void*, size_t> asked_;
};

constexpr int kMaxThreads = 1024;  // of a block

}  // namespace emulation
