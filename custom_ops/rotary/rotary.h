// Rotary position embedding on the CPU (https://arxiv.org/abs/2104.09864), in the layout that rotates halves of a head.
#pragma once

#include <cstdint>

namespace oarlock {

// y = x * cos + rotate_half(x) * sin, where rotate_half is (-second half, first half) of the last axis.
// `backward` takes the gradient of y for x and gives that of x.
struct Rotary {
  int64_t batch, length, heads, dim;  // dim is even
  const float* x;                     // [batch, length, heads, dim]
  const float *cos, *sin;             // [at least the largest position + 1, dim]
  const int64_t* positions;           // [batch, length]; null: each row counts from 0
  float* y;                           // like x
  bool backward;
};

void rotary_cpu(const Rotary& args);

}  // namespace oarlock
