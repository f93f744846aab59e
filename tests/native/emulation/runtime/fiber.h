// SPDX-License-Identifier: Apache-2.0
// Stacks and the switch between them.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

struct Stack {
  void* bottom;
  size_t size;
};

// A suspended computation. Switching costs a few instructions on x86-64; elsewhere swapcontext.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  // For AddressSanitizer, which has to know the stack it runs on.
  void* fake_stack = nullptr;
  Stack stack = {};
};

// Makes `context` start in entry(), which must never return, on the given stack.
void prepare(Context& context, Stack stack, void (*entry)());

// Leaves `from` and continues `to`; returns when something switches back to `from`. `last` says
// that nothing will.
void switch_context(Context& from, Context& to, bool last);

// To be called first in entry().
void arrive(Context& first);

// `count` stacks of `size` bytes with a guard page below each, kept for the life of the process.
class Stacks {
 public:
  static constexpr size_t kSize = 256 * 1024;
  Stack at(int i);
  bool contains(const void* address) const {
    return address >= base_ && address < static_cast<const void*>(base_ + kSize * kCount);
  }
  // Forgets what AddressSanitizer knows of abandoned frames.
  void unpoison();

 private:
  static constexpr int kCount = 1024;
  char* base_ = nullptr;
};

}  // namespace emulation
