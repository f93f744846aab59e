// SPDX-License-Identifier: Apache-2.0
// Planted bugs of asynchronous copies. The bytes of a copy arrive at its thread's wait; whatever a
// GPU would answer by luck has to be a message or a wrong result here.
#include <cuda_pipeline_primitives.h>

#include "cuda/shared.cuh"
#include "planted.h"

namespace {

using sidechain::cuda::dynamic_shared;

__device__ void copy(int* dst, const int* src) { __pipeline_memcpy_async(dst, src, sizeof(int)); }

// ---- kernels: kBug = true plants the bug ----

template <bool kBug>
__global__ void no_wait(const int* in, int* out) {
  __shared__ int held[kThreads];
  copy(held + threadIdx.x, in + threadIdx.x);
  __pipeline_commit();
  if (!kBug) __pipeline_wait_prior(0);
  __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
  if (kBug) __pipeline_wait_prior(0);
}

template <bool kBug>
__global__ void no_commit(const int* in, int* out) {
  __shared__ int held[kThreads];
  copy(held + threadIdx.x, in + threadIdx.x);
  if (!kBug) __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
  if (kBug) __pipeline_commit();
  __pipeline_wait_prior(0);
}

template <bool kBug>
__global__ void wait_for_too_few(const int* in, int* out) {
  __shared__ int held[2][kThreads];
  for (int stage = 0; stage < 2; ++stage) {
    copy(&held[stage][threadIdx.x], in + threadIdx.x);
    __pipeline_commit();
  }
  __pipeline_wait_prior(kBug ? 1 : 0);
  __syncthreads();
  out[threadIdx.x] = held[0][threadIdx.x] + held[1][kThreads - 1 - threadIdx.x];
  __pipeline_wait_prior(0);
}

// Only the thread that issued a copy can wait for it.
template <bool kBug>
__global__ void wait_of_another(const int* in, int* out) {
  __shared__ int held[kThreads];
  copy(held + threadIdx.x, in + threadIdx.x);
  __pipeline_commit();
  if (!kBug || threadIdx.x < 32) __pipeline_wait_prior(0);
  __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
  __syncthreads();
  __pipeline_wait_prior(0);
}

template <bool kBug>
__global__ void no_barrier(const int* in, int* out) {
  __shared__ int held[kThreads];
  held[threadIdx.x] = 0;
  __syncthreads();
  copy(held + threadIdx.x, in + threadIdx.x);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  if (!kBug) __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
}

template <bool kBug>
[[maybe_unused]] __global__ void no_barrier_for_itself(const int* in, int* out) {
  __shared__ int held[kThreads];
  copy(held + threadIdx.x, in + threadIdx.x);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  if (!kBug) __syncwarp();
  out[threadIdx.x] = held[threadIdx.x];
}

// The next copy into a buffer that others still read.
template <bool kBug>
__global__ void reuse(const int* in, int* out) {
  __shared__ int held[kThreads];
  int sum = 0;
  for (int i = 0; i < 3; ++i) {
    copy(held + threadIdx.x, in + (threadIdx.x + i) % kThreads);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    sum += held[kThreads - 1 - threadIdx.x];
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool kBug>
__global__ void store_to_pending(const int* in, int* out) {
  __shared__ int held[kThreads];
  copy(held + threadIdx.x, in + threadIdx.x);
  __pipeline_commit();
  if (kBug && threadIdx.x == 9) held[threadIdx.x] = 0;
  __pipeline_wait_prior(0);
  __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
}

// Three copies in flight through a ring of two.
template <bool kBug>
__global__ void copy_to_pending(const int* in, int* out) {
  __shared__ int held[2][kThreads];
  for (int i = 0; i < 3; ++i) {
    if (!kBug && i == 2) __pipeline_wait_prior(1);
    copy(&held[i % 2][threadIdx.x], in + threadIdx.x);
    __pipeline_commit();
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  out[threadIdx.x] = held[0][kThreads - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void store_to_source(const int* in, int* out) {
  __shared__ int held[kThreads];
  copy(held + threadIdx.x, in + threadIdx.x);
  __pipeline_commit();
  if (kBug && threadIdx.x == 9) const_cast<int*>(in)[threadIdx.x] = 0;
  __pipeline_wait_prior(0);
  __syncthreads();
  out[threadIdx.x] = held[kThreads - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void pending_at_the_end(const int* in, int* out) {
  __shared__ int held[kThreads];
  copy(held + threadIdx.x, in + threadIdx.x);
  __pipeline_commit();
  if (!kBug) __pipeline_wait_prior(0);
  out[threadIdx.x] = in[threadIdx.x];
}

template <int kFault>
__global__ void one_copy(const int* in, int* out) {
  __shared__ __align__(16) int held[kThreads];
  int* const dynamic = dynamic_shared<int>();
  if (threadIdx.x == 0) {
    void* to = held;
    const void* from = in;
    size_t size = 16, zfill = 0;
    if (kFault == 1) size = 12;
    if (kFault == 2) zfill = 20;
    if (kFault == 3) to = held + 1;
    if (kFault == 4) from = in + 1;
    if (kFault == 5) to = out;
    if (kFault == 6) from = dynamic;
    if (kFault == 7) to = dynamic + kThreads;
    if (kFault == 8) from = in + kThreads;
    __pipeline_memcpy_async(to, from, size, zfill);
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x % 4];
}

void places() {
  const Kernel good = one_copy<0>;
  refused("size of a copy", good, one_copy<1>, "has to move 4, 8 or 16 bytes");
  refused("zeros beyond the copy", good, one_copy<2>, "fills more than it moves");
  refused("misaligned destination", good, one_copy<3>, "has a misaligned destination");
  refused("misaligned source", good, one_copy<4>, "has a misaligned source");
  refused("copy to global memory", good, one_copy<5>, "does not end in shared memory");
  refused("copy from shared memory", good, one_copy<6>, "does not start in global memory");
  refused("copy behind dynamic shared memory", good, one_copy<7>, "does not end in shared memory");
#if defined(EMULATION_ADDRESS)
  refused("copy from behind a buffer", good, one_copy<8>, "reads outside of every buffer");
#endif
}

}  // namespace

int main() {
  places();
  refused("copy pending at the end", PAIR(pending_at_the_end), "is pending");
  refused("copy into a pending copy", PAIR(copy_to_pending),
          "writes what a pending copy of thread");
  refused("source written before the wait", PAIR(store_to_source), "whose source has changed");
#if defined(EMULATION_ORDER)
  refused("missing wait", PAIR(no_wait), "has not been waited for");
  refused("missing commit", PAIR(no_commit), "has not been waited for");
  refused("wait for too few groups", PAIR(wait_for_too_few), "has not been waited for");
  refused("wait of another thread", PAIR(wait_of_another), "has not been waited for");
  refused("store to a pending copy", PAIR(store_to_pending), "has not been waited for");
  refused("missing barrier behind the wait", PAIR(no_barrier), "race");
  refused("read of its own copy", PAIR(no_barrier_for_itself), "race with the compiler");
  refused("copy over what others read", PAIR(reuse), "race");
#else
  changes_the_result("missing wait", PAIR(no_wait));
  changes_the_result("missing commit", PAIR(no_commit));
  changes_the_result("wait for too few groups", PAIR(wait_for_too_few));
  changes_the_result("wait of another thread", PAIR(wait_of_another));
  refused("store to a pending copy", PAIR(store_to_pending), "was written before it arrived");
  changes_the_result("missing barrier behind the wait", PAIR(no_barrier));
  changes_the_result("copy over what others read", PAIR(reuse));
#endif
  return conclude("planted bugs of asynchronous copies");
}
