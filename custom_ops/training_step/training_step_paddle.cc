// The parts of a training step as Paddle operators, float32 on the CPU; layer_paddle.cc has a layer's two ends,
// lora_paddle.cc the linear layers with LoRA. Python's oarlock/ops is how they are meant to be called.
#include "common/gemm.h"
#include "common/tensors.h"
#include "training_step/adamw.h"
#include "training_step/cross_entropy.h"
#include "training_step/rotary.h"
#include "training_step/swiglu.h"

using paddle::Tensor;
using MaybeTensor = paddle::optional<Tensor>;

namespace oarlock {
namespace {

// ---- fused_rotary ----

Tensor rotate(const Tensor& given, const Tensor& cos, const Tensor& sin, const MaybeTensor& positions, bool backward) {
  const Tensor x = floats(given, "x");
  const Shape shape = x.shape();
  Tensor y = empty_floats(shape, x);
  rotary_cpu({shape[0], shape[1], shape[2], shape[3], x.data<float>(), cos.data<float>(), sin.data<float>(),
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

// ---- fused_linear_softmax, fused_linear_softmax_gradient ----

struct HeadSizes {
  int64_t rows, width, classes;
};

HeadSizes head_sizes(const Tensor& hidden, const Tensor& weight, const Tensor& labels, bool transposed) {
  const Shape shape = weight.shape();
  const int64_t width = hidden.shape().back(), rows = hidden.numel() / width;
  PD_CHECK(shape.size() == 2 && shape[transposed] == width, "weight has to be [", transposed ? "classes, " : "", width,
           transposed ? "]" : ", classes]", "; got ", shape_text(shape));
  PD_CHECK(labels.numel() == rows && labels.dtype() == paddle::DataType::INT64,
           "labels have to be int64, one for each of the ", rows, " rows of hidden; got ", shape_text(labels.shape()));
  PD_CHECK(has_gemm(), "this Paddle is without MKL");
  return {rows, width, shape[!transposed]};
}

// exp(score - the row's largest) of the weight's classes, `first` and later ones of `all`; and of each row the largest
// score, the sum of the exponentials, and the score at the label (-infinity where it is another rank's).
std::vector<Tensor> linear_softmax(const Tensor& given_hidden, const Tensor& given_weight, const Tensor& given_labels,
                                   bool transposed, int64_t ignored, int64_t first, int64_t all) {
  const Tensor hidden = floats(given_hidden, "hidden"), weight = floats(given_weight, "weight"),
               labels = dense(given_labels);
  const HeadSizes size = head_sizes(hidden, weight, labels, transposed);
  const int64_t* label = labels.data<int64_t>();
  for (int64_t i = 0; i < size.rows; ++i)
    PD_CHECK(label[i] == ignored || (label[i] >= 0 && label[i] < all), "label ", label[i], " is not among the ", all,
             " classes");
  Tensor scores = empty_floats({size.rows, size.classes}, hidden), stats = empty_floats({3, size.rows}, hidden);
  float *s = scores.data<float>(), *found = stats.data<float>();
  gemm({false, transposed, size.rows, size.classes, size.width, 1, hidden.data<float>(), weight.data<float>(), 0, s});
  softmax_cpu({{size.rows, size.classes, first, ignored, label, s}, found, found + size.rows, found + 2 * size.rows});
  return {scores, stats};
}

// The gradients of hidden and weight for the sum of `scale` times the rows' losses, by those exponentials (they are
// written over) and the rows' factors. That of the weight is added to `grad_weight`, or put there where it is the
// first. For one that is not asked for, an empty tensor.
std::vector<Tensor> linear_softmax_gradient(Tensor& exponentials, Tensor& grad_weight, const Tensor& given_hidden,
                                            const Tensor& given_weight, const Tensor& given_labels,
                                            const Tensor& given_factors, bool transposed, float scale, int64_t ignored,
                                            int64_t first, bool is_first, bool for_hidden, bool for_weight) {
  const Tensor hidden = floats(given_hidden, "hidden"), weight = floats(given_weight, "weight"),
               labels = dense(given_labels), factors = floats(given_factors, "factors");
  const HeadSizes size = head_sizes(hidden, weight, labels, transposed);
  PD_CHECK(exponentials.shape() == Shape({size.rows, size.classes}) && factors.numel() == size.rows &&
               (!for_weight || grad_weight.shape() == weight.shape()),
           "exponentials, factors or grad_weight do not fit hidden and weight");
  float *s = exponentials.data<float>(), *grad_w = grad_weight.data<float>();
  const float *h = hidden.data<float>(), *w = weight.data<float>(), kept = is_first ? 0 : 1;
  softmax_gradient_cpu(
      {{size.rows, size.classes, first, ignored, labels.data<int64_t>(), s}, factors.data<float>(), scale});
  Tensor grad_hidden = empty_floats(for_hidden ? hidden.shape() : Shape{0}, hidden);
  if (for_hidden)
    gemm({false, !transposed, size.rows, size.width, size.classes, 1, s, w, 0, grad_hidden.data<float>()});
  if (for_weight && transposed) gemm({true, false, size.classes, size.width, size.rows, 1, s, h, kept, grad_w});
  if (for_weight && !transposed) gemm({true, false, size.width, size.classes, size.rows, 1, h, s, kept, grad_w});
  return {grad_hidden};
}

// ---- fused_adamw ----

void adamw(std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients, std::vector<Tensor>& moments1,
           std::vector<Tensor>& moments2, std::vector<Tensor>& beta1_powers, std::vector<Tensor>& beta2_powers,
           const std::vector<float>& learning_rates, const std::vector<float>& decays, float beta1, float beta2,
           float epsilon) {
  std::vector<AdamWTensor> tensors;
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
  adamw_cpu({int64_t(tensors.size()), tensors.data(), beta1, beta2, epsilon});
  for (Tensor& power : beta1_powers) *power.data<float>() *= beta1;
  for (Tensor& power : beta2_powers) *power.data<float>() *= beta2;
}

}  // namespace
}  // namespace oarlock

PD_BUILD_OP(fused_rotary)
    .Inputs({"q", "k", "cos", "sin", paddle::Optional("positions")})
    .Outputs({"rotated_q", "rotated_k"})
    .SetKernelFn(PD_KERNEL(oarlock::rotary));
PD_BUILD_GRAD_OP(fused_rotary)
    .Inputs({"cos", "sin", paddle::Optional("positions"), paddle::Grad("rotated_q"), paddle::Grad("rotated_k")})
    .Outputs({paddle::Grad("q"), paddle::Grad("k")})
    .SetKernelFn(PD_KERNEL(oarlock::rotary_grad));

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

PD_BUILD_OP(fused_linear_softmax)
    .Inputs({"hidden", "weight", "labels"})
    .Outputs({"exponentials", "stats"})
    .Attrs({"transposed: bool", "ignored: int64_t", "first: int64_t", "all: int64_t"})
    .SetKernelFn(PD_KERNEL(oarlock::linear_softmax));

PD_BUILD_OP(fused_linear_softmax_gradient)
    .Inputs({"exponentials", "grad_weight", "hidden", "weight", "labels", "factors"})
    .Outputs({"gradients", "grad_weight_sum", "grad_hidden"})
    .SetInplaceMap({{"exponentials", "gradients"}, {"grad_weight", "grad_weight_sum"}})
    .Attrs({"transposed: bool", "scale: float", "ignored: int64_t", "first: int64_t", "is_first: bool",
            "for_hidden: bool", "for_weight: bool"})
    .SetKernelFn(PD_KERNEL(oarlock::linear_softmax_gradient));

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
    .SetKernelFn(PD_KERNEL(oarlock::adamw));
