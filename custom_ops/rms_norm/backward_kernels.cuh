// The backward pass of norms for rows that fit into the registers of a block, or of a warp, and the sums over blocks.
#pragma once

#include "common/cuda.cuh"
#include "rms_norm/rms_norm.h"

namespace oarlock {
namespace {  // included by rms_norm_cuda.cu alone

using namespace cuda;

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

}  // namespace
}  // namespace oarlock
