// The attention as a Paddle operator. Python's oarlock/ops/attention.py is how it is meant to be called.
#include "attention/attention_cpu.h"
#include "common/tensors.h"

using namespace oarlock;
using paddle::DataType;
using paddle::optional;
using paddle::Tensor;

namespace {

void check(const Tensor& tensor, const char* name, DataType dtype, const Shape& shape) {
  PD_CHECK(tensor.dtype() == dtype, name, " has to be ", phi::DataTypeToString(dtype), "; got ",
           phi::DataTypeToString(tensor.dtype()));
  PD_CHECK(tensor.shape() == shape, name, " has to be ", shape_text(shape), "; got ", shape_text(tensor.shape()));
}

// Sinks are a list of at most one tensor: Paddle's custom operators have no gradients of optional inputs.
optional<Tensor> one_if_any(const std::vector<Tensor>& tensors) {
  PD_CHECK(tensors.size() <= 1, "sinks have to be one tensor; got ", tensors.size());
  return tensors.empty() ? optional<Tensor>() : optional<Tensor>(dense(tensors[0]));
}

// Of dense tensors; what it points to is theirs.
AttentionShape shape_of(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& ends,
                        const optional<Tensor>& bias, const optional<Tensor>& sinks, float scale, bool causal,
                        int64_t window, float soft_cap) {
  const Shape q = query.shape(), k = key.shape(), v = value.shape();
  PD_CHECK(q.size() == 4 && k.size() == 4 && v.size() == 4,
           "query, key and value have to be [batch, tokens, heads, head_dim]; got ", shape_text(q), ", ", shape_text(k),
           " and ", shape_text(v));
  PD_CHECK(k[2] > 0 && q[2] % k[2] == 0, "the query's heads have to be a multiple of the key's; got ", q[2], " and ",
           k[2]);
  check(query, "query", DataType::FLOAT32, q);
  check(key, "key", DataType::FLOAT32, {q[0], k[1], k[2], q[3]});
  check(value, "value", DataType::FLOAT32, {k[0], k[1], k[2], v[3]});
  PD_CHECK(window == 0 || (window > 0 && causal), "a window has to be above 0, and without a bias; got ", window);
  AttentionShape shape{q[0], q[1], k[1], q[2], k[2], q[3], v[3], scale, causal, window, soft_cap};
  if (sinks) {
    check(*sinks, "sinks", DataType::FLOAT32, {q[2]});
    shape.sinks = sinks->data<float>();
  }
  if (ends) {
    check(*ends, "ends", DataType::INT32, {q[0], k[1]});
    shape.ends = ends->data<int32_t>();
  }
  if (bias) {
    const Shape b = bias->shape();
    shape.bias_heads = b.size() == 4 && b[1] == q[2] ? q[2] : 1;
    check(*bias, "bias", DataType::FLOAT32, {q[0], shape.bias_heads, q[1], k[1]});
    shape.bias = bias->data<float>();
  }
  return shape;
}

std::vector<Tensor> forward(const Tensor& given_query, const Tensor& given_key, const Tensor& given_value,
                            const optional<Tensor>& given_ends, const optional<Tensor>& given_bias,
                            const std::vector<Tensor>& given_sinks, float scale, bool causal, int64_t window,
                            float soft_cap) {
  const Tensor query = dense(given_query), key = dense(given_key), value = dense(given_value);
  const optional<Tensor> ends = dense_if_any(given_ends), bias = dense_if_any(given_bias),
                         sinks = one_if_any(given_sinks);
  const AttentionShape shape = shape_of(query, key, value, ends, bias, sinks, scale, causal, window, soft_cap);
  Tensor output = empty_floats({shape.batch, shape.query_length, shape.num_heads, shape.value_dim}, query);
  Tensor log_sum_exp = empty_floats({shape.batch, shape.num_heads, shape.query_length}, query);
  Tensor workspace = empty_floats({attention_cpu_workspace(shape)}, query);
  if (query.numel())
    attention_forward_cpu({shape, query.data<float>(), key.data<float>(), value.data<float>(),
                                    workspace.data<float>(), output.data<float>(), log_sum_exp.data<float>()});
  return {output, log_sum_exp};
}

std::vector<Tensor> backward(const Tensor& given_query, const Tensor& given_key, const Tensor& given_value,
                             const optional<Tensor>& given_ends, const optional<Tensor>& given_bias,
                             const std::vector<Tensor>& given_sinks, const Tensor& output, const Tensor& log_sum_exp,
                             const Tensor& given_grad, float scale, bool causal, int64_t window, float soft_cap) {
  const Tensor query = dense(given_query), key = dense(given_key), value = dense(given_value), grad = dense(given_grad);
  const optional<Tensor> ends = dense_if_any(given_ends), bias = dense_if_any(given_bias),
                         sinks = one_if_any(given_sinks);
  const AttentionShape shape = shape_of(query, key, value, ends, bias, sinks, scale, causal, window, soft_cap);
  check(grad, "the gradient", DataType::FLOAT32, output.shape());
  if (!query.numel() || !key.numel()) {
    const auto zeros = [](const Tensor& like) { return paddle::experimental::full_like(like, 0); };
    std::vector<Tensor> grads{zeros(query), zeros(key), zeros(value)};
    if (sinks) grads.push_back(zeros(*sinks));
    return grads;
  }
  Tensor grad_query = empty_floats(query.shape(), query), grad_key = empty_floats(key.shape(), query),
         grad_value = empty_floats(value.shape(), query);
  std::vector<Tensor> grads{grad_query, grad_key, grad_value};
  if (sinks) grads.push_back(empty_floats(sinks->shape(), query));
  Tensor workspace = empty_floats({attention_cpu_backward_workspace(shape)}, query);
  attention_backward_cpu({shape, query.data<float>(), key.data<float>(), value.data<float>(),
                                   output.data<float>(), log_sum_exp.data<float>(), grad.data<float>(),
                                   workspace.data<float>(), grad_query.data<float>(), grad_key.data<float>(),
                                   grad_value.data<float>(), sinks ? grads[3].data<float>() : nullptr});
  return grads;
}

std::vector<Shape> shapes(const Shape& query, const Shape& key, const Shape& value, const optional<Shape>& ends,
                          const optional<Shape>& bias, const std::vector<Shape>& sinks) {
  return {{query[0], query[1], query[2], value[3]}, {query[0], query[2], query[1]}};
}

std::vector<DataType> types(DataType query, DataType key, DataType value, const optional<DataType>& ends,
                            const optional<DataType>& bias, const std::vector<DataType>& sinks) {
  return {query, DataType::FLOAT32};
}

}  // namespace

PD_BUILD_OP(oarlock_attention)
    .Inputs({"query", "key", "value", paddle::Optional("ends"), paddle::Optional("bias"), paddle::Vec("sinks")})
    .Outputs({"output", "log_sum_exp"})
    .Attrs({"scale: float", "causal: bool", "window: int64_t", "soft_cap: float"})
    .SetKernelFn(PD_KERNEL(forward))
    .SetInferShapeFn(PD_INFER_SHAPE(shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(types));
PD_BUILD_GRAD_OP(oarlock_attention)
    .Inputs({"query", "key", "value", paddle::Optional("ends"), paddle::Optional("bias"), paddle::Vec("sinks"),
             "output", "log_sum_exp", paddle::Grad("output")})
    .Outputs({paddle::Grad("query"), paddle::Grad("key"), paddle::Grad("value"),
              paddle::Grad(paddle::Vec("sinks"))})
    .Attrs({"scale: float", "causal: bool", "window: int64_t", "soft_cap: float"})
    .SetKernelFn(PD_KERNEL(backward));
