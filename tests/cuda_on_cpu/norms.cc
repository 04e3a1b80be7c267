// custom_ops' norms for GPUs, run on a CPU: KERNELS is rms_norm_cuda.cu, which test_cuda_kernels.py rewrites with
// its headers.
//
// It stops with a message at accesses outside of the tensors, which end at pages that can't be read, and at results
// that depend on the order of the threads.
#include <signal.h>
#include <sys/mman.h>

#include <cstring>
#include <memory>
#include <vector>

#include "emulated.h"
#include "rms_norm/rms_norm_cuda.h"

#define norm_forward_cuda norm_forward_unguarded
#define norm_backward_cuda norm_backward_unguarded
#include KERNELS
#undef norm_forward_cuda
#undef norm_backward_cuda

namespace emulated {

// A tensor in pages of its own, up to the last one's end (or 15 bytes before it, for the same alignment as its own).
class Guarded {
 public:
  Guarded(void* given, int64_t bytes, bool is_output) : is_output(is_output), given_(given), bytes_(bytes) {
    const int64_t page = 4096, pages = (bytes + 16 + page - 1) / page * page;
    mapped_ = pages + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + page, pages, PROT_READ | PROT_WRITE);
    end_ = base_ + page + pages;
    slack_ = (uintptr_t(end_ - bytes) - uintptr_t(given)) & 15;
    memset(base_ + page, 0xff, pages);
    memcpy(data(), given, bytes);
  }
  ~Guarded() { munmap(base_, mapped_); }

  char* data() { return end_ - slack_ - bytes_; }
  std::vector<char> value() {
    for (int64_t i = 1; i <= slack_; ++i)
      if (end_[-i] != char(0xff)) stop("a write behind a tensor");
    return std::vector<char>(data(), data() + bytes_);
  }
  void forget() { memset(data(), 0xff, bytes_); }
  void give_back() { memcpy(given_, data(), bytes_); }

  const bool is_output;

 private:
  void* given_;
  int64_t bytes_, mapped_, slack_;
  char *base_, *end_;
};

void on_fault(int) { stop("an access outside of a tensor"); }

int64_t size_of(oarlock::DType type) { return type == oarlock::DType::kFloat32 ? 4 : 2; }

// The tensors of a call: pointers to them are put in the place of those that were given; null stays null.
class Guards {
 public:
  template <typename T>
  void input(const T*& pointer, int64_t bytes) {
    if (pointer) pointer = static_cast<const T*>(add(const_cast<T*>(pointer), bytes, false));
  }
  template <typename T>
  void output(T*& pointer, int64_t bytes) {
    if (pointer) pointer = static_cast<T*>(add(pointer, bytes, true));
  }

  // Twice, with the threads in another order.
  template <typename Run>
  void run(const Run& run) {
    signal(SIGSEGV, on_fault);
    std::vector<std::vector<char>> results[2];
    for (const bool backwards : {false, true}) {
      block.backwards = backwards;
      for (auto& tensor : tensors_)
        if (tensor->is_output) tensor->forget();
      run();
      for (auto& tensor : tensors_)
        if (tensor->is_output) results[backwards].push_back(tensor->value());
    }
    if (results[0] != results[1]) stop("results depend on the order of the threads");
    for (auto& tensor : tensors_)
      if (tensor->is_output) tensor->give_back();
  }

 private:
  void* add(void* given, int64_t bytes, bool is_output) {
    tensors_.push_back(std::make_unique<Guarded>(given, bytes, is_output));
    return tensors_.back()->data();
  }
  std::vector<std::unique_ptr<Guarded>> tensors_;
};

}  // namespace emulated

namespace oarlock {
extern "C" {

int norm_forward_cuda(const NormForward& given, void* stream) {
  NormForward args = given;
  const int64_t scale = args.cols * emulated::size_of(args.scale_type), y = args.rows * scale,
                x = args.rows * args.cols * emulated::size_of(args.x_type), per_row = args.rows * sizeof(float);
  emulated::Guards guards;
  guards.input(args.x, x);
  guards.input(args.residual, x);
  guards.input(args.scale, scale);
  guards.input(args.bias, scale);
  guards.output(args.y, y);
  guards.output(args.sum, x);
  guards.output(args.mean, per_row);
  guards.output(args.invvar, per_row);
  guards.run([&] { norm_forward_unguarded(args, stream); });
  return cudaSuccess;
}

int norm_backward_cuda(const NormBackward& given, void* stream) {
  NormBackward args = given;
  const int64_t scale = args.cols * emulated::size_of(args.scale_type), y = args.rows * scale,
                x = args.rows * args.cols * emulated::size_of(args.x_type), per_row = args.rows * sizeof(float);
  emulated::Guards guards;
  guards.input(args.h, x);
  guards.input(args.scale, scale);
  guards.input(args.grad_y, y);
  guards.input(args.grad_sum, x);
  guards.input(args.mean, per_row);
  guards.input(args.invvar, per_row);
  guards.output(args.grad_x, x);
  guards.output(args.grad_residual, x);
  guards.output(args.grad_scale, scale);
  guards.output(args.grad_bias, scale);
  guards.output(args.workspace, norm_cuda_workspace(args.rows, args.cols, args.grad_bias) * sizeof(float));
  guards.run([&] { norm_backward_unguarded(args, stream); });
  return cudaSuccess;
}

}  // extern "C"
}  // namespace oarlock
