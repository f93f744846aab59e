// SPDX-License-Identifier: Apache-2.0
// Kernels whose machine code is known beforehand: test_loops.py says what has to be found in each.
// No loop is unrolled, so that the counts do not depend on what a compiler likes.

__global__ void __launch_bounds__(256) scalar_loop(const float* x, float* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) y[i] = 2.0f * x[i];
}

__global__ void __launch_bounds__(256) pack_loop(const float4* x, float4* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    const float4 v = x[i];
    y[i] = make_float4(2.0f * v.x, 2.0f * v.y, 2.0f * v.z, 2.0f * v.w);
  }
}

// Four loads before the first of their results is used.
__global__ void __launch_bounds__(128)
    four_loads(const float4* __restrict__ x, float4* __restrict__ y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) {
    const float4 a = x[i], b = x[i + 128], c = x[i + 256], d = x[i + 384];
    y[i] = make_float4(a.x + b.x + c.x + d.x, a.y + b.y + c.y + d.y, a.z + b.z + c.z + d.z,
                       a.w + b.w + c.w + d.w);
  }
}

// Each address is what the load before it has brought.
__global__ void __launch_bounds__(128) chain(const int* next, int* y, int n) {
  int at = threadIdx.x;
#pragma unroll 1
  for (int i = 0; i < n; ++i) at = next[next[next[next[at]]]];
  y[threadIdx.x] = at;
}

// Columns inside, 2 bytes each; a row outside, 16 bytes once.
__global__ void __launch_bounds__(64)
    nested(const unsigned short* x, uint4* y, int rows, int columns) {
#pragma unroll 1
  for (int r = threadIdx.x; r < rows; r += 64) {
    unsigned sum = 0;
#pragma unroll 1
    for (int c = 0; c < columns; ++c) sum += x[r * columns + c];
    y[r] = make_uint4(sum, 0, 0, 0);
  }
}

// Nothing but the grid goes round.
__global__ void __launch_bounds__(256) no_loop(const uchar1* x, uchar1* y) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  y[i] = x[i];
}

__global__ void __launch_bounds__(1024) spilling(float* x, int n) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i * n];
  for (int i = 0; i < n; ++i) local[x[i] > 0 ? i % 64 : 3] += x[i];
  float sum = 0;
  for (int i = 0; i < 64; ++i) sum += local[i];
  x[threadIdx.x] = sum;
}

// 40,000 bytes: five blocks by shared memory on a multiprocessor of 228 KiB, four on one of 164.
__global__ void __launch_bounds__(256) static_shared(const float* x, float* y, int n) {
  __shared__ float held[10000];
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) held[i % 10000] = x[i];
  __syncthreads();
  y[threadIdx.x] = held[(threadIdx.x * 37) % 10000];
}
