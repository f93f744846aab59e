// SPDX-License-Identifier: Apache-2.0
// Vector types, launch shapes and error codes of the CUDA runtime, as far as the kernels use them.
#pragma once

#include <cstddef>
#include <cstdint>

#define EMULATION_VECTOR(NAME, T)                                               \
  struct alignas(sizeof(T)) NAME##1 { T x; };                                   \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                            \
  struct NAME##3 { T x, y, z; };                                                \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) NAME##4 { T x, y, z, w; }; \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                    \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }            \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATION_VECTOR(char, signed char)
EMULATION_VECTOR(uchar, unsigned char)
EMULATION_VECTOR(short, short)
EMULATION_VECTOR(ushort, unsigned short)
EMULATION_VECTOR(int, int)
EMULATION_VECTOR(uint, unsigned)
EMULATION_VECTOR(longlong, long long)
EMULATION_VECTOR(ulonglong, unsigned long long)
EMULATION_VECTOR(float, float)
EMULATION_VECTOR(double, double)
#undef EMULATION_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

using cudaStream_t = struct EmulatedStream*;
