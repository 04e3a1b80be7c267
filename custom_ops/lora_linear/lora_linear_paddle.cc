// Linear layers with LoRA (https://arxiv.org/abs/2106.09685) as Paddle operators, float32 on the CPU: one alone, query,
// key and value, and an MLP. Python's oarlock/ops is how they are meant to be called.
#include "common/linear.h"
#include "copy_matrix/copy_matrix.h"

using paddle::Tensor;

namespace oarlock {
namespace {

// y = x weight + scaling * (x a) b; no gradient for weight.
struct Lora {
  Linear size;
  Tensor weight, a, b;
  float scaling;
  int64_t rank;
};

Lora lora_of(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b, float scaling) {
  const int64_t in = x.shape().back(), out = weight.shape().back(), rank = b.shape()[0];
  PD_CHECK(weight.shape() == Shape({in, out}) && a.shape() == Shape({in, rank}) && b.shape() == Shape({rank, out}),
           "x, weight, a and b do not fit together: ", shape_text(x.shape()), ", ", shape_text(weight.shape()), ", ",
           shape_text(a.shape()), ", ", shape_text(b.shape()));
  const Linear size = linear_of(x, weight, "weight");
  return {size, floats(weight, "weight"), floats(a, "a"), floats(b, "b"), scaling, rank};
}

// y and low = x a.
std::vector<Tensor> lora_product(const Lora& layer, const Tensor& x) {
  const Linear& size = layer.size;
  Tensor low = empty_floats({size.rows, layer.rank}, x);
  gemm({false, false, size.rows, layer.rank, size.in, 1, x.data<float>(), layer.a.data<float>(), 0, low.data<float>()});
  Tensor y = product(size, x, layer.weight);
  gemm({false, false, size.rows, size.out, layer.rank, layer.scaling, low.data<float>(), layer.b.data<float>(), 1,
        y.data<float>()});
  return {y, low};
}

// The gradient of x a.
Tensor low_gradient(const Lora& layer, const float* grad) {
  const Linear& size = layer.size;
  Tensor result = empty_floats({size.rows, layer.rank}, layer.a);
  gemm({false, true, size.rows, layer.rank, size.out, layer.scaling, grad, layer.b.data<float>(), 0,
        result.data<float>()});
  return result;
}

// The input's, put in place or added to what is there.
void input_gradient(const Lora& layer, const float* grad, const Tensor& grad_low, bool is_first, float* result) {
  const Linear& size = layer.size;
  grad_of_input(size, grad, layer.weight, is_first, result);
  gemm({false, true, size.rows, size.in, layer.rank, 1, grad_low.data<float>(), layer.a.data<float>(), 1, result});
}

// Those of a and b.
std::vector<Tensor> matrix_gradients(const Lora& layer, const float* x, const Tensor& low, const float* grad,
                                     const Tensor& grad_low) {
  const Linear& size = layer.size;
  const int64_t rank = layer.rank;
  Tensor grad_a = empty_floats(layer.a.shape(), low), grad_b = empty_floats(layer.b.shape(), low);
  gemm({true, false, rank, size.out, size.rows, layer.scaling, low.data<float>(), grad, 0, grad_b.data<float>()});
  // grad_a = x^T grad_low, made as the turned grad_low^T x: a product this narrow is twice as fast lying down.
  Tensor turned = empty_floats({rank, size.in}, low);
  gemm({true, false, rank, size.in, size.rows, 1, grad_low.data<float>(), x, 0, turned.data<float>()});
  copy_matrix_cpu({size.in, rank, turned.data<float>(), size.in, DType::kFloat32, true, grad_a.data<float>(), rank,
                   DType::kFloat32});
  return {grad_a, grad_b};
}

// All of them; the input's where one is given.
std::vector<Tensor> lora_gradients(const Lora& layer, const float* x, const Tensor& low, const float* grad,
                                   bool is_first, float* grad_x) {
  const Tensor grad_low = low_gradient(layer, grad);
  if (grad_x) input_gradient(layer, grad, grad_low, is_first, grad_x);
  return matrix_gradients(layer, x, low, grad, grad_low);
}

std::vector<Tensor> lora_linear(const Tensor& given, const Tensor& weight, const Tensor& a, const Tensor& b,
                                float scaling, bool for_x) {
  const Tensor x = floats(given, "x");
  return lora_product(lora_of(x, weight, a, b, scaling), x);
}

// Nobody takes the gradient of the first layer's input: it is then empty.
Tensor empty_grad(const Tensor& x, bool for_x) { return empty_floats(for_x ? x.shape() : Shape{0}, x); }

std::vector<Tensor> lora_linear_grad(const Tensor& given, const Tensor& weight, const Tensor& a, const Tensor& b,
                                     const Tensor& low, const Tensor& given_grad, float scaling, bool for_x) {
  const Tensor x = dense(given), grad = floats(given_grad, "the gradient");
  Tensor grad_x = empty_grad(x, for_x);
  const auto grads = lora_gradients(lora_of(x, weight, a, b, scaling), x.data<float>(), low, grad.data<float>(), true,
                                    for_x ? grad_x.data<float>() : nullptr);
  return {grad_x, grads[0], grads[1]};
}

using Tensors = std::vector<Tensor>;

// Query, key, value, and x a of each.
std::vector<Tensor> lora_projections(const Tensor& given, const Tensors& weights, const Tensors& a, const Tensors& b,
                                     const std::vector<float>& scalings, bool for_x) {
  const Tensor x = floats(given, "x");
  std::vector<Tensor> results(6);
  for (size_t i = 0; i < 3; ++i) {
    const auto made = lora_product(lora_of(x, weights[i], a[i], b[i], scalings[i]), x);
    results[i] = made[0];
    results[3 + i] = made[1];
  }
  return results;
}

std::vector<Tensor> lora_projections_grad(const Tensor& given, const Tensors& weights, const Tensors& a,
                                          const Tensors& b, const Tensor& low_q, const Tensor& low_k,
                                          const Tensor& low_v, const Tensor& grad_q, const Tensor& grad_k,
                                          const Tensor& grad_v, const std::vector<float>& scalings, bool for_x) {
  const Tensor x = dense(given), *lows[] = {&low_q, &low_k, &low_v}, *grads[] = {&grad_q, &grad_k, &grad_v};
  std::vector<Tensor> results(7);
  results[0] = empty_grad(x, for_x);
  bool is_first = true;
  for (size_t i = 0; i < 3; ++i) {
    if (!grads[i]->defined()) {  // that output went into nothing
      results[1 + i] = zeros(a[i]);
      results[4 + i] = zeros(b[i]);
      continue;
    }
    const Tensor grad = floats(*grads[i], "the gradient");
    const auto made = lora_gradients(lora_of(x, weights[i], a[i], b[i], scalings[i]), x.data<float>(), *lows[i],
                                     grad.data<float>(), is_first, for_x ? results[0].data<float>() : nullptr);
    results[1 + i] = made[0];
    results[4 + i] = made[1];
    is_first = false;
  }
  return results;
}

// y, gate's and up's outputs, and the input times a of gate, up and down.
std::vector<Tensor> lora_mlp(const Tensor& given, const Tensors& weights, const Tensors& a, const Tensors& b,
                             const std::vector<float>& scalings, bool for_x) {
  const Tensor x = floats(given, "x");
  check_mlp(weights[0], weights[1]);
  const Lora gate = lora_of(x, weights[0], a[0], b[0], scalings[0]),
             up = lora_of(x, weights[1], a[1], b[1], scalings[1]);
  const auto gates = lora_product(gate, x), ups = lora_product(up, x);
  const Tensor inner = inner_of(gate.size, gates[0], ups[0]);
  const auto made = lora_product(lora_of(inner, weights[2], a[2], b[2], scalings[2]), inner);
  return {made[0], gates[0], ups[0], gates[1], ups[1], made[1]};
}

std::vector<Tensor> lora_mlp_grad(const Tensor& given, const Tensors& weights, const Tensors& a, const Tensors& b,
                                  const Tensor& gates, const Tensor& ups, const Tensor& low_gate, const Tensor& low_up,
                                  const Tensor& low_down, const Tensor& given_grad, const std::vector<float>& scalings,
                                  bool for_x) {
  const Tensor x = dense(given), grad = floats(given_grad, "the gradient");
  const Lora gate = lora_of(x, weights[0], a[0], b[0], scalings[0]),
             up = lora_of(x, weights[1], a[1], b[1], scalings[1]),
             down = lora_of(gates, weights[2], a[2], b[2], scalings[2]);
  Tensor inner = empty_floats(gates.shape(), x), grad_gates = empty_floats(gates.shape(), x),
         grad_ups = empty_floats(gates.shape(), x), grad_x = empty_grad(x, for_x);
  const Linear& wide = gate.size;
  const Tensor grad_low = low_gradient(down, grad.data<float>());
  float *middle = inner.data<float>(), *dg = grad_gates.data<float>(), *du = grad_ups.data<float>(),
        *dx = for_x ? grad_x.data<float>() : nullptr;
  input_gradient(down, grad.data<float>(), grad_low, true, middle);
  // As in fused_layer_end: SwiGLU's output is made again, in the memory of its gradient.
  swiglu_backward_cpu({wide.rows, wide.out, wide.out, gates.data<float>(), ups.data<float>(), middle, dg, du, middle});
  const auto of_down = matrix_gradients(down, middle, low_down, grad.data<float>(), grad_low),
             of_gate = lora_gradients(gate, x.data<float>(), low_gate, dg, true, dx),
             of_up = lora_gradients(up, x.data<float>(), low_up, du, false, dx);
  return {grad_x, of_gate[0], of_up[0], of_down[0], of_gate[1], of_up[1], of_down[1]};
}

}  // namespace
}  // namespace oarlock

PD_BUILD_OP(fused_lora_linear)
    .Inputs({"x", "weight", "a", "b"})
    .Outputs({"y", "low"})
    .Attrs({"scaling: float", "for_x: bool"})
    .SetKernelFn(PD_KERNEL(oarlock::lora_linear));
PD_BUILD_GRAD_OP(fused_lora_linear)
    .Inputs({"x", "weight", "a", "b", "low", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("a"), paddle::Grad("b")})
    .Attrs({"scaling: float", "for_x: bool"})
    .SetKernelFn(PD_KERNEL(oarlock::lora_linear_grad));

PD_BUILD_OP(fused_lora_projections)
    .Inputs({"x", paddle::Vec("weights"), paddle::Vec("a"), paddle::Vec("b")})
    .Outputs({"queries", "keys", "values", "low_q", "low_k", "low_v"})
    .Attrs({"scalings: std::vector<float>", "for_x: bool"})
    .SetKernelFn(PD_KERNEL(oarlock::lora_projections));
PD_BUILD_GRAD_OP(fused_lora_projections)
    .Inputs({"x", paddle::Vec("weights"), paddle::Vec("a"), paddle::Vec("b"), "low_q", "low_k", "low_v",
             paddle::Grad("queries"), paddle::Grad("keys"), paddle::Grad("values")})
    .Outputs({paddle::Grad("x"), paddle::Grad(paddle::Vec("a")), paddle::Grad(paddle::Vec("b"))})
    .Attrs({"scalings: std::vector<float>", "for_x: bool"})
    .SetKernelFn(PD_KERNEL(oarlock::lora_projections_grad));

PD_BUILD_OP(fused_lora_mlp)
    .Inputs({"x", paddle::Vec("weights"), paddle::Vec("a"), paddle::Vec("b")})
    .Outputs({"y", "gates", "ups", "low_gate", "low_up", "low_down"})
    .Attrs({"scalings: std::vector<float>", "for_x: bool"})
    .SetKernelFn(PD_KERNEL(oarlock::lora_mlp));
PD_BUILD_GRAD_OP(fused_lora_mlp)
    .Inputs({"x", paddle::Vec("weights"), paddle::Vec("a"), paddle::Vec("b"), "gates", "ups", "low_gate", "low_up",
             "low_down", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad(paddle::Vec("a")), paddle::Grad(paddle::Vec("b"))})
    .Attrs({"scalings: std::vector<float>", "for_x: bool"})
    .SetKernelFn(PD_KERNEL(oarlock::lora_mlp_grad));
