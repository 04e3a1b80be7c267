// Norms on a GPU: a row lives in the registers of a block (or of a warp, where it is short): it is read once and written
// once. What does not fit there, or is not aligned, goes through general_kernels.cuh. Here a kernel is chosen.
#include "rms_norm/rms_norm_cuda.h"

#include "rms_norm/backward_kernels.cuh"
#include "rms_norm/forward_kernels.cuh"
#include "rms_norm/general_kernels.cuh"

namespace oarlock {
namespace {

constexpr int kWarpsPerBlock = 8;       // where a warp has a row
constexpr int kBlocksPerProcessor = 2;  // of the backward pass, whose blocks go through many rows

int num_parts() {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return processors * kBlocksPerProcessor;
}

// Threads for a row of `packs` packs when each holds `held` of them; a multiple of 32.
int64_t threads_for(int64_t packs, int held) { return (packs + 32 * held - 1) / (32 * held) * 32; }

template <int... kHeld>
struct Held {};

// run(integral constant V, threads) with the first V whose threads are at most `most`; false when none is.
template <typename Run>
bool choose(Held<>, int64_t, int64_t, const Run&) {
  return false;
}
template <int V>
struct Constant {
  static constexpr int value = V;
};
template <int V, int... kMore, typename Run>
bool choose(Held<V, kMore...>, int64_t packs, int64_t most, const Run& run) {
  const int64_t threads = threads_for(packs, V);
  if (threads > most) return choose(Held<kMore...>{}, packs, most, run);
  run(Constant<V>{}, int(threads));
  return true;
}

// Elements of a pack: 16 bytes of the larger type.
template <typename X, typename W>
constexpr int full_pack() {
  return 16 / int(sizeof(X) > sizeof(W) ? sizeof(X) : sizeof(W));
}

dim3 block_of(int threads) { return threads == 32 ? dim3(32, kWarpsPerBlock) : dim3(threads); }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename X, typename W>
bool forward_in_registers(const NormForward& args, cudaStream_t stream) {
  constexpr int kFull = full_pack<X, W>();
  const auto launch = [&](auto n, auto v, int threads) {
    const dim3 block = block_of(threads);
    const int64_t blocks = (args.rows + block.y - 1) / block.y, most = (int64_t{1} << 31) - 1;
    forward_kernel<X, W, n.value, v.value><<<unsigned(blocks < most ? blocks : most), block, 0, stream>>>(args);
  };
  const auto full = [&](auto v, int threads) { launch(Constant<kFull>{}, v, threads); };
  const auto single = [&](auto v, int threads) { launch(Constant<1>{}, v, threads); };
  const bool whole = args.cols % kFull == 0 && aligned(args.x) && aligned(args.residual) && aligned(args.scale) &&
                     aligned(args.y) && aligned(args.sum);
  if (whole && choose(Held<2>{}, args.cols / kFull, 256, full)) return true;
  if (whole && choose(Held<4>{}, args.cols / kFull, kMaxThreads, full)) return true;
  return choose(Held<8>{}, args.cols, kMaxThreads, single);
}

template <typename X, typename W>
bool backward_in_registers(const NormBackward& args, int parts, cudaStream_t stream) {
  constexpr int kFull = full_pack<X, W>();
  const auto launch = [&](auto n, auto centred, auto v, int threads) {
    const dim3 block = block_of(threads);
    const size_t shared = block.y > 1 ? block.y * args.cols * sizeof(float) : 0;
    backward_kernel<X, W, n.value, v.value, centred.value><<<parts, block, shared, stream>>>(args);
  };
  const auto run = [&](auto n, auto centred) {
    return [=](auto v, int threads) { launch(n, centred, v, threads); };
  };
  const Constant<kFull> full;
  const Constant<1> single, yes;
  const Constant<0> no;
  const bool whole = args.cols % kFull == 0 && aligned(args.h) && aligned(args.scale) && aligned(args.grad_y) &&
                     aligned(args.grad_sum) && aligned(args.grad_x) && aligned(args.grad_residual);
  // What is held here goes into registers without spilling; two sums a column take more of them than one.
  if (args.grad_bias)
    return (whole && choose(Held<2>{}, args.cols / kFull, kMaxThreads, run(full, yes))) ||
           choose(Held<8>{}, args.cols, kMaxThreads, run(single, yes));
  return (whole && choose(Held<2, 4>{}, args.cols / kFull, kMaxThreads, run(full, no))) ||
         choose(Held<8>{}, args.cols, kMaxThreads, run(single, no));
}

// run(X{}, W{}) for the pairs of types that have kernels of their own; false for the others.
template <typename Run>
bool with_types(DType x, DType scale, const Run& run) {
  if (x == DType::kFloat32) return scale == DType::kFloat32 && run(float{}, float{});
  if (x == DType::kFloat16) {
    if (scale == DType::kFloat16) return run(__half{}, __half{});
    return scale == DType::kFloat32 && run(__half{}, float{});
  }
  if (scale == DType::kBFloat16) return run(__nv_bfloat16{}, __nv_bfloat16{});
  return scale == DType::kFloat32 && run(__nv_bfloat16{}, float{});
}

void add_parts(const NormBackward& args, int parts, cudaStream_t stream) {
  const dim3 blocks(unsigned((args.cols + 31) / 32), args.grad_bias ? 2 : 1), threads(32, 32);
  const auto launch = [&](auto w) {
    add_parts_kernel<decltype(w)>
        <<<blocks, threads, 0, stream>>>(args.workspace, parts, args.cols, args.grad_scale, args.grad_bias);
  };
  switch (args.scale_type) {
    case DType::kFloat32: return launch(float{});
    case DType::kFloat16: return launch(__half{});
    case DType::kBFloat16: return launch(__nv_bfloat16{});
  }
}

unsigned some_blocks(int64_t rows) { return unsigned(rows < (1 << 20) ? rows : 1 << 20); }

}  // namespace

int norm_forward_cuda(const NormForward& args, void* stream_of) {
  const auto stream = static_cast<cudaStream_t>(stream_of);
  if (args.rows == 0) return cudaSuccess;
  const bool done = with_types(args.x_type, args.scale_type, [&](auto x, auto w) {
    return forward_in_registers<decltype(x), decltype(w)>(args, stream);
  });
  if (!done) forward_any_kernel<<<some_blocks(args.rows), kMaxThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

int norm_backward_cuda(const NormBackward& args, void* stream_of) {
  const auto stream = static_cast<cudaStream_t>(stream_of);
  const int parts = num_parts();
  const bool done = with_types(args.x_type, args.scale_type, [&](auto x, auto w) {
    return backward_in_registers<decltype(x), decltype(w)>(args, parts, stream);
  });
  if (!done) {
    if (args.rows) backward_any_kernel<<<some_blocks(args.rows), kMaxThreads, 0, stream>>>(args);
    column_sums_kernel<<<dim3(unsigned((args.cols + 127) / 128), parts), 128, 0, stream>>>(args);
  }
  add_parts(args, parts, stream);
  return cudaGetLastError();
}

int64_t norm_cuda_workspace(int64_t, int64_t cols, bool with_bias) { return num_parts() * cols * (with_bias ? 2 : 1); }

const char* norm_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace oarlock
