// SPDX-License-Identifier: Apache-2.0
// How a planted bug is run: the kernel with it has to be caught, the one without it has to pass.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

// A failed launch abandons its fibers with what their frames own.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

namespace {

using sidechain::cuda::launch;

int failures = 0;
int planted = 0;

void expect(bool condition, const char* what, const std::string& got = "") {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s; got: %s\n", what, got.c_str());
}

constexpr int kThreads = 64;

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

int conclude(const char* what) {
  std::printf("%d %s, %d failed expectations\n", planted, what, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
