// AdamW on the CPU (https://arxiv.org/abs/1711.05101): all parameters in one pass over memory.
#pragma once

#include <cstdint>

namespace oarlock {

// As Paddle's adamw does it: with m and v the moments after this step, and beta1_power, beta2_power the betas to the
// power of the step's number (from 1),
//   parameter -= learning_rate * sqrt(1 - beta2_power) / (1 - beta1_power)
//                * m / (sqrt(v) + epsilon * sqrt(1 - beta2_power))
struct AdamWTensor {
  int64_t count;
  float *parameter, *moment1, *moment2;
  const float* gradient;
  float learning_rate, decay, beta1_power, beta2_power;
};
struct AdamW {
  int64_t num_tensors;
  const AdamWTensor* tensors;
  float beta1, beta2, epsilon;
};

void adamw_cpu(const AdamW& args);

}  // namespace oarlock
