// What bindings need of Paddle's tensors.
#pragma once

#include <string>
#include <vector>

#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/include/api.h"

namespace oarlock {

using Shape = std::vector<int64_t>;

inline std::string shape_text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Dense row-major memory: what the kernels read.
inline paddle::Tensor dense(const paddle::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : tensor.contiguous();
}

// The same, of an operator that is for float32 on the CPU alone.
inline paddle::Tensor floats(const paddle::Tensor& tensor, const char* name) {
  PD_CHECK(tensor.dtype() == paddle::DataType::FLOAT32, name, " has to be float32; got ",
           phi::DataTypeToString(tensor.dtype()));
  return dense(tensor);
}

inline paddle::optional<paddle::Tensor> dense_if_any(const paddle::optional<paddle::Tensor>& tensor) {
  return tensor ? paddle::optional<paddle::Tensor>(dense(*tensor)) : tensor;
}

inline paddle::Tensor empty_floats(const Shape& shape, const paddle::Tensor& like) {
  return paddle::experimental::empty(shape, paddle::DataType::FLOAT32, like.place());
}

}  // namespace oarlock
