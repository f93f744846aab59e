// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(EMULATION_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

void start_switch([[maybe_unused]] Context& from, [[maybe_unused]] const Context& to,
                  [[maybe_unused]] bool last) {
#if defined(EMULATION_ADDRESS)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack.bottom, to.stack.size);
#endif
}

Context* left_from = nullptr;

void finish_switch([[maybe_unused]] Context& here) {
#if defined(EMULATION_ADDRESS)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &size);
  // The stack of the scheduler is known only once it has been left.
  if (left_from != nullptr && left_from->stack.bottom == nullptr) {
    left_from->stack = {const_cast<void*>(bottom), size};
  }
#endif
}

}  // namespace

#if defined(__x86_64__)

// rdi: where to keep the stack pointer of the context left; rsi: the one to continue with. Only
// what a callee must preserve is saved.
extern "C" void emulation_swap(void** from, void* to);
asm(R"(
.text
.hidden emulation_swap
.globl emulation_swap
.type emulation_swap, @function
emulation_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_swap, .-emulation_swap
)");

void prepare(Context& context, Stack stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack.bottom) + stack.size;
  auto* words = reinterpret_cast<uint64_t*>(top / 16 * 16);
  *--words = 0;  // the return address of entry, which never returns; keeps the ABI's alignment
  *--words = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--words = 0;
  context.stack_pointer = words;
  context.fake_stack = nullptr;
  context.stack = stack;
}

void switch_context(Context& from, Context& to, bool last) {
  start_switch(from, to, last);
  left_from = &from;
  emulation_swap(&from.stack_pointer, to.stack_pointer);
  finish_switch(from);
}

#else

void prepare(Context& context, Stack stack, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack.bottom;
  context.registers.uc_stack.ss_size = stack.size;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
  context.fake_stack = nullptr;
  context.stack = stack;
}

void switch_context(Context& from, Context& to, bool last) {
  start_switch(from, to, last);
  left_from = &from;
  swapcontext(&from.registers, &to.registers);
  finish_switch(from);
}

#endif

void arrive(Context& first) { finish_switch(first); }

Stack Stacks::at(int i) {
  constexpr size_t kPage = 4096;
  if (base_ == nullptr) {
    void* memory = mmap(nullptr, kSize * kCount, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("emulation: stacks");
      std::abort();
    }
    base_ = static_cast<char*>(memory);
    for (int k = 0; k < kCount; ++k) mprotect(base_ + k * kSize, kPage, PROT_NONE);
  }
  // Stacks that all began at the same offset would fight for the same sets of the caches.
  const size_t stagger = static_cast<size_t>(i) % 64 * 17 * 64;
  return {base_ + i * kSize + kPage, kSize - kPage - stagger};
}

void Stacks::unpoison() {
#if defined(EMULATION_ADDRESS)
  if (base_ != nullptr) __asan_unpoison_memory_region(base_, kSize * kCount);
#endif
}

}  // namespace emulation
