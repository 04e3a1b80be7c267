// A decoder layer's two ends around its attention as Paddle operators, float32 on the CPU: from the layer's input to
// query, key and value, and from the attention's output to the layer's. Python's oarlock/ops is how they are meant to
// be called.
#include "rms_norm/rms_norm_cpu.h"
#include "training_step/linear.h"

using oarlock::dense;
using oarlock::DType;
using oarlock::empty_floats;
using oarlock::floats;
using oarlock::Linear;
using oarlock::Shape;
using oarlock::shape_text;
using paddle::Tensor;

namespace {

struct Normed {
  Tensor y, invvar;
};

Normed rms_norm(const Tensor& x, const Tensor& given_scale, float epsilon) {
  const Tensor scale = floats(given_scale, "scale");
  const int64_t cols = x.shape().back(), rows = cols ? x.numel() / cols : 0;
  PD_CHECK(scale.shape() == Shape{cols}, "scale has to be [", cols, "]; got ", shape_text(scale.shape()));
  Normed result = {empty_floats(x.shape(), x), empty_floats({rows}, x)};
  oarlock::NormForward args{rows, cols, epsilon, DType::kFloat32, DType::kFloat32};
  args.x = x.data();
  args.scale = scale.data();
  args.y = result.y.data();
  args.invvar = result.invvar.data<float>();
  if (rows) oarlock::norm_forward_cpu(args);
  return result;
}

// The gradients of x, which went into other things beside the norm (grad_beside, where it is defined), and of scale.
std::vector<Tensor> rms_norm_grad(const Tensor& x, const Tensor& given_scale, const Tensor& invvar,
                                  const Tensor& grad_y, const Tensor& grad_beside) {
  const Tensor scale = dense(given_scale);
  const int64_t cols = x.shape().back(), rows = cols ? x.numel() / cols : 0;
  Tensor grad_x = empty_floats(x.shape(), x), grad_scale = empty_floats(scale.shape(), x),
         workspace = empty_floats({oarlock::norm_cpu_workspace(rows, cols, false)}, x);
  oarlock::NormBackward args{rows, cols, DType::kFloat32, DType::kFloat32};
  args.h = x.data();
  args.scale = scale.data();
  args.grad_y = grad_y.data();
  args.grad_sum = grad_beside.defined() ? grad_beside.data() : nullptr;
  args.invvar = invvar.data<float>();
  args.grad_x = grad_x.data();
  args.grad_scale = grad_scale.data();
  args.workspace = workspace.data<float>();
  oarlock::norm_backward_cpu(args);
  return {grad_x, grad_scale};
}

// ---- fused_layer_start ----

// Query, key and value of the normed x; x for its other use, which is its own memory; the normed x and 1/rms.
std::vector<Tensor> layer_start(const Tensor& given, const Tensor& scale, const Tensor& q, const Tensor& k,
                                const Tensor& v, float epsilon) {
  const Tensor x = floats(given, "x");
  const Normed normed = rms_norm(x, scale, epsilon);
  std::vector<Tensor> results = oarlock::projections(normed.y, q, k, v);
  results.insert(results.end(), {x, normed.y, normed.invvar});
  return results;
}

std::vector<Tensor> layer_start_grad(const Tensor& given, const Tensor& scale, const Tensor& q, const Tensor& k,
                                     const Tensor& v, const Tensor& normed, const Tensor& invvar, const Tensor& grad_q,
                                     const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_kept) {
  const auto of_linear = oarlock::projections_grad(normed, q, k, v, grad_q, grad_k, grad_v);
  const Tensor beside = grad_kept.defined() ? floats(grad_kept, "the gradient") : grad_kept;
  const auto of_norm = rms_norm_grad(dense(given), scale, invvar, of_linear[0], beside);
  return {of_norm[0], of_norm[1], of_linear[1], of_linear[2], of_linear[3]};
}

// ---- fused_layer_end ----

// total = kept + attended output; y = total + mlp(the normed total); and what the backward needs.
std::vector<Tensor> layer_end(const Tensor& given, const Tensor& given_kept, const Tensor& given_output,
                              const Tensor& scale, const Tensor& gate, const Tensor& up, const Tensor& down,
                              float epsilon) {
  const Tensor attended = floats(given, "attended"), kept = floats(given_kept, "kept"),
               output = floats(given_output, "output");
  const Linear size = oarlock::linear_of(attended, output, "output");
  PD_CHECK(kept.shape() == size.y_shape && down.shape().back() == size.out, "kept has to be ",
           shape_text(size.y_shape), ", as the layer's output; got ", shape_text(kept.shape()), " and down ",
           shape_text(down.shape()));
  const Tensor total = oarlock::product(size, attended, output, &kept);
  const Normed normed = rms_norm(total, scale, epsilon);
  const auto made = oarlock::mlp_onto(&total, normed.y, gate, up, down);
  return {made[0], total, normed.y, normed.invvar, made[1], made[2]};
}

std::vector<Tensor> layer_end_grad(const Tensor& given, const Tensor& given_output, const Tensor& scale,
                                   const Tensor& gate, const Tensor& up, const Tensor& down, const Tensor& total,
                                   const Tensor& normed, const Tensor& invvar, const Tensor& gates, const Tensor& ups,
                                   const Tensor& given_grad) {
  const Tensor attended = dense(given), output = dense(given_output), grad = floats(given_grad, "the gradient");
  const auto of_mlp = oarlock::mlp_grad(normed, gate, up, down, gates, ups, grad);
  const auto of_norm = rms_norm_grad(total, scale, invvar, of_mlp[0], grad);
  const float* of_total = of_norm[0].data<float>();
  const Linear size = oarlock::linear_of(attended, output, "output");
  Tensor grad_attended = empty_floats(attended.shape(), attended);
  oarlock::grad_of_input(size, of_total, output, true, grad_attended.data<float>());
  const Tensor grad_output = oarlock::grad_of_weight(size, attended.data<float>(), of_total, output);
  return {grad_attended, of_norm[0], grad_output, of_norm[1], of_mlp[1], of_mlp[2], of_mlp[3]};
}

}  // namespace

PD_BUILD_OP(fused_layer_start)
    .Inputs({"x", "scale", "query", "key", "value"})
    .Outputs({"queries", "keys", "values", "kept", "normed", "invvar"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(layer_start));
PD_BUILD_GRAD_OP(fused_layer_start)
    .Inputs({"x", "scale", "query", "key", "value", "normed", "invvar", paddle::Grad("queries"), paddle::Grad("keys"),
             paddle::Grad("values"), paddle::Grad("kept")})
    .Outputs({paddle::Grad("x"), paddle::Grad("scale"), paddle::Grad("query"), paddle::Grad("key"),
              paddle::Grad("value")})
    .SetKernelFn(PD_KERNEL(layer_start_grad));

PD_BUILD_OP(fused_layer_end)
    .Inputs({"attended", "kept", "output", "scale", "gate", "up", "down"})
    .Outputs({"y", "total", "normed", "invvar", "gates", "ups"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(layer_end));
PD_BUILD_GRAD_OP(fused_layer_end)
    .Inputs({"attended", "output", "scale", "gate", "up", "down", "total", "normed", "invvar", "gates", "ups",
             paddle::Grad("y")})
    .Outputs({paddle::Grad("attended"), paddle::Grad("kept"), paddle::Grad("output"), paddle::Grad("scale"),
              paddle::Grad("gate"), paddle::Grad("up"), paddle::Grad("down")})
    .SetKernelFn(PD_KERNEL(layer_end_grad));
