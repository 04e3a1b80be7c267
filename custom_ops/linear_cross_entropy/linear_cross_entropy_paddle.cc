// The two halves of the linear cross entropy as Paddle operators, float32 on the CPU: logits to exponentials, and
// exponentials to gradients. oarlock/ops/linear_cross_entropy.py puts them together.
#include "common/gemm.h"
#include "common/tensors.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

using paddle::Tensor;

namespace oarlock {
namespace {

struct HeadSizes {
  int64_t rows, width, classes;
};

HeadSizes head_sizes(const Tensor& hidden, const Tensor& weight, const Tensor& labels, bool transposed) {
  const Shape shape = weight.shape();
  const int64_t width = hidden.shape().back(), rows = hidden.numel() / width;
  PD_CHECK(shape.size() == 2 && shape[transposed] == width, "weight has to be [", transposed ? "classes, " : "", width,
           transposed ? "]" : ", classes]", "; got ", shape_text(shape));
  PD_CHECK(labels.numel() == rows && labels.dtype() == paddle::DataType::INT64,
           "labels have to be int64, one for each of the ", rows, " rows of hidden; got ", shape_text(labels.shape()));
  PD_CHECK(has_gemm(), "this Paddle is without MKL");
  return {rows, width, shape[!transposed]};
}

// exp(logit - the row's largest) of the weight's classes, `first` and later ones of `all`; and of each row the largest
// logit, the sum of the exponentials, and the logit at the label (-infinity where it is another rank's).
std::vector<Tensor> linear_softmax(const Tensor& given_hidden, const Tensor& given_weight, const Tensor& given_labels,
                                   bool transposed, int64_t ignored, int64_t first, int64_t all) {
  const Tensor hidden = floats(given_hidden, "hidden"), weight = floats(given_weight, "weight"),
               labels = dense(given_labels);
  const HeadSizes size = head_sizes(hidden, weight, labels, transposed);
  const int64_t* label = labels.data<int64_t>();
  for (int64_t i = 0; i < size.rows; ++i)
    PD_CHECK(label[i] == ignored || (label[i] >= 0 && label[i] < all), "label ", label[i], " is not among the ", all,
             " classes");
  Tensor logits = empty_floats({size.rows, size.classes}, hidden), stats = empty_floats({3, size.rows}, hidden);
  float *s = logits.data<float>(), *found = stats.data<float>();
  gemm({false, transposed, size.rows, size.classes, size.width, 1, hidden.data<float>(), weight.data<float>(), 0, s});
  softmax_cpu({{size.rows, size.classes, first, ignored, label, s}, found, found + size.rows, found + 2 * size.rows});
  return {logits, stats};
}

// The gradients of hidden and weight for the sum of `scale` times the rows' losses, by those exponentials (they are
// written over) and the rows' factors. That of the weight is added to `grad_weight`, or put there where it is the
// first. For one that is not asked for, an empty tensor.
std::vector<Tensor> linear_softmax_gradient(Tensor& exponentials, Tensor& grad_weight, const Tensor& given_hidden,
                                            const Tensor& given_weight, const Tensor& given_labels,
                                            const Tensor& given_factors, bool transposed, float scale, int64_t ignored,
                                            int64_t first, bool is_first, bool for_hidden, bool for_weight) {
  const Tensor hidden = floats(given_hidden, "hidden"), weight = floats(given_weight, "weight"),
               labels = dense(given_labels), factors = floats(given_factors, "factors");
  const HeadSizes size = head_sizes(hidden, weight, labels, transposed);
  PD_CHECK(exponentials.shape() == Shape({size.rows, size.classes}) && factors.numel() == size.rows &&
               (!for_weight || grad_weight.shape() == weight.shape()),
           "exponentials, factors or grad_weight do not fit hidden and weight");
  float *s = exponentials.data<float>(), *grad_w = grad_weight.data<float>();
  const float *h = hidden.data<float>(), *w = weight.data<float>(), kept = is_first ? 0 : 1;
  softmax_gradient_cpu(
      {{size.rows, size.classes, first, ignored, labels.data<int64_t>(), s}, factors.data<float>(), scale});
  Tensor grad_hidden = empty_floats(for_hidden ? hidden.shape() : Shape{0}, hidden);
  if (for_hidden)
    gemm({false, !transposed, size.rows, size.width, size.classes, 1, s, w, 0, grad_hidden.data<float>()});
  if (for_weight && transposed) gemm({true, false, size.classes, size.width, size.rows, 1, s, h, kept, grad_w});
  if (for_weight && !transposed) gemm({true, false, size.width, size.classes, size.rows, 1, h, s, kept, grad_w});
  return {grad_hidden};
}

}  // namespace
}  // namespace oarlock

PD_BUILD_OP(fused_linear_softmax)
    .Inputs({"hidden", "weight", "labels"})
    .Outputs({"exponentials", "stats"})
    .Attrs({"transposed: bool", "ignored: int64_t", "first: int64_t", "all: int64_t"})
    .SetKernelFn(PD_KERNEL(oarlock::linear_softmax));

PD_BUILD_OP(fused_linear_softmax_gradient)
    .Inputs({"exponentials", "grad_weight", "hidden", "weight", "labels", "factors"})
    .Outputs({"gradients", "grad_weight_sum", "grad_hidden"})
    .SetInplaceMap({{"exponentials", "gradients"}, {"grad_weight", "grad_weight_sum"}})
    .Attrs({"transposed: bool", "scale: float", "ignored: int64_t", "first: int64_t", "is_first: bool",
            "for_hidden: bool", "for_weight: bool"})
    .SetKernelFn(PD_KERNEL(oarlock::linear_softmax_gradient));
