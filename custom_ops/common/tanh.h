// tanh, for the vectors of common/vector.h.
#pragma once

#include "common/vector.h"

namespace oarlock {
namespace OARLOCK_ISA {

// Relative error below 4e-7 (Eigen's rational approximation); NaN stays.
OARLOCK_INLINE Vector hyperbolic_tangent(Vector x) {
  constexpr float kMost = 7.90531110763549805f;  // from here on it is 1 in float32
  x = x > kMost ? splat(kMost) : x;
  x = x < -kMost ? splat(-kMost) : x;
  const Vector square = x * x;
  Vector p = square * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * square + -8.60467152213735e-11f;
  p = p * square + 5.12229709037114e-08f;
  p = p * square + 1.48572235717979e-05f;
  p = p * square + 6.37261928875436e-04f;
  p = p * square + 4.89352455891786e-03f;
  Vector q = square * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * square + 2.26843463243900e-03f;
  q = q * square + 4.89352518554385e-03f;
  return x * p / q;
}

}  // namespace OARLOCK_ISA
}  // namespace oarlock
