// SPDX-License-Identifier: Apache-2.0
// What the emulated CUDA headers ask of the runtime (tests/native/emulation/runtime).
//
// Every thread of a block is a fiber. A fiber runs until it waits at a barrier or a warp
// collective; who goes on next is drawn from a seeded generator, and so is the order of the blocks.
// Whatever CUDA leaves undefined ends the launch with cudaErrorLaunchFailure and a message.
#pragma once

#include "emulation/types.h"

// Of the thread that runs now. Thread-local, so that no checker takes them for shared memory.
#define EMULATION_BUILTIN extern __thread __attribute__((tls_model("initial-exec")))
EMULATION_BUILTIN uint3 threadIdx, blockIdx;
EMULATION_BUILTIN dim3 blockDim, gridDim;

namespace emulation {

// Source line of a call: lanes that meet in a collective must come from the same one. A file has
// one name, so that names compare as pointers.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};
#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Collective {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kMatchAll,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kReduceMinSigned,
  kReduceMaxSigned,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
};

// Waits for every lane of `mask`, which must make the same call, and returns this lane's result.
// `argument` is the source lane or distance of a shuffle, `width` its segment.
uint64_t collective(Collective kind, unsigned mask, uint64_t value, int argument, int width,
                    Site site);

struct Votes {
  int count, threads;
};
// Waits for every thread of the block; returns how many brought a true predicate.
Votes barrier(bool predicate, Site site);

// The dynamic shared memory of the block; the launch says how much of it may be touched.
void* dynamic_shared_memory();

// Asynchronous copies to shared memory, as the primitives of cuda_pipeline_primitives.h.
void copy_async(void* dst, const void* src, size_t size, size_t zfill, Site site);
void commit_copies();
void wait_copies(size_t prior, Site site);

// Tells the order checker that the access that follows is atomic.
void note_atomic(const void* address, size_t size);

// Ends the launch; printf-style message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- host side ----

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
};
// Runs body(context) once per thread.
cudaError_t run(const Launch& launch, void (*body)(void*), void* context);
cudaError_t allow_shared_bytes(const void* kernel, int bytes);
// The message of the last failed launch.
const char* last_failure();

}  // namespace emulation

// Entry points for drivers written in another language.
extern "C" {
void emulation_seed(uint64_t seed);
// The compute capability, 80 or 90 (the default): how much shared memory a block may have.
void emulation_capability(int capability);
// "kernels launches blocks threads" so far, then one line per kernel: its launches and name.
const char* emulation_report();
// 1: from now on launches are checked and noted, and no kernel runs; 0: they run again.
void emulation_dry(int dry);
// "blocks threads shared_bytes name" of each launch since emulation_dry(1), a line each.
const char* emulation_launches();
}
