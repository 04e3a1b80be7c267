// Softmax cross entropy over rows of logits on the CPU, in two passes between which ranks that have parts of the
// classes can tell each other what they found. What is computed is written over the logits.
#pragma once

#include <cstdint>

namespace oarlock {

// The logits of classes `first` to before first + classes.
struct ClassLogits {
  int64_t rows, classes, first, ignored;
  const int64_t* labels;  // [rows], of all classes; `ignored` where there is no loss
  float* logits;          // [rows, classes]
};

// Logits become exp(score - largest). Where the label is `ignored` they stay.
struct Softmax : ClassLogits {
  float *largest, *sums, *at_label;  // [rows] each; at_label is -infinity for another's label
};
void softmax_cpu(const Softmax& args);

// Those exponentials become factor * exponential, less `scale` at the label; 0 where the label is `ignored`.
struct SoftmaxGradient : ClassLogits {
  const float* factors;  // [rows]: scale / sum over all classes, as far as these exponentials are from the whole's
  float scale;
};
void softmax_gradient_cpu(const SoftmaxGradient& args);

}  // namespace oarlock
