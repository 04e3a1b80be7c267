// Linear layers of a training step as Paddle operators, float32 on the CPU; lora_paddle.cc has those with LoRA.
// Python's oarlock/ops is how they are meant to be called.
#include "training_step/linear.h"

using oarlock::dense;
using oarlock::empty_floats;
using oarlock::floats;
using oarlock::Linear;
using paddle::Tensor;

namespace {

std::vector<Tensor> projections(const Tensor& given, const Tensor& q, const Tensor& k, const Tensor& v) {
  const Tensor x = floats(given, "x");
  std::vector<Tensor> results;
  for (const Tensor* weight : {&q, &k, &v})
    results.push_back(oarlock::product(oarlock::linear_of(x, *weight, "a weight"), x, floats(*weight, "a weight")));
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
      results.push_back(oarlock::zeros(*weight));
      continue;
    }
    const Tensor grad = floats(*given_grad, "the gradient"), w = dense(*weight);
    const Linear size = oarlock::linear_of(x, w, "a weight");
    oarlock::grad_of_input(size, grad.data<float>(), w, is_first, grad_x.data<float>());
    is_first = false;
    results.push_back(oarlock::grad_of_weight(size, x.data<float>(), grad.data<float>(), w));
  }
  return results;
}

// y = (silu(x gate) * (x up)) down; and what the backward needs.
std::vector<Tensor> mlp(const Tensor& given, const Tensor& given_gate, const Tensor& given_up,
                        const Tensor& given_down) {
  const Tensor x = floats(given, "x"), gate = floats(given_gate, "gate"), up = floats(given_up, "up"),
               down = floats(given_down, "down");
  const Linear wide = oarlock::linear_of(x, gate, "gate");
  oarlock::check_mlp(gate, up);
  const Tensor gates = oarlock::product(wide, x, gate), ups = oarlock::product(wide, x, up),
               inner = oarlock::inner_of(wide, gates, ups);
  return {oarlock::product(oarlock::linear_of(inner, down, "down"), inner, down), gates, ups};
}

// SwiGLU's output is made a second time, in the memory of its gradient, which its backward has read: no layer keeps it.
std::vector<Tensor> mlp_grad(const Tensor& given, const Tensor& given_gate, const Tensor& given_up,
                             const Tensor& given_down, const Tensor& gates, const Tensor& ups,
                             const Tensor& given_grad) {
  const Tensor x = dense(given), gate = dense(given_gate), up = dense(given_up), down = dense(given_down),
               grad = floats(given_grad, "the gradient");
  const Linear wide = oarlock::linear_of(x, gate, "gate"), narrow = oarlock::linear_of(gates, down, "down");
  Tensor inner = empty_floats(gates.shape(), x), grad_gates = empty_floats(gates.shape(), x),
         grad_ups = empty_floats(gates.shape(), x), grad_x = empty_floats(x.shape(), x);
  const float *in = x.data<float>(), *dy = grad.data<float>();
  float *middle = inner.data<float>(), *dg = grad_gates.data<float>(), *du = grad_ups.data<float>();
  oarlock::grad_of_input(narrow, dy, down, true, middle);
  oarlock::swiglu_backward_cpu(
      {wide.rows, wide.out, wide.out, gates.data<float>(), ups.data<float>(), middle, dg, du, middle});
  const Tensor grad_down = oarlock::grad_of_weight(narrow, middle, dy, down),
               grad_gate = oarlock::grad_of_weight(wide, in, dg, gate),
               grad_up = oarlock::grad_of_weight(wide, in, du, up);
  oarlock::grad_of_input(wide, dg, gate, true, grad_x.data<float>());
  oarlock::grad_of_input(wide, du, up, false, grad_x.data<float>());
  return {grad_x, grad_gate, grad_up, grad_down};
}

}  // namespace

PD_BUILD_OP(fused_projections)
    .Inputs({"x", "query", "key", "value"})
    .Outputs({"queries", "keys", "values"})
    .SetKernelFn(PD_KERNEL(projections));
PD_BUILD_GRAD_OP(fused_projections)
    .Inputs({"x", "query", "key", "value", paddle::Grad("queries"), paddle::Grad("keys"), paddle::Grad("values")})
    .Outputs({paddle::Grad("x"), paddle::Grad("query"), paddle::Grad("key"), paddle::Grad("value")})
    .SetKernelFn(PD_KERNEL(projections_grad));

PD_BUILD_OP(fused_mlp)
    .Inputs({"x", "gate", "up", "down"})
    .Outputs({"y", "gates", "ups"})
    .SetKernelFn(PD_KERNEL(mlp));
PD_BUILD_GRAD_OP(fused_mlp)
    .Inputs({"x", "gate", "up", "down", "gates", "ups", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("gate"), paddle::Grad("up"), paddle::Grad("down")})
    .SetKernelFn(PD_KERNEL(mlp_grad));
