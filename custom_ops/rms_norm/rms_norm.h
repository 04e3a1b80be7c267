// RMSNorm and LayerNorm over the last axis, with an optional residual: what the CPU and the CUDA kernels take.
//
//   h = x + residual                          (rounded to x's type)
//   y = (h - mean) * invvar * scale + bias    (mean and bias: LayerNorm only)
//   invvar = 1 / sqrt(mean((h - mean)^2) + epsilon)
//
// All tensors are dense and row-major: x, residual, sum, y [rows, cols], scale, bias [cols], mean, invvar [rows].
// x, residual, sum are of x_type; scale, bias, y of scale_type; mean and invvar are float. Arithmetic is in float.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace oarlock {

struct NormForward {
  int64_t rows, cols;
  float epsilon;
  DType x_type, scale_type;
  const void* x;
  const void* residual;  // null: none
  const void* scale;
  const void* bias;  // null: RMSNorm
  void* y;
  void* sum;    // h; with a residual only
  float* mean;  // LayerNorm only
  float* invvar;
};

struct NormBackward {
  int64_t rows, cols;
  DType x_type, scale_type;
  const void* h;  // x, or x + residual
  const void* scale;
  const void* grad_y;    // of scale_type
  const void* grad_sum;  // of what h went into beside the norm, of x_type; null: nothing
  const float* mean;     // LayerNorm only
  const float* invvar;
  void* grad_x;
  void* grad_residual;  // equal to grad_x; null: no residual
  void* grad_scale;
  void* grad_bias;   // null: RMSNorm
  float* workspace;  // norm_*_workspace(rows, cols, with bias) floats
};

}  // namespace oarlock
