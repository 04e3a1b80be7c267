// Softmax cross entropy over rows of scores on the CPU, in two passes between which ranks that have parts of the
// classes can tell each other what they found. What is computed is written over the scores.
#pragma once

#include <cstdint>

namespace oarlock {

// The scores of classes `first` to before first + classes.
struct ClassScores {
  int64_t rows, classes, first, ignored;
  const int64_t* labels;  // [rows], of all classes; `ignored` where there is no loss
  float* scores;          // [rows, classes]
};

// Scores become exp(score - largest). Where the label is `ignored` they stay.
struct Softmax : ClassScores {
  float *largest, *sums, *at_label;  // [rows] each; at_label is -infinity for another's label
};
void softmax_cpu(const Softmax& args);

// Those exponentials become factor * exponential, less `scale` at the label; 0 where the label is `ignored`.
struct SoftmaxGradient : ClassScores {
  const float* factors;  // [rows]: scale / sum over all classes, as far as these exponentials are from the whole's
  float scale;
};
void softmax_gradient_cpu(const SoftmaxGradient& args);

}  // namespace oarlock
