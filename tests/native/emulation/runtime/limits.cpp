// SPDX-License-Identifier: Apache-2.0
#include "limits.h"

#include <cstdint>

namespace emulation {
namespace {

constexpr size_t kSharedWithoutAsking = 48 * 1024;

// Dynamic shared memory begins behind the static arrays, aligned as csrc/cuda/shared.cuh asks: 32
// static bytes cost 128.
size_t before_dynamic(const KernelSymbols& kernel) {
  return (kernel.shared_bytes + 127) / 128 * 128;
}

}  // namespace

void Limits::set_capability(int capability) { shared_ = (capability >= 90 ? 227 : 163) * 1024; }

std::string Limits::ask_shared(const void* kernel, int bytes) {
  if (bytes < 0 || before_dynamic(kernel_symbols(kernel)) + static_cast<size_t>(bytes) > shared_) {
    return "asks for " + std::to_string(bytes) + " bytes of dynamic shared memory, of " +
           std::to_string(shared_) + " with static ones that a block can have";
  }
  asked_[kernel] = static_cast<size_t>(bytes);
  return "";
}

std::string Limits::refusal(const Launch& launch, const KernelSymbols& kernel) const {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    return "a grid CUDA cannot have";
  }
  if (threads == 0 || threads > kMaxThreads || block.z > 64) return "a block CUDA cannot have";
  if (!kernel.known) return "static shared memory cannot be counted: no symbol table";
  const size_t fixed = before_dynamic(kernel), bytes = fixed + launch.shared_bytes;
  const auto asked = asked_.find(launch.kernel);
  size_t allowed = asked != asked_.end() ? fixed + asked->second : kSharedWithoutAsking;
  if (allowed > shared_) allowed = shared_;
  if (bytes <= allowed) return "";
  return "more shared memory than allowed: " + std::to_string(fixed) + " static + " +
         std::to_string(launch.shared_bytes) + " dynamic of " + std::to_string(allowed) + " bytes";
}

}  // namespace emulation
