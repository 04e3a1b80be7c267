// fused_rotary as a Paddle operator with its gradient, float32 on the CPU. Called by oarlock/ops/rotary.py.
#include "common/tensors.h"
#include "rotary/rotary.h"

using paddle::Tensor;
using MaybeTensor = paddle::optional<Tensor>;

namespace oarlock {
namespace {

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
