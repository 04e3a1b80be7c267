// Runs CUDA kernels on a CPU, for tests: a block's threads are contexts that take turns and stop at barriers; blocks
// follow one another. Slow, and says nothing of a GPU's memory model, but what it runs is the kernels' own source, with
// its launches rewritten (tests/unit/ops/test_cuda_kernels.py).
//
// It stops with a message at barriers that not all threads reach. Shared memory begins as NaN in every block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static __attribute__((section("shared_memory")))
#define __launch_bounds__(threads)
extern char __start_shared_memory[], __stop_shared_memory[];

static dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulated {

[[noreturn]] void stop(const char* what) {
  fprintf(stderr, "CUDA on a CPU: %s\n", what);
  abort();
}

struct Barrier {
  int arrived = 0, passed = 0;
};

// A thread of the block. Made once, then used for one block after another.
struct Thread {
  jmp_buf place;
  ucontext_t start;
  std::vector<char> stack = std::vector<char>(1 << 16);
  dim3 index;
  bool is_started = false, is_done = true;
  const Barrier* waits_at = nullptr;
  int until = 0;
};

struct Block {
  std::vector<Thread*> threads;
  Barrier whole, warps[32];
  float lanes[32][2][32];      // of a warp's shuffles, which take turns with the two
  std::vector<float> dynamic;  // shared memory that the launch asks for
  const std::function<void()>* kernel;
  int running = 0, alive = 0;
  jmp_buf scheduler;
  bool backwards = false;
} block;

void run_kernels() {
  while (true) {
    (*block.kernel)();
    block.threads[block.running]->is_done = true;
    if (!_setjmp(block.threads[block.running]->place)) _longjmp(block.scheduler, 1);
  }
}

void run(int i) {
  Thread& thread = *block.threads[i];
  block.running = i;
  threadIdx = thread.index;
  if (_setjmp(block.scheduler)) return;
  if (thread.is_started) _longjmp(thread.place, 1);
  thread.is_started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.data();
  thread.start.uc_stack.ss_size = thread.stack.size();
  makecontext(&thread.start, run_kernels, 0);
  setcontext(&thread.start);
}

void wait(Barrier& barrier, int expected) {
  Thread& thread = *block.threads[block.running];
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  thread.waits_at = &barrier;
  thread.until = barrier.passed + 1;
  if (!_setjmp(thread.place)) _longjmp(block.scheduler, 1);
  thread.waits_at = nullptr;
}

// Its threads from barrier to barrier until none is ready; false when none was.
bool run_warp(int warp) {
  for (bool was_one_ready = false, is_one_ready = true;; was_one_ready |= is_one_ready) {
    is_one_ready = false;
    for (int k = 0; k < 32; ++k) {
      const int i = 32 * warp + (block.backwards ? 31 - k : k);
      const Thread& thread = *block.threads[i];
      if (thread.is_done || (thread.waits_at && thread.waits_at->passed < thread.until)) continue;
      is_one_ready = true;
      run(i);
      if (thread.is_done) --block.alive;
    }
    if (!is_one_ready) return was_one_ready;
  }
}

void run_block(size_t shared) {
  const int count = blockDim.x * blockDim.y * blockDim.z;
  if (count > 1024 || count % 32) stop("a block is not of up to 32 whole warps");
  while (int(block.threads.size()) < count) block.threads.push_back(new Thread);
  memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
  block.dynamic.assign(shared / sizeof(float), NAN);
  block.whole = Barrier();
  for (Barrier& barrier : block.warps) barrier = Barrier();
  block.alive = count;
  for (int i = 0; i < count; ++i) {
    block.threads[i]->index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    block.threads[i]->is_done = false;
  }
  while (block.alive) {  // each warp as far as it goes: a barrier too few is seen sooner
    bool was_one_ready = false;
    for (int k = 0; k < count / 32; ++k) was_one_ready |= run_warp(block.backwards ? count / 32 - 1 - k : k);
    if (!was_one_ready) stop("not all threads of a block reach a barrier");
  }
}

struct Launch {
  dim3 grid, threads;
  size_t shared;
  Launch(dim3 grid, dim3 threads, size_t shared, cudaStream_t) : grid(grid), threads(threads), shared(shared) {}

  void operator()(const std::function<void()>& kernel) const {
    block.kernel = &kernel;
    gridDim = grid;
    blockDim = threads;
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        run_block(shared);
      }
  }
};

float* dynamic_shared() { return block.dynamic.data(); }

}  // namespace emulated

static void __syncthreads() { emulated::wait(emulated::block.whole, emulated::block.alive); }

static float __shfl_xor_sync(unsigned mask, float value, int other) {
  const int warp = emulated::block.running / 32, lane = emulated::block.running % 32;
  if (mask != 0xffffffffu) emulated::stop("a shuffle of a part of a warp");
  auto& barrier = emulated::block.warps[warp];
  float* lanes = emulated::block.lanes[warp][barrier.passed % 2];
  lanes[lane] = value;
  emulated::wait(barrier, 32);
  return lanes[lane ^ other];
}

static float rsqrtf(float x) { return 1 / sqrtf(x); }

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
}
