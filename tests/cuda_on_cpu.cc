// Runs custom_ops' CUDA kernels on a CPU, for tests: KERNELS is rms_norm_cuda.cu with its launches rewritten (see
// tests/unit/test_cuda_on_cpu.py). A block's threads are contexts that take turns and stop at barriers; blocks follow
// one another. Slow, and says nothing of a GPU's memory model, but what it runs is the kernels' own source.
//
// It stops with a message at: accesses outside of the tensors (they end at pages that can't be read), barriers that not
// all threads reach, and results that depend on the order of the threads. Shared memory begins as NaN in every block.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "rms_norm/rms_norm_cuda.h"

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

#define norm_forward_cuda norm_forward_unguarded
#define norm_backward_cuda norm_backward_unguarded
#include KERNELS
#undef norm_forward_cuda
#undef norm_backward_cuda

namespace emulated {

// A tensor in pages of its own, up to the last one's end (or 15 bytes before it, for the same alignment as its own).
class Guarded {
 public:
  Guarded(const void* given, int64_t bytes, bool is_output) : given_(given), bytes_(bytes), is_output_(is_output) {
    const int64_t page = 4096, pages = (bytes + 16 + page - 1) / page * page;
    mapped_ = pages + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + page, pages, PROT_READ | PROT_WRITE);
    end_ = base_ + page + pages;
    slack_ = (uintptr_t(end_ - bytes) - uintptr_t(given)) & 15;
    memset(base_ + page, 0xff, pages);
    if (given) memcpy(data(), given, bytes);
  }
  ~Guarded() { munmap(base_, mapped_); }

  void* pointer() { return given_ ? data() : nullptr; }
  bool is_output() const { return given_ && is_output_; }
  std::vector<char> value() {
    for (int64_t i = 1; i <= slack_; ++i)
      if (end_[-i] != char(0xff)) stop("a write behind a tensor");
    return std::vector<char>(data(), data() + bytes_);
  }
  void give_back() { memcpy(const_cast<void*>(given_), data(), bytes_); }
  void forget() { memset(data(), 0xff, bytes_); }

 private:
  char* data() { return end_ - slack_ - bytes_; }
  const void* given_;
  int64_t bytes_, mapped_, slack_;
  bool is_output_;
  char *base_, *end_;
};

void on_fault(int) { stop("an access outside of a tensor"); }

int64_t size_of(oarlock::DType type) { return type == oarlock::DType::kFloat32 ? 4 : 2; }

// Twice, with the threads in another order.
template <typename Run>
void run_guarded(std::vector<Guarded*> tensors, const Run& run) {
  signal(SIGSEGV, on_fault);
  std::vector<std::vector<char>> results[2];
  for (const bool backwards : {false, true}) {
    block.backwards = backwards;
    for (Guarded* tensor : tensors)
      if (tensor->is_output()) tensor->forget();
    run();
    for (Guarded* tensor : tensors)
      if (tensor->is_output()) results[backwards].push_back(tensor->value());
  }
  if (results[0] != results[1]) stop("results depend on the order of the threads");
  for (Guarded* tensor : tensors)
    if (tensor->is_output()) tensor->give_back();
}

}  // namespace emulated

namespace oarlock {
extern "C" {

int norm_forward_cuda(const NormForward& given, void* stream) {
  const int64_t of_x = given.cols * emulated::size_of(given.x_type),
                wide = given.cols * emulated::size_of(given.scale_type);
  using emulated::Guarded;
  Guarded x(given.x, given.rows * of_x, false), residual(given.residual, given.rows * of_x, false),
      scale(given.scale, wide, false), bias(given.bias, wide, false), y(given.y, given.rows * wide, true),
      sum(given.sum, given.rows * of_x, true), mean(given.mean, given.rows * 4, true),
      invvar(given.invvar, given.rows * 4, true);
  NormForward args = given;
  args.x = x.pointer();
  args.residual = residual.pointer();
  args.scale = scale.pointer();
  args.bias = bias.pointer();
  args.y = y.pointer();
  args.sum = sum.pointer();
  args.mean = static_cast<float*>(mean.pointer());
  args.invvar = static_cast<float*>(invvar.pointer());
  emulated::run_guarded({&y, &sum, &mean, &invvar}, [&] { norm_forward_unguarded(args, stream); });
  return cudaSuccess;
}

int norm_backward_cuda(const NormBackward& given, void* stream) {
  const int64_t of_x = given.cols * emulated::size_of(given.x_type),
                wide = given.cols * emulated::size_of(given.scale_type);
  using emulated::Guarded;
  Guarded h(given.h, given.rows * of_x, false), scale(given.scale, wide, false),
      grad_y(given.grad_y, given.rows * wide, false), grad_sum(given.grad_sum, given.rows * of_x, false),
      mean(given.mean, given.rows * 4, false), invvar(given.invvar, given.rows * 4, false),
      grad_x(given.grad_x, given.rows * of_x, true), grad_residual(given.grad_residual, given.rows * of_x, true),
      grad_scale(given.grad_scale, wide, true), grad_bias(given.grad_bias, wide, true),
      workspace(given.workspace, norm_cuda_workspace(given.rows, given.cols, given.grad_bias) * 4, true);
  NormBackward args = given;
  args.h = h.pointer();
  args.scale = scale.pointer();
  args.grad_y = grad_y.pointer();
  args.grad_sum = grad_sum.pointer();
  args.mean = static_cast<float*>(mean.pointer());
  args.invvar = static_cast<float*>(invvar.pointer());
  args.grad_x = grad_x.pointer();
  args.grad_residual = grad_residual.pointer();
  args.grad_scale = grad_scale.pointer();
  args.grad_bias = grad_bias.pointer();
  args.workspace = static_cast<float*>(workspace.pointer());
  emulated::run_guarded({&grad_x, &grad_residual, &grad_scale, &grad_bias, &workspace},
                        [&] { norm_backward_unguarded(args, stream); });
  return cudaSuccess;
}

}  // extern "C"
}  // namespace oarlock
