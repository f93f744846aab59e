// SPDX-License-Identifier: Apache-2.0
// The emulation proves itself: kernels with one planted bug each have to be caught, and the same
// kernels without it have to pass. What only one build can see (EMULATION_ADDRESS: AddressSanitizer
// and UBSan; EMULATION_ORDER: every access checked) is tested in that build.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/shared.cuh"

// A failed launch abandons its fibers with what their frames own.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

namespace {

using sidechain::cuda::dynamic_shared;
using sidechain::cuda::launch;

int failures = 0;
int planted = 0;

void expect(bool condition, const char* what, const std::string& got = "") {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s; got: %s\n", what, got.c_str());
}

constexpr int kThreads = 64;

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

// ---- how they are run ----

using Kernel = void (*)(const int*, int*);

struct Outcome {
  cudaError_t status;
  std::vector<int> out;
};

Outcome run(Kernel kernel, uint64_t seed, int blocks = 1) {
  emulation_seed(seed);
  std::vector<int> in(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = 3 * i + 1;
  Outcome outcome = {cudaSuccess, std::vector<int>(kThreads)};
  outcome.status = launch(kernel, blocks, kThreads, kThreads * sizeof(int), nullptr,
                          static_cast<const int*>(in.data()), outcome.out.data());
  return outcome;
}

// The launch of the bug fails and says `message`; without the bug it succeeds.
[[maybe_unused]] void refused(const char* name, Kernel good, Kernel bad, const char* message,
                              int blocks = 1) {
  ++planted;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    const Outcome fine = run(good, seed, blocks);
    expect(fine.status == cudaSuccess, (std::string(name) + " without the bug").c_str(),
           emulation::last_failure());
    const Outcome caught = run(bad, seed, blocks);
    const std::string said = emulation::last_failure();
    expect(caught.status == cudaErrorLaunchFailure && said.find(message) != std::string::npos, name,
           said);
  }
}

// The sanitizer ends the process with `message`; without the bug it does not.
[[maybe_unused]] void killed(const char* name, Kernel good, Kernel bad, const char* message) {
  ++planted;
  expect(run(good, 1).status == cudaSuccess, name, emulation::last_failure());
  int ends[2];
  if (pipe(ends) != 0) return expect(false, "pipe");
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    run(bad, 1);
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char text[4096];
  for (ssize_t n; (n = read(ends[0], text, sizeof text)) > 0;) said.append(text, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool died = !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  expect(died && said.find(message) != std::string::npos, name, said);
}

// Some seed gives a wrong result; without the bug none does.
[[maybe_unused]] void changes_the_result(const char* name, Kernel good, Kernel bad) {
  ++planted;
  const std::vector<int> right = run(good, 1).out;
  int wrong = 0;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    expect(run(good, seed).out == right, (std::string(name) + " without the bug").c_str());
    wrong += run(bad, seed).out != right ? 1 : 0;
  }
  expect(wrong > 0, name, "the right result at all seeds");
}

#define PAIR(KERNEL) KERNEL<false>, KERNEL<true>

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
#if defined(EMULATION_ORDER)
  refused("missing barrier", PAIR(reverse), "race");
  refused("missing warp barrier", PAIR(reverse_warp), "race");
  refused("missing second barrier", PAIR(reuse), "race");
  refused("one word, many threads", PAIR(one_word), "race");
  refused("one word, two blocks", PAIR(word_of_a_block), "another block of the launch", 2);
  refused("uninitialised shared memory", PAIR(uninitialised), "that no thread wrote");
  refused("uninitialised dynamic shared memory", PAIR(uninitialised_dynamic),
          "that no thread wrote");
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
  std::printf("%d planted bugs, %d failed expectations\n", planted, failures);
  return failures == 0 ? 0 : 1;
}
