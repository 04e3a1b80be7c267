// The parts of a training step as Paddle operators, float32 on the CPU. Python's oarlock/ops is how they are meant to be
// called.
#include <algorithm>

#include "common/gemm.h"
#include "common/tensors.h"
#include "training_step/adamw.h"
#include "training_step/cross_entropy.h"
#include "training_step/rotary.h"
#include "training_step/swiglu.h"

using oarlock::dense;
using oarlock::dense_if_any;
using oarlock::empty_floats;
using oarlock::floats;
using oarlock::Shape;
using oarlock::shape_text;
using paddle::Tensor;
using MaybeTensor = paddle::optional<Tensor>;

namespace {

// ---- fused_rotary ----

Tensor rotate(const Tensor& given, const Tensor& cos, const Tensor& sin, const MaybeTensor& positions, bool backward) {
  const Tensor x = floats(given, "x");
  const Shape shape = x.shape();
  Tensor y = empty_floats(shape, x);
  oarlock::rotary_cpu({shape[0], shape[1], shape[2], shape[3], x.data<float>(), cos.data<float>(), sin.data<float>(),
                       positions ? positions->data<int64_t>() : nullptr, y.data<float>(), backward});
  return y;
}

void check_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const MaybeTensor& positions) {
  const Shape shape = x.shape();
  PD_CHECK(shape.size() == 4 && shape[3] % 2 == 0, "q and k have to be [batch, length, heads, even dim]; got ",
           shape_text(shape));
  const int64_t rows = cos.numel() / shape[3];
  PD_CHECK(cos.numel() == sin.numel() && cos.shape().back() == shape[3], "cos and sin have to be [positions, ",
           shape[3], "] (axes of 1 between them may be there); got ", shape_text(cos.shape()));
  if (!positions) {
    PD_CHECK(shape[1] <= rows, "cos and sin have ", rows, " positions, x has ", shape[1]);
    return;
  }
  PD_CHECK(positions->dtype() == paddle::DataType::INT64 && positions->shape() == Shape({shape[0], shape[1]}),
           "positions have to be int64 [batch, length]");
  const int64_t* values = positions->data<int64_t>();
  for (int64_t i = 0; i < positions->numel(); ++i)
    PD_CHECK(values[i] >= 0 && values[i] < rows, "position ", values[i], " is not among the ", rows, " of cos and sin");
}

std::vector<Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& given_cos, const Tensor& given_sin,
                           const MaybeTensor& given_positions) {
  const Tensor cos = floats(given_cos, "cos"), sin = floats(given_sin, "sin");
  const MaybeTensor positions = dense_if_any(given_positions);
  check_rotary(q, cos, sin, positions);
  check_rotary(k, cos, sin, positions);
  return {rotate(q, cos, sin, positions, false), rotate(k, cos, sin, positions, false)};
}

std::vector<Tensor> rotary_grad(const Tensor& given_cos, const Tensor& given_sin, const MaybeTensor& given_positions,
                                const Tensor& grad_q, const Tensor& grad_k) {
  PD_CHECK(grad_q.defined() && grad_k.defined(), "both outputs have to be used where gradients are wanted");
  const Tensor cos = dense(given_cos), sin = dense(given_sin);
  const MaybeTensor positions = dense_if_any(given_positions);
  return {rotate(grad_q, cos, sin, positions, true), rotate(grad_k, cos, sin, positions, true)};
}

// ---- fused_swiglu, fused_swiglu_halves ----

std::vector<Tensor> swiglu(const Tensor& given_gate, const Tensor& given_up) {
  const Tensor gate = floats(given_gate, "gate"), up = floats(given_up, "up");
  PD_CHECK(gate.shape() == up.shape(), "gate and up have to be of one shape; got ", shape_text(gate.shape()), " and ",
           shape_text(up.shape()));
  Tensor y = empty_floats(gate.shape(), gate);
  const int64_t cols = gate.shape().back();
  oarlock::swiglu_cpu({gate.numel() / cols, cols, cols, gate.data<float>(), up.data<float>(), y.data<float>()});
  return {y};
}

std::vector<Tensor> swiglu_grad(const Tensor& given_gate, const Tensor& given_up, const Tensor& given_grad) {
  const Tensor gate = dense(given_gate), up = dense(given_up), grad = floats(given_grad, "the gradient");
  Tensor grad_gate = empty_floats(gate.shape(), gate), grad_up = empty_floats(gate.shape(), gate);
  const int64_t cols = gate.shape().back();
  oarlock::swiglu_backward_cpu({gate.numel() / cols, cols, cols, gate.data<float>(), up.data<float>(),
                                grad.data<float>(), grad_gate.data<float>(), grad_up.data<float>()});
  return {grad_gate, grad_up};
}

std::vector<Tensor> swiglu_halves(const Tensor& given) {
  const Tensor x = floats(given, "x");
  Shape shape = x.shape();
  PD_CHECK(shape.back() % 2 == 0, "x has to hold gate and up beside each other; got ", shape_text(shape));
  const int64_t cols = shape.back() /= 2;
  Tensor y = empty_floats(shape, x);
  const float* gate = x.data<float>();
  oarlock::swiglu_cpu({x.numel() / (2 * cols), cols, 2 * cols, gate, gate + cols, y.data<float>()});
  return {y};
}

std::vector<Tensor> swiglu_halves_grad(const Tensor& given, const Tensor& given_grad) {
  const Tensor x = dense(given), grad = floats(given_grad, "the gradient");
  Tensor grad_x = empty_floats(x.shape(), x);
  const int64_t cols = x.shape().back() / 2;
  const float* gate = x.data<float>();
  float* grad_gate = grad_x.data<float>();
  oarlock::swiglu_backward_cpu({x.numel() / (2 * cols), cols, 2 * cols, gate, gate + cols, grad.data<float>(),
                                grad_gate, grad_gate + cols});
  return {grad_x};
}

// ---- fused_linear_cross_entropy ----

// The losses [rows], and their gradients times `scale`; an empty tensor for one that is not asked for. About `most`
// scores exist at a time.
std::vector<Tensor> linear_cross_entropy(const Tensor& given_hidden, const Tensor& given_weight,
                                         const Tensor& given_labels, bool transposed, float scale, int64_t ignored,
                                         int64_t most, bool for_hidden, bool for_weight) {
  const Tensor hidden = floats(given_hidden, "hidden"), weight = floats(given_weight, "weight"),
               labels = dense(given_labels);
  PD_CHECK(oarlock::has_gemm(), "this Paddle is without MKL");
  const Shape weight_shape = weight.shape();
  const int64_t width = hidden.shape().back(), rows = hidden.numel() / width;
  PD_CHECK(weight_shape.size() == 2 && weight_shape[transposed] == width, "weight has to be [",
           transposed ? "classes, " : "", width, transposed ? "]" : ", classes]", "; got ", shape_text(weight_shape));
  PD_CHECK(labels.numel() == rows && labels.dtype() == paddle::DataType::INT64,
           "labels have to be int64, one for each of the ", rows, " rows of hidden; got ", shape_text(labels.shape()));
  const int64_t classes = weight_shape[!transposed];
  const int64_t* label = labels.data<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    PD_CHECK(label[i] == ignored || (label[i] >= 0 && label[i] < classes), "label ", label[i], " is not among the ",
             classes, " classes");

  Tensor losses = empty_floats({rows}, hidden);
  Tensor grad_hidden = empty_floats(for_hidden ? hidden.shape() : Shape{0}, hidden);
  Tensor grad_weight = empty_floats(for_weight ? weight_shape : Shape{0}, hidden);
  const int64_t piece = std::min(std::max(most / classes, int64_t{1}), rows);
  Tensor scores = empty_floats({piece, classes}, hidden);
  float *s = scores.data<float>(), *grad_w = grad_weight.data<float>();
  const float *h = hidden.data<float>(), *w = weight.data<float>();
  for (int64_t row = 0; row < rows; row += piece) {
    const int64_t count = row + piece < rows ? piece : rows - row;
    const float* x = h + row * width;
    oarlock::gemm({false, transposed, count, classes, width, 1, x, w, 0, s});
    oarlock::cross_entropy_cpu({count, classes, ignored, label + row, scale, s, losses.data<float>() + row,
                                for_hidden || for_weight});
    if (for_hidden)
      oarlock::gemm({false, !transposed, count, width, classes, 1, s, w, 0, grad_hidden.data<float>() + row * width});
    if (!for_weight) continue;
    const float kept = row ? 1 : 0;
    if (transposed) {
      oarlock::gemm({true, false, classes, width, count, 1, s, x, kept, grad_w});
    } else {
      oarlock::gemm({true, false, width, classes, count, 1, x, s, kept, grad_w});
    }
  }
  return {losses, grad_hidden, grad_weight};
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
                                const Tensor& given_b, float scaling) {
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
                                     float scaling) {
  const Tensor x = dense(given), weight = dense(given_weight), a = dense(given_a), b = dense(given_b),
               grad = floats(given_grad, "the gradient");
  const LoraSizes size = lora_sizes(x, weight, a, b);
  Tensor grad_x = empty_floats(x.shape(), x), grad_a = empty_floats(a.shape(), x), grad_b = empty_floats(b.shape(), x),
         grad_low = empty_floats(low.shape(), x);
  const float* dy = grad.data<float>();
  float* dl = grad_low.data<float>();
  oarlock::gemm({false, true, size.rows, size.rank, size.out, scaling, dy, b.data<float>(), 0, dl});
  oarlock::gemm({true, false, size.rank, size.out, size.rows, scaling, low.data<float>(), dy, 0, grad_b.data<float>()});
  oarlock::gemm({true, false, size.in, size.rank, size.rows, 1, x.data<float>(), dl, 0, grad_a.data<float>()});
  oarlock::gemm({false, true, size.rows, size.in, size.out, 1, dy, weight.data<float>(), 0, grad_x.data<float>()});
  oarlock::gemm({false, true, size.rows, size.in, size.rank, 1, dl, a.data<float>(), 1, grad_x.data<float>()});
  return {grad_x, grad_a, grad_b};
}

// ---- fused_adamw ----

void adamw(std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients, std::vector<Tensor>& moments1,
           std::vector<Tensor>& moments2, std::vector<Tensor>& beta1_powers, std::vector<Tensor>& beta2_powers,
           const std::vector<float>& learning_rates, const std::vector<float>& decays, float beta1, float beta2,
           float epsilon) {
  std::vector<oarlock::AdamWTensor> tensors;
  std::vector<Tensor> kept;  // a gradient without gaps may be a copy
  for (size_t i = 0; i < parameters.size(); ++i) {
    for (const Tensor* tensor : {&parameters[i], &moments1[i], &moments2[i]})
      PD_CHECK(tensor->is_contiguous(), "parameters and moments have to be without gaps");
    const Tensor gradient = floats(gradients[i], "the gradient");
    PD_CHECK(gradient.numel() == parameters[i].numel(), "a gradient is not like its parameter");
    kept.push_back(gradient);
    tensors.push_back({gradient.numel(), parameters[i].data<float>(), moments1[i].data<float>(),
                       moments2[i].data<float>(), gradient.data<float>(), learning_rates[i], decays[i],
                       *beta1_powers[i].data<float>(), *beta2_powers[i].data<float>()});
  }
  oarlock::adamw_cpu({int64_t(tensors.size()), tensors.data(), beta1, beta2, epsilon});
  for (Tensor& power : beta1_powers) *power.data<float>() *= beta1;
  for (Tensor& power : beta2_powers) *power.data<float>() *= beta2;
}

}  // namespace

PD_BUILD_OP(fused_rotary)
    .Inputs({"q", "k", "cos", "sin", paddle::Optional("positions")})
    .Outputs({"rotated_q", "rotated_k"})
    .SetKernelFn(PD_KERNEL(rotary));
PD_BUILD_GRAD_OP(fused_rotary)
    .Inputs({"cos", "sin", paddle::Optional("positions"), paddle::Grad("rotated_q"), paddle::Grad("rotated_k")})
    .Outputs({paddle::Grad("q"), paddle::Grad("k")})
    .SetKernelFn(PD_KERNEL(rotary_grad));

PD_BUILD_OP(fused_swiglu).Inputs({"gate", "up"}).Outputs({"y"}).SetKernelFn(PD_KERNEL(swiglu));
PD_BUILD_GRAD_OP(fused_swiglu)
    .Inputs({"gate", "up", paddle::Grad("y")})
    .Outputs({paddle::Grad("gate"), paddle::Grad("up")})
    .SetKernelFn(PD_KERNEL(swiglu_grad));

PD_BUILD_OP(fused_swiglu_halves).Inputs({"x"}).Outputs({"y"}).SetKernelFn(PD_KERNEL(swiglu_halves));
PD_BUILD_GRAD_OP(fused_swiglu_halves)
    .Inputs({"x", paddle::Grad("y")})
    .Outputs({paddle::Grad("x")})
    .SetKernelFn(PD_KERNEL(swiglu_halves_grad));

PD_BUILD_OP(fused_linear_cross_entropy)  // without a gradient operator: it gives the gradients along
    .Inputs({"hidden", "weight", "labels"})
    .Outputs({"losses", "grad_hidden", "grad_weight"})
    .Attrs({"transposed: bool", "scale: float", "ignored: int64_t", "most: int64_t",
            "for_hidden: bool", "for_weight: bool"})
    .SetKernelFn(PD_KERNEL(linear_cross_entropy));

PD_BUILD_OP(fused_lora_linear)
    .Inputs({"x", "weight", "a", "b"})
    .Outputs({"y", "low"})
    .Attrs({"scaling: float"})
    .SetKernelFn(PD_KERNEL(lora_linear));
PD_BUILD_GRAD_OP(fused_lora_linear)
    .Inputs({"x", "weight", "a", "b", "low", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("a"), paddle::Grad("b")})
    .Attrs({"scaling: float"})
    .SetKernelFn(PD_KERNEL(lora_linear_grad));

PD_BUILD_OP(fused_adamw)
    .Inputs({paddle::Vec("parameters"), paddle::Vec("gradients"), paddle::Vec("moments1"), paddle::Vec("moments2"),
             paddle::Vec("beta1_powers"), paddle::Vec("beta2_powers")})
    .Outputs({paddle::Vec("new_parameters"), paddle::Vec("new_moments1"), paddle::Vec("new_moments2"),
              paddle::Vec("new_beta1_powers"), paddle::Vec("new_beta2_powers")})
    .SetInplaceMap({{paddle::Vec("parameters"), paddle::Vec("new_parameters")},
                    {paddle::Vec("moments1"), paddle::Vec("new_moments1")},
                    {paddle::Vec("moments2"), paddle::Vec("new_moments2")},
                    {paddle::Vec("beta1_powers"), paddle::Vec("new_beta1_powers")},
                    {paddle::Vec("beta2_powers"), paddle::Vec("new_beta2_powers")}})
    .Attrs({"learning_rates: std::vector<float>", "decays: std::vector<float>", "beta1: float", "beta2: float",
            "epsilon: float"})
    .SetKernelFn(PD_KERNEL(adamw));
