// SPDX-License-Identifier: Apache-2.0
// What the emulated device computes, against plain loops: collectives with whole and partial masks,
// block votes, atomics, launch shapes, dynamic shared memory, asynchronous copies, half and
// bfloat16 conversions.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/shared.cuh"

namespace {

using sidechain::cuda::dynamic_shared;
using sidechain::cuda::launch;

int failures = 0;

#define EXPECT(CONDITION)                                                 \
  do {                                                                    \
    if (!(CONDITION)) {                                                   \
      ++failures;                                                         \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #CONDITION); \
    }                                                                     \
  } while (0)

constexpr int kThreads = 64;
constexpr int kResults = 16;
constexpr unsigned kAll = 0xffffffffu, kOdd = 0xaaaaaaaau;

__global__ void collectives(const int* in, int* out) {
  const int t = threadIdx.x, v = in[t];
  int* const mine = out + t * kResults;
  mine[0] = __shfl_sync(kAll, v, 3);
  mine[1] = __shfl_up_sync(kAll, v, 2, 8);
  mine[2] = __shfl_down_sync(kAll, v, 2, 8);
  mine[3] = __shfl_xor_sync(kAll, v, 5);
  mine[4] = static_cast<int>(__ballot_sync(kAll, v > 40));
  mine[5] = __any_sync(kAll, v == 7);
  mine[6] = __all_sync(kAll, v >= 0);
  mine[7] = static_cast<int>(__match_any_sync(kAll, v % 3));
  mine[8] = __reduce_max_sync(kAll, v - 50);
  mine[9] = static_cast<int>(__reduce_add_sync(kAll, static_cast<unsigned>(v)));
  mine[10] = 0;
  if (t % 2) mine[10] = __reduce_min_sync(kOdd, v);
  mine[11] = __syncthreads_count(v % 2);
  mine[12] = __syncthreads_or(v == 1000);
  mine[13] = __syncthreads_and(v < 1000);
  double wide = v;
  for (int step = 16; step > 0; step /= 2) wide += __shfl_xor_sync(kAll, wide, step);
  mine[14] = static_cast<int>(wide);
  int all = 0;
  mine[15] = static_cast<int>(__match_all_sync(kAll, t / 32, &all)) + all;
}

void test_collectives() {
  std::vector<int> in(kThreads), out(kThreads * kResults);
  for (int t = 0; t < kThreads; ++t) in[t] = t * 37 % 101;
  EXPECT(launch(collectives, 1, kThreads, 0, nullptr, static_cast<const int*>(in.data()),
                out.data()) == cudaSuccess);
  for (int t = 0; t < kThreads; ++t) {
    const int first = t / 32 * 32, lane = t % 32;
    const int* const warp = &in[first];
    const int* const got = &out[t * kResults];
    unsigned ballot = 0, match = 0;
    int any = 0, top = -1000, sum = 0, low_odd = 1000, odd = 0;
    for (int i = 0; i < 32; ++i) {
      ballot |= warp[i] > 40 ? 1u << i : 0u;
      match |= warp[i] % 3 == in[t] % 3 ? 1u << i : 0u;
      any |= warp[i] == 7 ? 1 : 0;
      top = std::max(top, warp[i] - 50);
      sum += warp[i];
      if (i % 2) low_odd = std::min(low_odd, warp[i]);
    }
    for (int v : in) odd += v % 2;
    EXPECT(got[0] == warp[3]);
    EXPECT(got[1] == (lane % 8 >= 2 ? warp[lane - 2] : in[t]));
    EXPECT(got[2] == (lane % 8 < 6 ? warp[lane + 2] : in[t]));
    EXPECT(got[3] == warp[lane ^ 5]);
    EXPECT(got[4] == static_cast<int>(ballot));
    EXPECT(got[5] == any);
    EXPECT(got[6] == 1);
    EXPECT(got[7] == static_cast<int>(match));
    EXPECT(got[8] == top);
    EXPECT(got[9] == sum);
    EXPECT(got[10] == (t % 2 ? low_odd : 0));
    EXPECT(got[11] == odd);
    EXPECT(got[12] == 0);
    EXPECT(got[13] == 1);
    EXPECT(got[14] == sum);
    EXPECT(got[15] == 0);  // -1 as a mask, and 1
  }
}

__global__ void atomics(int* count, float* sum, unsigned* highest, unsigned long long* first) {
  atomicAdd(count, 1);
  atomicAdd(sum, 0.5f);
  atomicMax(highest, blockIdx.x * blockDim.x + threadIdx.x);
  atomicCAS(first, 0ull, 1ull + threadIdx.x);
}

void test_atomics_and_grids() {
  int count = 0;
  float sum = 0.0f;
  unsigned highest = 0;
  unsigned long long first = 0;
  EXPECT(launch(atomics, 5, 48, 0, nullptr, &count, &sum, &highest, &first) == cudaSuccess);
  EXPECT(count == 240);
  EXPECT(sum == 120.0f);
  EXPECT(highest == 239);
  EXPECT(first >= 1 && first <= 48);
  EXPECT(launch(atomics, 0, 48, 0, nullptr, &count, &sum, &highest, &first) ==
         cudaErrorInvalidConfiguration);
  EXPECT(launch(atomics, 1, 1025, 0, nullptr, &count, &sum, &highest, &first) ==
         cudaErrorInvalidConfiguration);
  EXPECT(count == 240);
}

__global__ void rotate(float* out) {
  float* held = dynamic_shared<float>();
  held[threadIdx.x] = static_cast<float>(threadIdx.x + blockIdx.x);
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = held[(threadIdx.x + 1) % blockDim.x];
}

void test_dynamic_shared() {
  std::vector<float> out(3 * kThreads);
  EXPECT(launch(rotate, 3, kThreads, kThreads * 4, nullptr, out.data()) == cudaSuccess);
  for (int i = 0; i < 3 * kThreads; ++i) {
    EXPECT(out[i] == static_cast<float>((i % kThreads + 1) % kThreads + i / kThreads));
  }
}

__global__ void rotate_fixed(float* out) {
  __shared__ float held[kThreads];
  held[threadIdx.x] = dynamic_shared<float>()[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = held[(threadIdx.x + 1) % kThreads];
}

// The launches of the package ask for what they need, whatever is static beside it; no smaller
// launch takes it back, and what no block can have is refused.
void test_shared_limit() {
  std::vector<float> out(kThreads);
  const auto run = [&](size_t bytes) {
    return launch(rotate_fixed, 1, kThreads, bytes, nullptr, out.data());
  };
  EXPECT(run(48 * 1024) == cudaSuccess);
  EXPECT(run(227 * 1024 - 256) == cudaSuccess);
  EXPECT(run(1024) == cudaSuccess);
  cudaLaunchConfig_t config = {};
  config.gridDim = 1, config.blockDim = kThreads, config.dynamicSmemBytes = 227 * 1024 - 256;
  EXPECT(cudaLaunchKernelEx(&config, rotate_fixed, out.data()) == cudaSuccess);
  EXPECT(run(227 * 1024 - 255) == cudaErrorInvalidValue);
}

// Groups arrive in order, all but the newest few; 4, 8 and 16 bytes, with zeros at the end. What
// pends is not there yet, which only the build that does not forbid the read can see.
__global__ void copies(const int* in, int* out) {
  __shared__ __align__(16) int held[4][kThreads];
  const int t = threadIdx.x;
  __pipeline_memcpy_async(&held[0][t], in + t, 4);
  __pipeline_commit();
  if (t % 2 == 0) __pipeline_memcpy_async(&held[1][t], in + t, 8, 4);
  __pipeline_commit();
  if (t % 4 == 0) __pipeline_memcpy_async(&held[2][t], in + t, 16, 6);
  __pipeline_memcpy_async(&held[3][t], nullptr, 4, 4);
  __pipeline_commit();
  __pipeline_wait_prior(2);
  __syncthreads();
  out[t] = held[0][kThreads - 1 - t];
#if defined(EMULATION_ADDRESS)
  if (t % 2 == 0) out[4 * kThreads + t] = held[1][t];
#endif
  __pipeline_wait_prior(1);
  __syncthreads();
  out[kThreads + t] = held[1][kThreads - 1 - t];
  __pipeline_wait_prior(20);  // at most eight groups pend, here none is older
#if defined(EMULATION_ADDRESS)
  if (t % 4 == 0) out[5 * kThreads + t] = held[2][t];
#endif
  __pipeline_wait_prior(0);
  __syncthreads();
  out[2 * kThreads + t] = held[2][kThreads - 1 - t];
  out[3 * kThreads + t] = held[3][kThreads - 1 - t];
}

void test_copies() {
  std::vector<int> in(kThreads), out(6 * kThreads, -1);
  for (int t = 0; t < kThreads; ++t) in[t] = 0x10001 * (t + 3);
  EXPECT(launch(copies, 1, kThreads, 0, nullptr, static_cast<const int*>(in.data()), out.data()) ==
         cudaSuccess);
  for (int t = 0; t < kThreads; ++t) {
    const int from = kThreads - 1 - t;
    const int half = from % 4 < 2 ? in[from] : from % 4 == 2 ? in[from] & 0xffff : 0;
    EXPECT(out[t] == in[from]);
    EXPECT(out[kThreads + t] == (from % 2 == 0 ? in[from] : 0));
    EXPECT(out[2 * kThreads + t] == half);
    EXPECT(out[3 * kThreads + t] == 0);
    EXPECT(out[4 * kThreads + t] == -1);
    EXPECT(out[5 * kThreads + t] == -1);
  }
}

// More than eight groups: those before the last eight have arrived, whatever was asked for.
__global__ void many_groups(const int* in, int* out) {
  __shared__ int held[12];
  for (int i = 0; i < 12; ++i) {
    __pipeline_memcpy_async(held + i, in + i, 4);
    __pipeline_commit();
  }
  __pipeline_wait_prior(100);
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[i] = held[i];
  __pipeline_wait_prior(0);
}

void test_many_groups() {
  const int in[12] = {5, 6, 7, 8};
  int out[4] = {};
  EXPECT(launch(many_groups, 1, 1, 0, nullptr, in, out) == cudaSuccess);
  EXPECT(std::equal(out, out + 4, in));
}

// A dry launch is checked and noted, and runs nothing.
void test_dry_launches() {
  const std::vector<float> before(2 * kThreads, -1.0f);
  std::vector<float> out = before;
  emulation_dry(1);
  EXPECT(launch(rotate, 2, kThreads, kThreads * 4, nullptr, out.data()) == cudaSuccess);
  EXPECT(launch(rotate, 2, 1025, 0, nullptr, out.data()) == cudaErrorInvalidConfiguration);
  EXPECT(out == before);
  const std::string noted = emulation_launches();
  const std::string line = "2 " + std::to_string(kThreads) + " " + std::to_string(kThreads * 4) +
                           " (anonymous namespace)::rotate";
  EXPECT(noted.compare(0, line.size(), line) == 0);
  EXPECT(noted.find('\n') == noted.size() - 1);
  emulation_dry(0);
  EXPECT(*emulation_launches() == '\0');
  EXPECT(launch(rotate, 2, kThreads, kThreads * 4, nullptr, out.data()) == cudaSuccess);
  EXPECT(out != before);
}

// What neighbours read before a __syncwarp does not stand against a thread that reads and writes
// its own element after it.
__global__ void own_after_shared(const int* in, int* out) {
  int* const shared = dynamic_shared<int>();
  const int t = threadIdx.x;
  shared[t] = in[t];
  __syncwarp();
  out[t] = shared[t ^ 1] + shared[t ^ 2];
  __syncwarp();
  for (int i = 0; i < 2; ++i) shared[t] += 1;
  __syncwarp();
  out[t] += shared[t ^ 1];
}

void test_own_after_shared() {
  int in[kThreads], out[kThreads] = {};
  for (int t = 0; t < kThreads; ++t) in[t] = 3 * t;
  EXPECT(launch(own_after_shared, 1, kThreads, sizeof in, nullptr, in, out) == cudaSuccess);
  for (int t = 0; t < kThreads; ++t) EXPECT(out[t] == 2 * in[t ^ 1] + in[t ^ 2] + 2);
}

// Every value of a 16-bit type converts to the double the format defines and back to itself, and a
// float between two of them goes to the nearer, the even one in the middle.
template <class T>
void test_conversions(int exponent_bits, float (*widen)(T), T (*narrow)(float)) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int top = (1 << exponent_bits) - 1;
  for (int bits = 0; bits < 32768; ++bits) {
    const int exponent = bits >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
    const float value = widen(T{static_cast<uint16_t>(bits)});
    if (exponent == top) {
      EXPECT(mantissa == 0 ? std::isinf(value) : std::isnan(value));
      if (mantissa != 0) EXPECT(std::isnan(widen(narrow(value))));
      continue;
    }
    const double unit = std::ldexp(1.0, std::max(exponent, 1) - bias - mantissa_bits);
    const double exact = unit * (mantissa + (exponent > 0 ? 1 << mantissa_bits : 0));
    EXPECT(static_cast<double>(value) == exact);
    EXPECT(narrow(value).bits == bits);
    EXPECT(narrow(-value).bits == (bits | 0x8000));
    const auto middle = static_cast<float>(exact + unit / 2);
    if (static_cast<double>(middle) != exact + unit / 2) continue;  // below the smallest float
    EXPECT(narrow(middle).bits == bits + (bits & 1));
    EXPECT(narrow(std::nextafter(middle, 0.0f)).bits == bits);
    EXPECT(narrow(std::nextafter(middle, INFINITY)).bits == bits + 1);
  }
}

}  // namespace

int main() {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    emulation_seed(seed);
    test_collectives();
    test_atomics_and_grids();
    test_dynamic_shared();
    test_copies();
    test_own_after_shared();
  }
  test_many_groups();
  test_shared_limit();
  test_dry_launches();
  test_conversions<__half>(5, __half2float, __float2half_rn);
  test_conversions<__nv_bfloat16>(8, __bfloat162float, __float2bfloat16_rn);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
