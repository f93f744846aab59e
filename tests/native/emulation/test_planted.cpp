// SPDX-License-Identifier: Apache-2.0
// The emulation proves itself: kernels with one planted bug each have to be caught, and the same
// kernels without it have to pass. What only one build can see (EMULATION_ADDRESS: AddressSanitizer
// and UBSan; EMULATION_ORDER: every access checked) is tested in that build.
#include "cuda/shared.cuh"
#include "planted.h"

namespace {

using sidechain::cuda::dynamic_shared;

// ---- kernels: kBug = true plants the bug ----

template <bool kBug>
__global__ void reverse(const int* in, int* out) {
  __shared__ int held[kThreads];
  held[threadIdx.x] = 0;
  __syncthreads();
  held[threadIdx.x] = in[threadIdx.x];
  if (!kBug) __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void reverse_warp(const int* in, int* out) {
  __shared__ int held[kThreads];
  const unsigned first = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  held[threadIdx.x] = 0;
  __syncthreads();
  held[threadIdx.x] = in[threadIdx.x];
  if (!kBug) __syncwarp();
  out[first + 31 - lane] = held[first + 31 - lane];
}

// Writing again what others still read.
template <bool kBug>
__global__ void reuse(const int* in, int* out) {
  __shared__ int held;
  int sum = 0;
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x == 0) held = in[i];
    __syncthreads();
    sum += held;
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool kBug>
__global__ void one_word(const int* in, int* out) {
  if (kBug || threadIdx.x == 0) out[0] = in[0];
}

template <bool kBug>
__global__ void word_of_a_block(const int* in, int* out) {
  if (threadIdx.x == 0) out[kBug ? 0 : blockIdx.x] = in[0];
}

template <bool kBug>
__global__ void uninitialised(const int* in, int* out) {
  __shared__ int held[kThreads];
  if (!kBug || threadIdx.x != 5) held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void uninitialised_dynamic(const int* in, int* out) {
  int* held = dynamic_shared<int>();
  if (!kBug || threadIdx.x != 5) held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void diverged_shuffle(const int* in, int* out) {
  int v = in[threadIdx.x];
  if (!kBug || threadIdx.x % 32 < 16) v += __shfl_xor_sync(0xffffffffu, v, 1);
  out[threadIdx.x] = v;
}

template <bool kBug>
__global__ void two_shuffles(const int* in, int* out) {
  int v = in[threadIdx.x];
  if (kBug && threadIdx.x % 2) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
  } else {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
  }
  out[threadIdx.x] = v;
}

template <bool kBug>
__global__ void mask_without_source(const int* in, int* out) {
  int v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) v = __shfl_sync(0x0000ffffu, v, kBug ? 20 : 3);
  out[threadIdx.x] = v;
}

template <bool kBug>
__global__ void mask_without_caller(const int* in, int* out) {
  const unsigned mask = kBug ? 0x0000ffffu : 0xffffffffu;
  out[threadIdx.x] = static_cast<int>(__ballot_sync(mask, in[threadIdx.x] & 1));
}

template <bool kBug>
__global__ void diverged_barrier(const int* in, int* out) {
  if (kBug && threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool kBug>
__global__ void two_barriers(const int* in, int* out) {
  if (kBug && threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool kBug>
__global__ void global_end(const int* in, int* out) {
  out[threadIdx.x + (kBug && threadIdx.x == 7 ? kThreads : 0)] = in[threadIdx.x];
}

template <bool kBug>
__global__ void shared_end(const int* in, int* out) {
  __shared__ int held[kThreads];
  int* const at = held;  // a plain index is caught by UBSan already
  at[threadIdx.x + (kBug ? 1 : 0)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x];
}

template <bool kBug>
__global__ void dynamic_end(const int* in, int* out) {
  int* held = dynamic_shared<int>();
  held[threadIdx.x + (kBug ? 1 : 0)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x];
}

template <bool kBug>
__global__ void misaligned(const int* in, int* out) {
  const int4 v = *reinterpret_cast<const int4*>(in + (kBug ? 1 : 0));
  out[threadIdx.x] = v.x;
}

template <bool kBug>
__global__ void wide_shift(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x] << (kBug ? threadIdx.x : threadIdx.x % 8);
}

// 128 bytes of static shared memory beside the dynamic.
__global__ void fixed_and_dynamic(const int* in, int* out) {
  __shared__ int held[32];
  if (threadIdx.x < 32) held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x % 32];
}

// An array that no kernel declares cannot be counted.
__device__ int* hidden_array() {
  __shared__ int held[kThreads];
  return held;
}
template <bool kBug>
[[maybe_unused]] __global__ void array_of_a_function(const int* in, int* out) {
  __shared__ int mine[kThreads];
  int* const held = kBug ? hidden_array() : mine;
  held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x];
}

// A launch is refused with `bad` bytes of dynamic shared memory and not with `good`, where the
// kernel has asked for `asked` of them; `asked` beyond what a block can have is refused itself.
void shared_limit(const char* name, int capability, int asked, int good, int bad) {
  ++planted;
  emulation_capability(capability);
  int in[kThreads] = {}, out[kThreads] = {};
  const auto run = [&](int bytes) {
    // Past cuda/launch.cuh, which asks by itself.
    cudaLaunchConfig_t config = {};
    config.gridDim = 1, config.blockDim = kThreads, config.dynamicSmemBytes = bytes;
    return cudaLaunchKernelEx(&config, fixed_and_dynamic, static_cast<const int*>(in), out);
  };
  const auto ask = [&](int bytes) {
    return cudaFuncSetAttribute(fixed_and_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                bytes);
  };
  if (asked > 0) expect(ask(asked) == cudaSuccess, name, emulation::last_failure());
  expect(run(good) == cudaSuccess, name, emulation::last_failure());
  expect(run(bad) == cudaErrorInvalidConfiguration, name, "a launch");
  if (asked > 0) expect(ask(bad) == cudaErrorInvalidValue, name, "permission");
  emulation_capability(90);
}

void shared_limits() {
  shared_limit("48 KB of static and dynamic memory", 90, 0, 49024, 49100);
  shared_limit("227 KB on sm_90", 90, 227 * 1024 - 128, 227 * 1024 - 128, 227 * 1024 - 64);
  shared_limit("163 KB on sm_80", 80, 163 * 1024 - 128, 163 * 1024 - 128, 163 * 1024 - 64);
}

void warps_and_barriers() {
  refused("diverged shuffle", PAIR(diverged_shuffle), "__shfl_xor_sync(0xffffffff)");
  refused("two shuffles", PAIR(two_shuffles), "the warp has diverged");
  refused("mask without the source", PAIR(mask_without_source), "which the mask leaves out");
  refused("mask without the caller", PAIR(mask_without_caller), "whose mask leaves it out");
  refused("diverged barrier", PAIR(diverged_barrier), "__syncthreads");
  refused("two barriers", PAIR(two_barriers), "while others wait at line");
}

}  // namespace

int main() {
  warps_and_barriers();
  shared_limits();
#if defined(EMULATION_ORDER)
  refused("missing barrier", PAIR(reverse), "race");
  refused("missing warp barrier", PAIR(reverse_warp), "race");
  refused("missing second barrier", PAIR(reuse), "race");
  refused("one word, many threads", PAIR(one_word), "race");
  refused("one word, two blocks", PAIR(word_of_a_block), "another block of the launch", 2);
  refused("uninitialised shared memory", PAIR(uninitialised), "that no thread wrote");
  refused("uninitialised dynamic shared memory", PAIR(uninitialised_dynamic),
          "that no thread wrote");
  refused("shared array of a function", PAIR(array_of_a_function), "not the kernel's");
#else
  changes_the_result("missing barrier", PAIR(reverse));
  changes_the_result("missing warp barrier", PAIR(reverse_warp));
  changes_the_result("missing second barrier", PAIR(reuse));
  killed("end of a global buffer", PAIR(global_end), "heap-buffer-overflow");
  killed("end of shared memory", PAIR(shared_end), "insufficient space");
  killed("end of dynamic shared memory", PAIR(dynamic_end), "use-after-poison");
  killed("misaligned vector load", PAIR(misaligned), "misaligned address");
  killed("shift beyond the width", PAIR(wide_shift), "left shift of");
#endif
  return conclude("planted bugs");
}
