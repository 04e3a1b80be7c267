// Softmax cross entropy over rows of scores on the CPU, its gradient written over the scores.
#pragma once

#include <cstdint>

namespace oarlock {

// losses[row] = log(sum(exp(scores))) - scores[label]; scores become their gradient for a loss of scale * sum(losses):
// scale * (softmax(scores) - one at the label). A row whose label is `ignored` has loss and gradient 0.
struct CrossEntropy {
  int64_t rows, classes, ignored;
  const int64_t* labels;  // [rows], within the classes
  float scale;
  float* scores;  // [rows, classes]
  float* losses;  // [rows]
  bool with_gradient;  // else scores are left in an undefined state
};

void cross_entropy_cpu(const CrossEntropy& args);

}  // namespace oarlock
