// A decoder layer's two ends around its attention as Paddle operators, float32 on the CPU: from the layer's input to
// query, key and value, and from the attention's output to the layer's. Python's oarlock/ops is how they are meant to
// be called.
#include "rms_norm/rms_norm_paddle.h"
#include "common/linear.h"

using paddle::Tensor;

namespace oarlock {
namespace {

// ---- fused_layer_start ----

// Query, key and value of the normed x; x for its other use, which is its own memory; the normed x and 1/rms.
std::vector<Tensor> layer_start(const Tensor& given, const Tensor& scale, const Tensor& q, const Tensor& k,
                                const Tensor& v, float epsilon) {
  const Tensor x = floats(given, "x");
  const NormOutputs normed = norm_forward(x, nullptr, floats(scale, "scale"), nullptr, epsilon);
  std::vector<Tensor> results;
  for (const Tensor* weight : {&q, &k, &v})
    results.push_back(product(linear_of(x, *weight, "a weight"), normed.y, floats(*weight, "a weight")));
  results.insert(results.end(), {x, normed.y, normed.invvar});
  return results;
}

// The normed x's gradients of the three are summed by the products, not after them.
std::vector<Tensor> layer_start_grad(const Tensor& x, const Tensor& scale, const Tensor& q, const Tensor& k,
                                     const Tensor& v, const Tensor& normed, const Tensor& invvar, const Tensor& grad_q,
                                     const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_kept) {
  Tensor grad_normed = empty_floats(normed.shape(), normed);
  std::vector<Tensor> of_weights;
  bool is_first = true;
  for (const auto& [weight, given_grad] : {std::pair(&q, &grad_q), std::pair(&k, &grad_k), std::pair(&v, &grad_v)}) {
    if (!given_grad->defined()) {  // that output went into nothing
      of_weights.push_back(zeros(*weight));
      continue;
    }
    const Tensor grad = floats(*given_grad, "the gradient"), w = dense(*weight);
    const Linear size = linear_of(normed, w, "a weight");
    grad_of_input(size, grad.data<float>(), w, is_first, grad_normed.data<float>());
    is_first = false;
    of_weights.push_back(grad_of_weight(size, normed.data<float>(), grad.data<float>(), w));
  }
  const NormGradients of_norm =
      norm_backward(x, scale, nullptr, invvar, is_first ? Tensor() : grad_normed, &grad_kept, false);
  return {of_norm.x, of_norm.scale, of_weights[0], of_weights[1], of_weights[2]};
}

// ---- fused_layer_end ----

// total = kept + attended output; y = total + (silu(n gate) * (n up)) down with n, the normed total; and what the
// backward needs.
std::vector<Tensor> layer_end(const Tensor& given, const Tensor& kept, const Tensor& given_output, const Tensor& scale,
                              const Tensor& given_gate, const Tensor& given_up, const Tensor& given_down,
                              float epsilon) {
  const Tensor attended = floats(given, "attended"), output = floats(given_output, "output"),
               gate = floats(given_gate, "gate"), up = floats(given_up, "up"), down = floats(given_down, "down");
  const Linear size = linear_of(attended, output, "output");
  PD_CHECK(kept.shape() == size.y_shape && down.shape().back() == size.out, "kept has to be ", shape_text(size.y_shape),
           ", as the layer's output; got ", shape_text(kept.shape()), " and down ", shape_text(down.shape()));
  const NormOutputs normed =
      norm_forward(product(size, attended, output), &kept, floats(scale, "scale"), nullptr, epsilon);
  const Linear wide = linear_of(normed.y, gate, "gate");
  check_mlp(gate, up);
  const Tensor gates = product(wide, normed.y, gate), ups = product(wide, normed.y, up),
               inner = inner_of(wide, gates, ups);
  const Tensor y = product(linear_of(inner, down, "down"), inner, down, &normed.sum);
  return {y, normed.sum, normed.y, normed.invvar, gates, ups};
}

std::vector<Tensor> layer_end_grad(const Tensor& given, const Tensor& given_output, const Tensor& scale,
                                   const Tensor& given_gate, const Tensor& given_up, const Tensor& given_down,
                                   const Tensor& total, const Tensor& normed, const Tensor& invvar, const Tensor& gates,
                                   const Tensor& ups, const Tensor& given_grad) {
  const Tensor attended = dense(given), output = dense(given_output), gate = dense(given_gate), up = dense(given_up),
               down = dense(given_down), grad = floats(given_grad, "the gradient");
  const Linear size = linear_of(attended, output, "output"), wide = linear_of(normed, gate, "gate"),
               narrow = linear_of(gates, down, "down");
  Tensor inner = empty_floats(gates.shape(), normed), grad_gates = empty_floats(gates.shape(), normed),
         grad_ups = empty_floats(gates.shape(), normed), grad_normed = empty_floats(normed.shape(), normed);
  const float *in = normed.data<float>(), *dy = grad.data<float>();
  float *middle = inner.data<float>(), *dg = grad_gates.data<float>(), *du = grad_ups.data<float>();
  grad_of_input(narrow, dy, down, true, middle);
  // SwiGLU's output is made a second time, in the memory of its gradient, which has been read: no layer keeps it.
  swiglu_backward_cpu({wide.rows, wide.out, wide.out, gates.data<float>(), ups.data<float>(), middle, dg, du, middle});
  const Tensor grad_down = grad_of_weight(narrow, middle, dy, down), grad_gate = grad_of_weight(wide, in, dg, gate),
               grad_up = grad_of_weight(wide, in, du, up);
  grad_of_input(wide, dg, gate, true, grad_normed.data<float>());
  grad_of_input(wide, du, up, false, grad_normed.data<float>());

  const NormGradients of_norm = norm_backward(total, scale, nullptr, invvar, grad_normed, &grad, false);
  const float* of_total = of_norm.x.data<float>();
  Tensor grad_attended = empty_floats(attended.shape(), attended);
  grad_of_input(size, of_total, output, true, grad_attended.data<float>());
  const Tensor grad_output = grad_of_weight(size, attended.data<float>(), of_total, output);
  return {grad_attended, of_norm.x, grad_output, of_norm.scale, grad_gate, grad_up, grad_down};
}

}  // namespace
}  // namespace oarlock

PD_BUILD_OP(fused_layer_start)
    .Inputs({"x", "scale", "query", "key", "value"})
    .Outputs({"queries", "keys", "values", "kept", "normed", "invvar"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(oarlock::layer_start));
PD_BUILD_GRAD_OP(fused_layer_start)
    .Inputs({"x", "scale", "query", "key", "value", "normed", "invvar", paddle::Grad("queries"), paddle::Grad("keys"),
             paddle::Grad("values"), paddle::Grad("kept")})
    .Outputs({paddle::Grad("x"), paddle::Grad("scale"), paddle::Grad("query"), paddle::Grad("key"),
              paddle::Grad("value")})
    .SetKernelFn(PD_KERNEL(oarlock::layer_start_grad));

PD_BUILD_OP(fused_layer_end)
    .Inputs({"attended", "kept", "output", "scale", "gate", "up", "down"})
    .Outputs({"y", "total", "normed", "invvar", "gates", "ups"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(oarlock::layer_end));
PD_BUILD_GRAD_OP(fused_layer_end)
    .Inputs({"attended", "output", "scale", "gate", "up", "down", "total", "normed", "invvar", "gates", "ups",
             paddle::Grad("y")})
    .Outputs({paddle::Grad("attended"), paddle::Grad("kept"), paddle::Grad("output"), paddle::Grad("scale"),
              paddle::Grad("gate"), paddle::Grad("up"), paddle::Grad("down")})
    .SetKernelFn(PD_KERNEL(oarlock::layer_end_grad));
