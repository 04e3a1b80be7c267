// What the bindings of linear layers share.
#pragma once

#include <cstring>

#include "common/gemm.h"
#include "common/tensors.h"
#include "swiglu/swiglu.h"

namespace oarlock {

inline void copy_floats(const paddle::Tensor& from, paddle::Tensor& to) {
  const int64_t count = from.numel(), piece = 1 << 14;
  const float* source = from.data<float>();
  float* target = to.data<float>();
#pragma omp parallel for schedule(static) if (count > 4 * piece)
  for (int64_t at = 0; at < count; at += piece)
    memcpy(target + at, source + at, (count - at < piece ? count - at : piece) * sizeof(float));
}

// A layer without bias: x [..., in], weight [in, out].
struct Linear {
  int64_t rows, in, out;
  Shape y_shape;
};

inline Linear linear_of(const paddle::Tensor& x, const paddle::Tensor& weight, const char* name) {
  const Shape shape = weight.shape();
  Shape y_shape = x.shape();
  const int64_t in = y_shape.back();
  PD_CHECK(shape.size() == 2 && shape[0] == in, name, " has to be [", in, ", out]; got ", shape_text(shape));
  PD_CHECK(has_gemm(), "this Paddle is without MKL");
  y_shape.back() = shape[1];
  return {in ? x.numel() / in : 0, in, shape[1], y_shape};
}

// x weight, added to `base`, which is like it, where there is one.
inline paddle::Tensor product(const Linear& size, const paddle::Tensor& x, const paddle::Tensor& weight,
                              const paddle::Tensor* base = nullptr) {
  paddle::Tensor y = empty_floats(size.y_shape, x);
  if (base) copy_floats(*base, y);
  gemm({false, false, size.rows, size.out, size.in, 1, x.data<float>(), weight.data<float>(), base ? 1.f : 0.f,
        y.data<float>()});
  return y;
}

// The weight's gradient, x^T grad.
inline paddle::Tensor grad_of_weight(const Linear& size, const float* x, const float* grad,
                                     const paddle::Tensor& weight) {
  paddle::Tensor result = empty_floats(weight.shape(), weight);
  gemm({true, false, size.in, size.out, size.rows, 1, x, grad, 0, result.data<float>()});
  return result;
}

// The input's, grad weight^T, put in place or added to what is there.
inline void grad_of_input(const Linear& size, const float* grad, const paddle::Tensor& weight, bool is_first,
                          float* result) {
  gemm({false, true, size.rows, size.in, size.out, 1, grad, weight.data<float>(), is_first ? 0.f : 1.f, result});
}

inline paddle::Tensor zeros(const paddle::Tensor& like) {
  return paddle::experimental::full(like.shape(), 0, like.dtype(), like.place());
}

inline void check_mlp(const paddle::Tensor& gate, const paddle::Tensor& up) {
  PD_CHECK(up.shape() == gate.shape(), "gate and up have to be of one shape; got ", shape_text(gate.shape()), " and ",
           shape_text(up.shape()));
}

// silu(gates) * ups.
inline paddle::Tensor inner_of(const Linear& wide, const paddle::Tensor& gates, const paddle::Tensor& ups) {
  paddle::Tensor inner = empty_floats(wide.y_shape, gates);
  swiglu_cpu({wide.rows, wide.out, wide.out, gates.data<float>(), ups.data<float>(), inner.data<float>()});
  return inner;
}

}  // namespace oarlock
