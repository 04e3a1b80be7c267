// Products of float matrices, by the BLAS that Paddle has loaded.
#pragma once

#include <cstdint>

namespace oarlock {

// Whether there is one (a Paddle built with MKL).
bool has_gemm();

// C = alpha * op(A) op(B) + beta * C: row-major, op(A) [m, k], op(B) [k, n], C [m, n] without gaps; op transposes what
// lies the other way round in memory.
struct Gemm {
  bool transpose_a, transpose_b;
  int64_t m, n, k;
  float alpha;
  const float *a, *b;
  float beta;
  float* c;
};
void gemm(const Gemm& args);

}  // namespace oarlock
