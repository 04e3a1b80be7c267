// The norms as Paddle operators: fused_rms_norm, fused_ln, fused_add_rms_norm. Python's oarlock/ops/norms.py is how
// they are meant to be called.
#include "rms_norm/rms_norm_paddle.h"

#include "rms_norm/rms_norm_cpu.h"
#if defined(PADDLE_WITH_CUDA)
#include "rms_norm/rms_norm_cuda.h"
#endif

using paddle::DataType;
using paddle::Tensor;

namespace oarlock {
namespace {

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.dtype()) {
    case DataType::FLOAT32: return DType::kFloat32;
    case DataType::FLOAT16: return DType::kFloat16;
    case DataType::BFLOAT16: return DType::kBFloat16;
    default: PD_THROW(name, " has to be float32, float16 or bfloat16; got ", phi::DataTypeToString(tensor.dtype()));
  }
}

std::string describe(const Tensor& tensor) {
  return phi::DataTypeToString(tensor.dtype()) + " " + shape_text(tensor.shape());
}

std::string place_text(const Tensor& tensor) { return tensor.place().DebugString(); }

void check_place(const Tensor& tensor, const Tensor& x) {
  PD_CHECK(tensor.place() == x.place(), "all tensors have to be on one device; got ", place_text(x), " and ",
           place_text(tensor));
}

#if defined(PADDLE_WITH_CUDA)
void check_cuda(int code) { PD_CHECK(code == 0, "CUDA: ", norm_cuda_error(code)); }
#endif

void check_cpu(const Tensor& x) {
  PD_CHECK(x.is_cpu(), "this operator was built for the CPU alone, x is on ", place_text(x));
}

void run(const Tensor& x, const NormForward& args) {
#if defined(PADDLE_WITH_CUDA)
  if (x.is_gpu()) return check_cuda(norm_forward_cuda(args, x.stream()));
#endif
  check_cpu(x);
  norm_forward_cpu(args);
}

void run(const Tensor& x, const NormBackward& args) {
#if defined(PADDLE_WITH_CUDA)
  if (x.is_gpu()) return check_cuda(norm_backward_cuda(args, x.stream()));
#endif
  check_cpu(x);
  norm_backward_cpu(args);
}

int64_t workspace_size(const Tensor& x, int64_t rows, int64_t cols, bool with_bias) {
#if defined(PADDLE_WITH_CUDA)
  if (x.is_gpu()) return norm_cuda_workspace(rows, cols, with_bias);
#endif
  return norm_cpu_workspace(rows, cols, with_bias);
}

void check_vector(const Tensor& vector, const Tensor& x, const char* name) {
  PD_CHECK(vector.shape() == Shape{x.shape().back()}, name, " has to be of x's last axis, [", x.shape().back(),
           "]; got ", shape_text(vector.shape()));
  check_place(vector, x);
}

struct Sizes {
  int64_t rows, cols;
  Shape per_row;  // x's shape without the last axis
};

Sizes sizes_of(const Tensor& x) {
  Shape shape = x.shape();
  PD_CHECK(!shape.empty() && shape.back() > 0, "x needs a last axis to normalise; got the shape ", shape_text(shape));
  const int64_t cols = shape.back();
  shape.pop_back();
  return {x.numel() / cols, cols, shape};
}

Tensor empty(const Shape& shape, DataType dtype, const Tensor& like) {
  return paddle::experimental::empty(shape, dtype, like.place());
}

}  // namespace

NormOutputs norm_forward(const Tensor& given, const Tensor* given_residual, const Tensor& scale, const Tensor* bias,
                         float epsilon) {
  const Sizes sizes = sizes_of(given);
  check_vector(scale, given, "scale");
  const Tensor x = dense(given), weight = dense(scale), residual = given_residual ? dense(*given_residual) : Tensor(),
               shift = bias ? dense(*bias) : Tensor();
  NormForward args{sizes.rows, sizes.cols, epsilon, dtype_of(x, "x"), dtype_of(weight, "scale")};
  NormOutputs out;
  out.y = empty(x.shape(), weight.dtype(), x);
  out.invvar = empty(sizes.per_row, DataType::FLOAT32, x);
  args.x = x.data();
  args.scale = weight.data();
  args.y = out.y.data();
  args.invvar = out.invvar.data<float>();
  if (bias) {
    check_vector(shift, x, "bias");
    PD_CHECK(shift.dtype() == weight.dtype(), "bias has to be of scale's type");
    out.mean = empty(sizes.per_row, DataType::FLOAT32, x);
    args.bias = shift.data();
    args.mean = out.mean.data<float>();
  }
  if (given_residual) {
    PD_CHECK(residual.shape() == x.shape() && residual.dtype() == x.dtype(), "residual has to be like x; got ",
             describe(residual), " beside ", describe(x));
    check_place(residual, x);
    out.sum = empty(x.shape(), x.dtype(), x);
    args.residual = residual.data();
    args.sum = out.sum.data();
  }
  if (sizes.rows) run(x, args);
  return out;
}

NormGradients norm_backward(const Tensor& given, const Tensor& scale, const Tensor* mean, const Tensor& invvar,
                            const Tensor& given_grad, const Tensor* given_grad_sum, bool with_residual) {
  const Sizes sizes = sizes_of(given);
  const Tensor h = dense(given), weight = dense(scale);
  // Paddle leaves the gradient of an output that was not used undefined.
  const bool has_grad_sum = given_grad_sum && given_grad_sum->defined();
  const Tensor grad_sum = has_grad_sum ? dense(*given_grad_sum) : Tensor();
  const Tensor grad_y =
      given_grad.defined() ? dense(given_grad) : paddle::experimental::full(h.shape(), 0, weight.dtype(), h.place());
  PD_CHECK(grad_y.dtype() == weight.dtype() && grad_y.shape() == h.shape(), "the gradient has to be like y");
  NormBackward args{sizes.rows, sizes.cols, dtype_of(h, "x"), dtype_of(weight, "scale")};
  NormGradients out;
  out.x = empty(h.shape(), h.dtype(), h);
  out.scale = empty(weight.shape(), weight.dtype(), h);
  Tensor workspace = empty({workspace_size(h, sizes.rows, sizes.cols, mean)}, DataType::FLOAT32, h);
  args.h = h.data();
  args.scale = weight.data();
  args.grad_y = grad_y.data();
  args.invvar = invvar.data<float>();
  args.grad_x = out.x.data();
  args.grad_scale = out.scale.data();
  args.workspace = workspace.data<float>();
  if (mean) {
    out.bias = empty(weight.shape(), weight.dtype(), h);
    args.mean = mean->data<float>();
    args.grad_bias = out.bias.data();
  }
  args.grad_sum = has_grad_sum ? grad_sum.data() : nullptr;
  if (with_residual) {
    out.residual = empty(h.shape(), h.dtype(), h);
    args.grad_residual = out.residual.data();
  }
  run(h, args);
  return out;
}

namespace {

Shape without_last(Shape shape) {
  if (!shape.empty()) shape.pop_back();
  return shape;
}

// ---- fused_rms_norm ----

std::vector<Tensor> rms_norm(const Tensor& x, const Tensor& scale, float epsilon) {
  NormOutputs out = norm_forward(x, nullptr, scale, nullptr, epsilon);
  return {out.y, out.invvar};
}

std::vector<Tensor> rms_norm_grad(const Tensor& x, const Tensor& scale, const Tensor& invvar, const Tensor& grad_y) {
  NormGradients out = norm_backward(x, scale, nullptr, invvar, grad_y, nullptr, false);
  return {out.x, out.scale};
}

std::vector<Shape> rms_norm_shapes(const Shape& x, const Shape& scale, float epsilon) { return {x, without_last(x)}; }

std::vector<DataType> rms_norm_types(DataType x, DataType scale) { return {scale, DataType::FLOAT32}; }

// ---- fused_ln ----

std::vector<Tensor> layer_norm(const Tensor& x, const Tensor& scale, const Tensor& bias, float epsilon) {
  NormOutputs out = norm_forward(x, nullptr, scale, &bias, epsilon);
  return {out.y, out.mean, out.invvar};
}

std::vector<Tensor> layer_norm_grad(const Tensor& x, const Tensor& scale, const Tensor& mean, const Tensor& invvar,
                                    const Tensor& grad_y) {
  NormGradients out = norm_backward(x, scale, &mean, invvar, grad_y, nullptr, false);
  return {out.x, out.scale, out.bias};
}

std::vector<Shape> layer_norm_shapes(const Shape& x, const Shape& scale, const Shape& bias, float epsilon) {
  return {x, without_last(x), without_last(x)};
}

std::vector<DataType> layer_norm_types(DataType x, DataType scale, DataType bias) {
  return {scale, DataType::FLOAT32, DataType::FLOAT32};
}

// ---- fused_rms_norm_kept: x goes on beside its norm, for one gradient of both ----

std::vector<Tensor> rms_norm_kept(const Tensor& x, const Tensor& scale, float epsilon) {
  NormOutputs out = norm_forward(x, nullptr, scale, nullptr, epsilon);
  return {out.y, x, out.invvar};  // a second name of x's memory
}

std::vector<Tensor> rms_norm_kept_grad(const Tensor& x, const Tensor& scale, const Tensor& invvar, const Tensor& grad_y,
                                       const Tensor& grad_kept) {
  NormGradients out = norm_backward(x, scale, nullptr, invvar, grad_y, &grad_kept, false);
  return {out.x, out.scale};
}

// ---- fused_add_rms_norm ----

std::vector<Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& scale, float epsilon) {
  NormOutputs out = norm_forward(x, &residual, scale, nullptr, epsilon);
  return {out.y, out.sum, out.invvar};
}

std::vector<Tensor> add_rms_norm_grad(const Tensor& scale, const Tensor& sum, const Tensor& invvar,
                                      const Tensor& grad_y, const Tensor& grad_sum) {
  NormGradients out = norm_backward(sum, scale, nullptr, invvar, grad_y, &grad_sum, true);
  return {out.x, out.residual, out.scale};
}

std::vector<Shape> add_rms_norm_shapes(const Shape& x, const Shape& residual, const Shape& scale, float epsilon) {
  return {x, x, without_last(x)};
}

std::vector<DataType> add_rms_norm_types(DataType x, DataType residual, DataType scale) {
  return {scale, x, DataType::FLOAT32};
}

}  // namespace
}  // namespace oarlock

PD_BUILD_OP(fused_rms_norm)
    .Inputs({"x", "scale"})
    .Outputs({"y", "invvar"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(oarlock::rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(oarlock::rms_norm_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(oarlock::rms_norm_types));
PD_BUILD_GRAD_OP(fused_rms_norm)
    .Inputs({"x", "scale", "invvar", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("scale")})
    .SetKernelFn(PD_KERNEL(oarlock::rms_norm_grad));

PD_BUILD_OP(fused_ln)
    .Inputs({"x", "scale", "bias"})
    .Outputs({"y", "mean", "invvar"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(oarlock::layer_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(oarlock::layer_norm_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(oarlock::layer_norm_types));
PD_BUILD_GRAD_OP(fused_ln)
    .Inputs({"x", "scale", "mean", "invvar", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("scale"), paddle::Grad("bias")})
    .SetKernelFn(PD_KERNEL(oarlock::layer_norm_grad));

PD_BUILD_OP(fused_rms_norm_kept)
    .Inputs({"x", "scale"})
    .Outputs({"y", "kept", "invvar"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(oarlock::rms_norm_kept));
PD_BUILD_GRAD_OP(fused_rms_norm_kept)
    .Inputs({"x", "scale", "invvar", paddle::Grad("y"), paddle::Grad("kept")})
    .Outputs({paddle::Grad("x"), paddle::Grad("scale")})
    .SetKernelFn(PD_KERNEL(oarlock::rms_norm_kept_grad));

PD_BUILD_OP(fused_add_rms_norm)
    .Inputs({"x", "residual", "scale"})
    .Outputs({"y", "sum", "invvar"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(oarlock::add_rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(oarlock::add_rms_norm_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(oarlock::add_rms_norm_types));
PD_BUILD_GRAD_OP(fused_add_rms_norm)
    .Inputs({"scale", "sum", "invvar", paddle::Grad("y"), paddle::Grad("sum")})
    .Outputs({paddle::Grad("x"), paddle::Grad("residual"), paddle::Grad("scale")})
    .SetKernelFn(PD_KERNEL(oarlock::add_rms_norm_grad));
