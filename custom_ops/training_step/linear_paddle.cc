// Linear layers of a training step as Paddle operators, float32 on the CPU. Python's oarlock/ops is how they are meant to
// be called.
#include "common/gemm.h"
#include "common/tensors.h"
#include "training_step/swiglu.h"
#include "weights/copy_matrix.h"

using oarlock::dense;
using oarlock::empty_floats;
using oarlock::floats;
using oarlock::Shape;
using oarlock::shape_text;
using paddle::Tensor;

namespace {

// ---- fused_projections, fused_mlp ----

// A layer without bias: x [..., in], weight [in, out].
struct Linear {
  int64_t rows, in, out;
  Shape y_shape;
};

Linear linear_of(const Tensor& x, const Tensor& weight, const char* name) {
  const Shape shape = weight.shape();
  Shape y_shape = x.shape();
  const int64_t in = y_shape.back();
  PD_CHECK(shape.size() == 2 && shape[0] == in, name, " has to be [", in, ", out]; got ", shape_text(shape));
  PD_CHECK(oarlock::has_gemm(), "this Paddle is without MKL");
  y_shape.back() = shape[1];
  return {in ? x.numel() / in : 0, in, shape[1], y_shape};
}

// x weight.
Tensor product(const Linear& size, const Tensor& x, const Tensor& weight) {
  Tensor y = empty_floats(size.y_shape, x);
  oarlock::gemm({false, false, size.rows, size.out, size.in, 1, x.data<float>(), weight.data<float>(), 0,
                 y.data<float>()});
  return y;
}

// The weight's gradient, x^T grad.
Tensor grad_of_weight(const Linear& size, const float* x, const float* grad, const Tensor& weight) {
  Tensor result = empty_floats(weight.shape(), weight);
  oarlock::gemm({true, false, size.in, size.out, size.rows, 1, x, grad, 0, result.data<float>()});
  return result;
}

// The input's, grad weight^T, put in place or added to what is there.
void grad_of_input(const Linear& size, const float* grad, const Tensor& weight, bool is_first, float* result) {
  oarlock::gemm({false, true, size.rows, size.in, size.out, 1, grad, weight.data<float>(), is_first ? 0.f : 1.f, result});
}

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
      results.push_back(paddle::experimental::full(weight->shape(), 0, weight->dtype(), weight->place()));
      continue;
    }
    const Tensor grad = floats(*given_grad, "the gradient"), w = dense(*weight);
    const Linear size = linear_of(x, w, "a weight");
    grad_of_input(size, grad.data<float>(), w, is_first, grad_x.data<float>());
    is_first = false;
    results.push_back(grad_of_weight(size, x.data<float>(), grad.data<float>(), w));
  }
  return results;
}

// y = (silu(x gate) * (x up)) down; and what the backward needs.
std::vector<Tensor> mlp(const Tensor& given, const Tensor& given_gate, const Tensor& given_up,
                        const Tensor& given_down) {
  const Tensor x = floats(given, "x"), gate = floats(given_gate, "gate"), up = floats(given_up, "up"),
               down = floats(given_down, "down");
  const Linear wide = linear_of(x, gate, "gate");
  PD_CHECK(up.shape() == gate.shape(), "gate and up have to be of one shape; got ", shape_text(gate.shape()), " and ",
           shape_text(up.shape()));
  const Tensor gates = product(wide, x, gate), ups = product(wide, x, up);
  Tensor inner = empty_floats(wide.y_shape, x);
  oarlock::swiglu_cpu({wide.rows, wide.out, wide.out, gates.data<float>(), ups.data<float>(), inner.data<float>()});
  return {product(linear_of(inner, down, "down"), inner, down), gates, ups};
}

// SwiGLU's output is made a second time, in the memory of its gradient, which its backward has read: it is then kept for
// no layer.
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
  oarlock::swiglu_backward_cpu(
      {wide.rows, wide.out, wide.out, gates.data<float>(), ups.data<float>(), middle, dg, du, middle});
  const Tensor grad_down = grad_of_weight(narrow, middle, dy, down), grad_gate = grad_of_weight(wide, in, dg, gate),
               grad_up = grad_of_weight(wide, in, du, up);
  grad_of_input(wide, dg, gate, true, grad_x.data<float>());
  grad_of_input(wide, du, up, false, grad_x.data<float>());
  return {grad_x, grad_gate, grad_up, grad_down};
}

// ---- fused_lora_linear ----

struct LoraSizes {
  int64_t rows, in, out, rank;
  Shape y_shape;
};

LoraSizes lora_sizes(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b) {
  Shape shape = x.shape();
  const int64_t in = shape.back(), out = weight.shape().back(), rank = b.shape()[0];
  PD_CHECK(weight.shape() == Shape({in, out}) && a.shape() == Shape({in, rank}) && b.shape() == Shape({rank, out}),
           "x, weight, a and b do not fit together: ", shape_text(shape), ", ", shape_text(weight.shape()), ", ",
           shape_text(a.shape()), ", ", shape_text(b.shape()));
  PD_CHECK(oarlock::has_gemm(), "this Paddle is without MKL");
  shape.back() = out;
  return {x.numel() / in, in, out, rank, shape};
}

std::vector<Tensor> lora_linear(const Tensor& given, const Tensor& given_weight, const Tensor& given_a,
                                const Tensor& given_b, float scaling, bool for_x) {
  const Tensor x = floats(given, "x"), weight = floats(given_weight, "weight"), a = floats(given_a, "a"),
               b = floats(given_b, "b");
  const LoraSizes size = lora_sizes(x, weight, a, b);
  Tensor y = empty_floats(size.y_shape, x), low = empty_floats({size.rows, size.rank}, x);
  const float* in = x.data<float>();
  oarlock::gemm({false, false, size.rows, size.rank, size.in, 1, in, a.data<float>(), 0, low.data<float>()});
  oarlock::gemm({false, false, size.rows, size.out, size.in, 1, in, weight.data<float>(), 0, y.data<float>()});
  oarlock::gemm({false, false, size.rows, size.out, size.rank, scaling, low.data<float>(), b.data<float>(), 1,
                 y.data<float>()});
  return {y, low};
}

std::vector<Tensor> lora_linear_grad(const Tensor& given, const Tensor& given_weight, const Tensor& given_a,
                                     const Tensor& given_b, const Tensor& low, const Tensor& given_grad,
                                     float scaling, bool for_x) {
  const Tensor x = dense(given), weight = dense(given_weight), a = dense(given_a), b = dense(given_b),
               grad = floats(given_grad, "the gradient");
  const LoraSizes size = lora_sizes(x, weight, a, b);
  Tensor grad_x = empty_floats(for_x ? x.shape() : Shape{0}, x), grad_a = empty_floats(a.shape(), x),
         grad_b = empty_floats(b.shape(), x), grad_low = empty_floats(low.shape(), x);
  const float* dy = grad.data<float>();
  float* dl = grad_low.data<float>();
  oarlock::gemm({false, true, size.rows, size.rank, size.out, scaling, dy, b.data<float>(), 0, dl});
  oarlock::gemm({true, false, size.rank, size.out, size.rows, scaling, low.data<float>(), dy, 0, grad_b.data<float>()});
  // grad_a = x^T dl, made as the turned dl^T x: a product this narrow is twice as fast lying down.
  Tensor turned = empty_floats({size.rank, size.in}, x);
  oarlock::gemm({true, false, size.rank, size.in, size.rows, 1, dl, x.data<float>(), 0, turned.data<float>()});
  oarlock::copy_matrix_cpu({size.in, size.rank, turned.data<float>(), size.in, oarlock::DType::kFloat32, true,
                            grad_a.data<float>(), size.rank, oarlock::DType::kFloat32});
  if (!for_x) return {grad_x, grad_a, grad_b};  // nobody takes the gradient of the first layer's input
  oarlock::gemm({false, true, size.rows, size.in, size.out, 1, dy, weight.data<float>(), 0, grad_x.data<float>()});
  oarlock::gemm({false, true, size.rows, size.in, size.rank, 1, dl, a.data<float>(), 1, grad_x.data<float>()});
  return {grad_x, grad_a, grad_b};
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

PD_BUILD_OP(fused_lora_linear)
    .Inputs({"x", "weight", "a", "b"})
    .Outputs({"y", "low"})
    .Attrs({"scaling: float", "for_x: bool"})
    .SetKernelFn(PD_KERNEL(lora_linear));
PD_BUILD_GRAD_OP(fused_lora_linear)
    .Inputs({"x", "weight", "a", "b", "low", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("a"), paddle::Grad("b")})
    .Attrs({"scaling: float", "for_x: bool"})
    .SetKernelFn(PD_KERNEL(lora_linear_grad));
