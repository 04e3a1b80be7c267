// fused_swiglu and fused_swiglu_halves as Paddle operators with their gradients, float32 on the CPU. Called by
// oarlock/ops/swiglu.py.
#include "common/tensors.h"
#include "swiglu/swiglu.h"

using paddle::Tensor;

namespace oarlock {
namespace {

std::vector<Tensor> swiglu(const Tensor& given_gate, const Tensor& given_up) {
  const Tensor gate = floats(given_gate, "gate"), up = floats(given_up, "up");
  PD_CHECK(gate.shape() == up.shape(), "gate and up have to be of one shape; got ", shape_text(gate.shape()), " and ",
           shape_text(up.shape()));
  Tensor y = empty_floats(gate.shape(), gate);
  const int64_t cols = gate.shape().back();
  swiglu_cpu({gate.numel() / cols, cols, cols, gate.data<float>(), up.data<float>(), y.data<float>()});
  return {y};
}

std::vector<Tensor> swiglu_grad(const Tensor& given_gate, const Tensor& given_up, const Tensor& given_grad) {
  const Tensor gate = dense(given_gate), up = dense(given_up), grad = floats(given_grad, "the gradient");
  Tensor grad_gate = empty_floats(gate.shape(), gate), grad_up = empty_floats(gate.shape(), gate);
  const int64_t cols = gate.shape().back();
  swiglu_backward_cpu({gate.numel() / cols, cols, cols, gate.data<float>(), up.data<float>(), grad.data<float>(),
                       grad_gate.data<float>(), grad_up.data<float>()});
  return {grad_gate, grad_up};
}

std::vector<Tensor> swiglu_halves(const Tensor& given) {
  const Tensor x = floats(given, "x");
  Shape shape = x.shape();
  PD_CHECK(shape.back() % 2 == 0, "x has to hold gate and up beside each other; got ", shape_text(shape));
  const int64_t cols = shape.back() /= 2;
  Tensor y = empty_floats(shape, x);
  const float* gate = x.data<float>();
  swiglu_cpu({x.numel() / (2 * cols), cols, 2 * cols, gate, gate + cols, y.data<float>()});
  return {y};
}

std::vector<Tensor> swiglu_halves_grad(const Tensor& given, const Tensor& given_grad) {
  const Tensor x = dense(given), grad = floats(given_grad, "the gradient");
  Tensor grad_x = empty_floats(x.shape(), x);
  const int64_t cols = x.shape().back() / 2;
  const float* gate = x.data<float>();
  float* grad_gate = grad_x.data<float>();
  swiglu_backward_cpu(
      {x.numel() / (2 * cols), cols, 2 * cols, gate, gate + cols, grad.data<float>(), grad_gate, grad_gate + cols});
  return {grad_x};
}

}  // namespace
}  // namespace oarlock

PD_BUILD_OP(fused_swiglu).Inputs({"gate", "up"}).Outputs({"y"}).SetKernelFn(PD_KERNEL(oarlock::swiglu));
PD_BUILD_GRAD_OP(fused_swiglu)
    .Inputs({"gate", "up", paddle::Grad("y")})
    .Outputs({paddle::Grad("gate"), paddle::Grad("up")})
    .SetKernelFn(PD_KERNEL(oarlock::swiglu_grad));

PD_BUILD_OP(fused_swiglu_halves).Inputs({"x"}).Outputs({"y"}).SetKernelFn(PD_KERNEL(oarlock::swiglu_halves));
PD_BUILD_GRAD_OP(fused_swiglu_halves)
    .Inputs({"x", paddle::Grad("y")})
    .Outputs({paddle::Grad("x")})
    .SetKernelFn(PD_KERNEL(oarlock::swiglu_halves_grad));
