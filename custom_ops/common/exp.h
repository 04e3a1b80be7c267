// exp, for the vectors and single floats of common/vector.h.
#pragma once

#include <cmath>

#include "common/vector.h"

namespace oarlock {
namespace OARLOCK_ISA {

// Relative error below 2e-7; 0 below -87, infinity above 88, NaN stays.
OARLOCK_INLINE Vector exponential(Vector x) {
  const Vector bounded = x > 88.0f ? splat(88.0f) : x;
  // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
  const Vector shifted = bounded * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  // ln 2 in two parts, of which the product of n with the first is exact.
  const Vector r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * (1.0f / 5040) + (1.0f / 720);  // the Taylor series; |r| is at most ln(2) / 2
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vector power = (Vector)(((Bits)shifted << 23) + 0x3f800000);
  const Vector value = x < -87.0f ? Vector{} : p * power;
  return x > 88.0f ? splat(INFINITY) : value;
}
OARLOCK_INLINE float exponential(float x) { return std::exp(x); }

}  // namespace OARLOCK_ISA
}  // namespace oarlock
