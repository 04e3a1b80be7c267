// SwiGLU on the CPU (https://arxiv.org/abs/2002.05202): y = silu(gate) * up, silu(g) = g / (1 + exp(-g)).
#pragma once

#include <cstdint>

namespace oarlock {

// Rows of gate, up and their gradients begin every `stride` floats (twice cols where both lie in one tensor), those of
// y and its gradient every cols. The backward makes y again where it is asked to; that may be grad_y's own memory.
struct SwiGlu {
  int64_t rows, cols, stride;
  const float *gate, *up;
  float* y;
};
struct SwiGluBackward {
  int64_t rows, cols, stride;
  const float *gate, *up, *grad_y;
  float *grad_gate, *grad_up, *y = nullptr;
};

void swiglu_cpu(const SwiGlu& args);
void swiglu_backward_cpu(const SwiGluBackward& args);

}  // namespace oarlock
