// Element types of tensors, for kernels that know nothing of Paddle.
#pragma once

#include <cstdint>

namespace oarlock {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Storage only: arithmetic is in float.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace oarlock
