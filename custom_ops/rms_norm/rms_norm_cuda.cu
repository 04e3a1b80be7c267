// Norms on a GPU: a row lives in the registers of a block (or of a warp, where it is short): it is read once and written
// once. What does not fit there, or is not aligned, goes through the general kernels at the end.
#include "common/cuda.cuh"
#include "rms_norm/rms_norm_cuda.h"

namespace oarlock {
namespace {

using namespace cuda;

constexpr int kMaxThreads = 32 * kMaxWarps;
constexpr int kWarpsPerBlock = 8;     // where a warp has a row
constexpr int kBlocksPerProcessor = 2;  // of the backward pass, whose blocks go through many rows

// ---- forward ----

template <typename X, typename W, int N, int V>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(const NormForward args) {
  __shared__ float shared[2][kMaxWarps];
  RowSums row_sum(shared);
  const int64_t cols = args.cols;
  const float inverse_cols = 1.0f / float(cols);
  const W *scale = static_cast<const W*>(args.scale), *bias = static_cast<const W*>(args.bias);

  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < args.rows;
       row += int64_t(gridDim.x) * blockDim.y) {
    float h[V][N];
    const X* x = static_cast<const X*>(args.x) + row * cols;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t col = (int64_t(v) * blockDim.x + threadIdx.x) * N;
      if (col < cols) {
        const Pack<X, N> given = load<X, N>(x + col);
#pragma unroll
        for (int i = 0; i < N; ++i) h[v][i] = to_float(given.values[i]);
      }
    }
    if (args.residual) {
      const X* residual = static_cast<const X*>(args.residual) + row * cols;
      X* sum = static_cast<X*>(args.sum) + row * cols;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int64_t col = (int64_t(v) * blockDim.x + threadIdx.x) * N;
        if (col < cols) {
          const Pack<X, N> more = load<X, N>(residual + col);
          Pack<X, N> rounded;
#pragma unroll
          for (int i = 0; i < N; ++i) {
            rounded.values[i] = from_float<X>(h[v][i] + to_float(more.values[i]));
            h[v][i] = to_float(rounded.values[i]);
          }
          store<X, N>(sum + col, rounded);
        }
      }
    }
    float mean = 0;
    if (bias) {
      float total = 0;
#pragma unroll
      for (int v = 0; v < V; ++v)
        if ((int64_t(v) * blockDim.x + threadIdx.x) * N < cols)
#pragma unroll
          for (int i = 0; i < N; ++i) total += h[v][i];
      mean = row_sum(total) * inverse_cols;
    }
    float squares = 0;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if ((int64_t(v) * blockDim.x + threadIdx.x) * N < cols)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float centred = h[v][i] - mean;
          squares += centred * centred;
        }
    const float invvar = rsqrtf(row_sum(squares) * inverse_cols + args.epsilon);
    if (threadIdx.x == 0) {
      args.invvar[row] = invvar;
      if (bias) args.mean[row] = mean;
    }
    W* y = static_cast<W*>(args.y) + row * cols;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t col = (int64_t(v) * blockDim.x + threadIdx.x) * N;
      if (col < cols) {
        const Pack<W, N> factor = load<W, N>(scale + col);
        Pack<W, N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float value = (h[v][i] - mean) * invvar * to_float(factor.values[i]);
          if (bias) value += to_float(bias[col + i]);
          out.values[i] = from_float<W>(value);
        }
        store<W, N>(y + col, out);
      }
    }
  }
}

// ---- backward ----

template <typename X, typename W, int N, int V>
struct RowInputs {
  Pack<X, N> h[V];
  Pack<W, N> grad_y[V];

  __device__ __forceinline__ void read(const NormBackward& args, int64_t row) {
    const X* from_h = static_cast<const X*>(args.h) + row * args.cols;
    const W* from_grad = static_cast<const W*>(args.grad_y) + row * args.cols;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t col = (int64_t(v) * blockDim.x + threadIdx.x) * N;
      if (col < args.cols) {
        h[v] = load<X, N>(from_h + col);
        grad_y[v] = load<W, N>(from_grad + col);
      }
    }
  }
};

// Each block goes through rows, a fixed share of them, and keeps the sums for scale and bias of its columns in registers;
// the next row is on its way while one is computed. The block's sums go to the workspace: [blocks, cols], and as many
// again for the bias.
template <typename X, typename W, int N, int V, int kCentred>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(const NormBackward args) {
  __shared__ float shared[2][kMaxWarps];
  extern __shared__ float of_warps[];  // [blockDim.y, cols], where warps have rows
  RowSums row_sum(shared);
  constexpr int kRegisters = V * ((sizeof(X) * N + 3) / 4 + (sizeof(W) * N + 3) / 4);  // that a row's inputs take
  constexpr bool kAhead = kRegisters <= 16;
  const int64_t cols = args.cols, stride = int64_t(gridDim.x) * blockDim.y;
  const float inverse_cols = 1.0f / float(cols);
  const W* scale = static_cast<const W*>(args.scale);
  float scale_sums[V][N] = {}, bias_sums[kCentred ? V : 1][kCentred ? N : 1] = {};

  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  RowInputs<X, W, N, V> inputs, next;
  if (kAhead && row < args.rows) next.read(args, row);
  for (; row < args.rows; row += stride) {
    if (kAhead) {
      inputs = next;
      if (row + stride < args.rows) next.read(args, row + stride);
    } else {
      inputs.read(args, row);
    }
    const float invvar = args.invvar[row], mean = kCentred ? args.mean[row] : 0.0f;
    float product = 0, gradient = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t col = (int64_t(v) * blockDim.x + threadIdx.x) * N;
      if (col < cols) {
        const Pack<W, N> factor = load<W, N>(scale + col);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float grad_y = to_float(inputs.grad_y[v].values[i]);
          const float normed = (to_float(inputs.h[v].values[i]) - mean) * invvar;
          const float scaled = grad_y * to_float(factor.values[i]);
          product += scaled * normed;
          scale_sums[v][i] += grad_y * normed;
          if constexpr (kCentred) {
            gradient += scaled;
            bias_sums[v][i] += grad_y;
          }
        }
      }
    }
    product = row_sum(product) * inverse_cols;
    if (kCentred) gradient = row_sum(gradient) * inverse_cols;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t col = (int64_t(v) * blockDim.x + threadIdx.x) * N;
      if (col < cols) {
        const Pack<W, N> factor = load<W, N>(scale + col);
        if (!kAhead) {  // what was converted above would take registers that there are not
          forget(inputs.h[v]);
          forget(inputs.grad_y[v]);
        }
        float values[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float normed = (to_float(inputs.h[v].values[i]) - mean) * invvar;
          const float scaled = to_float(inputs.grad_y[v].values[i]) * to_float(factor.values[i]);
          values[i] = (scaled - normed * product - gradient) * invvar;
        }
        if (args.grad_sum) {
          const Pack<X, N> more = load<X, N>(static_cast<const X*>(args.grad_sum) + row * cols + col);
#pragma unroll
          for (int i = 0; i < N; ++i) values[i] += to_float(more.values[i]);
        }
        Pack<X, N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) out.values[i] = from_float<X>(values[i]);
        store<X, N>(static_cast<X*>(args.grad_x) + row * cols + col, out);
        if (args.grad_residual) store<X, N>(static_cast<X*>(args.grad_residual) + row * cols + col, out);
      }
    }
  }

#pragma unroll
  for (int of_bias = 0; of_bias <= int(kCentred); ++of_bias) {
    float* sums = args.workspace + (int64_t(of_bias) * gridDim.x + blockIdx.x) * cols;
    float* mine = blockDim.y > 1 ? of_warps + threadIdx.y * cols : sums;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t col = (int64_t(v) * blockDim.x + threadIdx.x) * N;
      if (col < cols)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if constexpr (kCentred) {
            mine[col + i] = of_bias ? bias_sums[v][i] : scale_sums[v][i];
          } else {
            mine[col + i] = scale_sums[v][i];
          }
        }
    }
    if (blockDim.y > 1) {
      __syncthreads();
      for (int64_t col = threadIdx.y * 32 + threadIdx.x; col < cols; col += 32 * blockDim.y) {
        float total = 0;
        for (int warp = 0; warp < blockDim.y; ++warp) total += of_warps[warp * cols + col];
        sums[col] = total;
      }
      __syncthreads();
    }
  }
}

// sums [parts, cols] -> out [cols]; a block of 32 x 32 threads has 32 columns. blockIdx.y: scale, bias.
template <typename W>
__global__ void __launch_bounds__(1024) add_parts_kernel(const float* sums, int64_t parts, int64_t cols, void* scale,
                                                         void* bias) {
  __shared__ float shared[32][33];
  const int64_t col = int64_t(blockIdx.x) * 32 + threadIdx.x;
  sums += blockIdx.y * parts * cols;
  float total = 0;
  if (col < cols)
    for (int64_t part = threadIdx.y; part < parts; part += 32) total += sums[part * cols + col];
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  total = shared[threadIdx.x][threadIdx.y];  // now a warp has a column
#pragma unroll
  for (int lane = 16; lane; lane /= 2) total += __shfl_xor_sync(0xffffffffu, total, lane);
  const int64_t out = int64_t(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x == 0 && out < cols) static_cast<W*>(blockIdx.y ? bias : scale)[out] = from_float<W>(total);
}

// ---- any width, type and alignment: element by element, the row is read again from the cache ----

__device__ __forceinline__ float load_any(const void* p, int64_t i, DType type) {
  switch (type) {
    case DType::kFloat16: return to_float(static_cast<const __half*>(p)[i]);
    case DType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}
__device__ __forceinline__ void store_any(void* p, int64_t i, DType type, float value) {
  switch (type) {
    case DType::kFloat16: static_cast<__half*>(p)[i] = from_float<__half>(value); break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(value); break;
    default: static_cast<float*>(p)[i] = value;
  }
}

__global__ void __launch_bounds__(kMaxThreads) forward_any_kernel(const NormForward args) {
  __shared__ float shared[2][kMaxWarps];
  RowSums row_sum(shared);
  const float inverse_cols = 1.0f / float(args.cols);
  const void* h = args.residual ? args.sum : args.x;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t base = row * args.cols;
    float total = 0, squares = 0;
    for (int64_t col = threadIdx.x; col < args.cols; col += blockDim.x) {
      float value = load_any(args.x, base + col, args.x_type);
      if (args.residual) {  // each thread reads back what it wrote itself
        value += load_any(args.residual, base + col, args.x_type);
        store_any(args.sum, base + col, args.x_type, value);
      }
      total += load_any(h, base + col, args.x_type);
    }
    const float mean = args.bias ? row_sum(total) * inverse_cols : 0.0f;
    for (int64_t col = threadIdx.x; col < args.cols; col += blockDim.x) {
      const float centred = load_any(h, base + col, args.x_type) - mean;
      squares += centred * centred;
    }
    const float invvar = rsqrtf(row_sum(squares) * inverse_cols + args.epsilon);
    if (threadIdx.x == 0) {
      args.invvar[row] = invvar;
      if (args.bias) args.mean[row] = mean;
    }
    for (int64_t col = threadIdx.x; col < args.cols; col += blockDim.x) {
      float value = (load_any(h, base + col, args.x_type) - mean) * invvar * load_any(args.scale, col, args.scale_type);
      if (args.bias) value += load_any(args.bias, col, args.scale_type);
      store_any(args.y, base + col, args.scale_type, value);
    }
  }
}

// The gradient of x; a block has a row.
__global__ void __launch_bounds__(kMaxThreads) backward_any_kernel(const NormBackward args) {
  __shared__ float shared[2][kMaxWarps];
  RowSums row_sum(shared);
  const float inverse_cols = 1.0f / float(args.cols);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const int64_t base = row * args.cols;
    const float invvar = args.invvar[row], mean = args.grad_bias ? args.mean[row] : 0.0f;
    float product = 0, gradient = 0;
    for (int64_t col = threadIdx.x; col < args.cols; col += blockDim.x) {
      const float normed = (load_any(args.h, base + col, args.x_type) - mean) * invvar;
      const float scaled = load_any(args.grad_y, base + col, args.scale_type) * load_any(args.scale, col, args.scale_type);
      product += scaled * normed;
      gradient += scaled;
    }
    product = row_sum(product) * inverse_cols;
    gradient = args.grad_bias ? row_sum(gradient) * inverse_cols : 0.0f;
    for (int64_t col = threadIdx.x; col < args.cols; col += blockDim.x) {
      const float normed = (load_any(args.h, base + col, args.x_type) - mean) * invvar;
      const float scaled = load_any(args.grad_y, base + col, args.scale_type) * load_any(args.scale, col, args.scale_type);
      float value = (scaled - normed * product - gradient) * invvar;
      if (args.grad_sum) value += load_any(args.grad_sum, base + col, args.x_type);
      store_any(args.grad_x, base + col, args.x_type, value);
      if (args.grad_residual) store_any(args.grad_residual, base + col, args.x_type, value);
    }
  }
}

// The sums for scale and bias over this block's share of the rows; a thread has a column.
__global__ void __launch_bounds__(128) column_sums_kernel(const NormBackward args) {
  const int64_t col = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, parts = gridDim.y;
  if (col >= args.cols) return;
  float of_scale = 0, of_bias = 0;
  for (int64_t row = args.rows * blockIdx.y / parts; row < args.rows * (blockIdx.y + 1) / parts; ++row) {
    const float grad_y = load_any(args.grad_y, row * args.cols + col, args.scale_type);
    const float mean = args.grad_bias ? args.mean[row] : 0.0f;
    of_scale += grad_y * (load_any(args.h, row * args.cols + col, args.x_type) - mean) * args.invvar[row];
    of_bias += grad_y;
  }
  args.workspace[blockIdx.y * args.cols + col] = of_scale;
  if (args.grad_bias) args.workspace[(parts + blockIdx.y) * args.cols + col] = of_bias;
}

// ---- the choice of a kernel ----

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
