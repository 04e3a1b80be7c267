// The norms on Paddle's tensors, for operators that are made of more than a norm.
#pragma once

#include "common/tensors.h"

namespace oarlock {

// Undefined where the norm has none: sum without a residual, mean without a bias.
struct NormOutputs {
  paddle::Tensor y, sum, mean, invvar;
};
struct NormGradients {
  paddle::Tensor x, residual, scale, bias;
};

// RMSNorm of x, or of its sum with the residual where there is one; with a bias, layer norm. Statistics are made in
// float32, [rows].
NormOutputs norm_forward(const paddle::Tensor& x, const paddle::Tensor* residual, const paddle::Tensor& scale,
                         const paddle::Tensor* bias, float epsilon);

// x is what was normed, the sum where there was one; grad_sum, where it is there and defined, is the gradient of what
// else was made of it. grad_y may be undefined.
NormGradients norm_backward(const paddle::Tensor& x, const paddle::Tensor& scale, const paddle::Tensor* mean,
                            const paddle::Tensor& invvar, const paddle::Tensor& grad_y, const paddle::Tensor* grad_sum,
                            bool with_residual);

}  // namespace oarlock
