// The forward pass of norms for rows that fit into the registers of a block, or of a warp.
#pragma once

#include "common/cuda.cuh"
#include "rms_norm/rms_norm.h"

namespace oarlock {
namespace {  // included by rms_norm_cuda.cu alone

using namespace cuda;

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

}  // namespace
}  // namespace oarlock
