// Norms of any width, type and alignment: element by element, the row is read again from the cache.
#pragma once

#include "common/cuda.cuh"
#include "rms_norm/rms_norm.h"

namespace oarlock {
namespace {  // included by rms_norm_cuda.cu alone

using namespace cuda;

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

}  // namespace
}  // namespace oarlock
