// Linear layers of a training step as Paddle operators, float32 on the CPU; lora_paddle.cc has those with LoRA.
// Python's oarlock/ops is how they are meant to be called.
#include "training_step/linear.h"

using paddle::Tensor;

namespace oarlock {

std::vector<Tensor> projections(const Tensor& given, const Tensor& q, const Tensor& k, const Tensor& v) {
  const Tensor x = floats(given, "x");
  std::vector<Tensor> results;
  for (const Tensor* weight : {&q, &k, &v})
    results.push_back(product(linear_of(x, *weight, "a weight"), x, floats(*weight, "a weight")));
  return results;
}

// The input's gradients of the three are summed by the products, not after them.
std::vector<Tensor> projections_grad(const Tensor& given, const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  const Tensor x = dense(given);
  Tensor grad_x = empty_floats(x.shape(), x);
  std::vector<Tensor> results = {grad_x};
  bool is_first = true;
  for (const auto& [weight, given_grad] : {std::pair(&q, &grad_q), std::pair(&k, &grad_k), std::pair(&v, &grad_v)}) {
    if (!given_grad->defined()) {  // that output went into nothing
      results.push_back(zeros(*weight));
      continue;
    }
    const Tensor grad = floats(*given_grad, "the gradient"), w = dense(*weight);
    const Linear size = linear_of(x, w, "a weight");
    grad_of_input(size, grad.data<float>(), w, is_first, grad_x.data<float>());
    is_first = false;
    results.push_back(grad_of_weight(size, x.data<float>(), grad.data<float>(), w));
  }
  if (is_first) results[0] = zeros(x);
  return results;
}

// y = (silu(x gate) * (x up)) down, added to `base` where there is one; and what the backward needs.
std::vector<Tensor> mlp_onto(const Tensor* base, const Tensor& x, const Tensor& given_gate, const Tensor& given_up,
                             const Tensor& given_down) {
  const Tensor gate = floats(given_gate, "gate"), up = floats(given_up, "up"), down = floats(given_down, "down");
  const Linear wide = linear_of(x, gate, "gate");
  check_mlp(gate, up);
  const Tensor gates = product(wide, x, gate), ups = product(wide, x, up), inner = inner_of(wide, gates, ups);
  return {product(linear_of(inner, down, "down"), inner, down, base), gates, ups};
}

std::vector<Tensor> mlp(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  return mlp_onto(nullptr, floats(x, "x"), gate, up, down);
}

// SwiGLU's output is made a second time, in the memory of its gradient, which its backward has read: no layer keeps it.
std::vector<Tensor> mlp_grad(const Tensor& given, const Tensor& given_gate, const Tensor& given_up,
                             const Tensor& given_down, const Tensor& gates, const Tensor& ups,
                             const Tensor& given_grad) {
  const Tensor x = dense(given), gate = dense(given_gate), up = dense(given_up), down = dense(given_down),
               grad = floats(given_grad, "the gradient");
  const Linear wide = linear_of(x, gate, "gate"), narrow = linear_of(gates, down, "down");
  Tensor inner = empty_floats(gates.shape(), x), grad_gates = empty_floats(gates.shape(), x),
         grad_ups = empty_floats(gates.shape(), x), grad_x = empty_floats(x.shape(), x);
  const float *in = x.data<float>(), *dy = grad.data<float>();
  float *middle = inner.data<float>(), *dg = grad_gates.data<float>(), *du = grad_ups.data<float>();
  grad_of_input(narrow, dy, down, true, middle);
  swiglu_backward_cpu(
      {wide.rows, wide.out, wide.out, gates.data<float>(), ups.data<float>(), middle, dg, du, middle});
  const Tensor grad_down = grad_of_weight(narrow, middle, dy, down),
               grad_gate = grad_of_weight(wide, in, dg, gate),
               grad_up = grad_of_weight(wide, in, du, up);
  grad_of_input(wide, dg, gate, true, grad_x.data<float>());
  grad_of_input(wide, du, up, false, grad_x.data<float>());
  return {grad_x, grad_gate, grad_up, grad_down};
}

}  // namespace oarlock

PD_BUILD_OP(fused_projections)
    .Inputs({"x", "query", "key", "value"})
    .Outputs({"queries", "keys", "values"})
    .SetKernelFn(PD_KERNEL(oarlock::projections));
PD_BUILD_GRAD_OP(fused_projections)
    .Inputs({"x", "query", "key", "value", paddle::Grad("queries"), paddle::Grad("keys"), paddle::Grad("values")})
    .Outputs({paddle::Grad("x"), paddle::Grad("query"), paddle::Grad("key"), paddle::Grad("value")})
    .SetKernelFn(PD_KERNEL(oarlock::projections_grad));

PD_BUILD_OP(fused_mlp)
    .Inputs({"x", "gate", "up", "down"})
    .Outputs({"y", "gates", "ups"})
    .SetKernelFn(PD_KERNEL(oarlock::mlp));
PD_BUILD_GRAD_OP(fused_mlp)
    .Inputs({"x", "gate", "up", "down", "gates", "ups", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("gate"), paddle::Grad("up"), paddle::Grad("down")})
    .SetKernelFn(PD_KERNEL(oarlock::mlp_grad));
