// fused_adamw as a Paddle operator, float32 on the CPU. Called by oarlock/ops/adamw.py.
#include "adamw/adamw.h"
#include "common/tensors.h"

using paddle::Tensor;

namespace oarlock {
namespace {

void adamw(std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients, std::vector<Tensor>& moments1,
           std::vector<Tensor>& moments2, std::vector<Tensor>& beta1_powers, std::vector<Tensor>& beta2_powers,
           const std::vector<float>& learning_rates, const std::vector<float>& decays, float beta1, float beta2,
           float epsilon) {
  std::vector<AdamWTensor> tensors;
  std::vector<Tensor> kept;  // a gradient without gaps may be a copy
  for (size_t i = 0; i < parameters.size(); ++i) {
    for (const Tensor* tensor : {&parameters[i], &moments1[i], &moments2[i]})
      PD_CHECK(tensor->is_contiguous(), "parameters and moments have to be without gaps");
    const Tensor gradient = floats(gradients[i], "the gradient");
    PD_CHECK(gradient.numel() == parameters[i].numel(), "a gradient is not like its parameter");
    kept.push_back(gradient);
    tensors.push_back({gradient.numel(), parameters[i].data<float>(), moments1[i].data<float>(),
                       moments2[i].data<float>(), gradient.data<float>(), learning_rates[i], decays[i],
                       *beta1_powers[i].data<float>(), *beta2_powers[i].data<float>()});
  }
  adamw_cpu({int64_t(tensors.size()), tensors.data(), beta1, beta2, epsilon});
  for (Tensor& power : beta1_powers) *power.data<float>() *= beta1;
  for (Tensor& power : beta2_powers) *power.data<float>() *= beta2;
}

}  // namespace
}  // namespace oarlock

PD_BUILD_OP(fused_adamw)
    .Inputs({paddle::Vec("parameters"), paddle::Vec("gradients"), paddle::Vec("moments1"), paddle::Vec("moments2"),
             paddle::Vec("beta1_powers"), paddle::Vec("beta2_powers")})
    .Outputs({paddle::Vec("new_parameters"), paddle::Vec("new_moments1"), paddle::Vec("new_moments2"),
              paddle::Vec("new_beta1_powers"), paddle::Vec("new_beta2_powers")})
    .SetInplaceMap({{paddle::Vec("parameters"), paddle::Vec("new_parameters")},
                    {paddle::Vec("moments1"), paddle::Vec("new_moments1")},
                    {paddle::Vec("moments2"), paddle::Vec("new_moments2")},
                    {paddle::Vec("beta1_powers"), paddle::Vec("new_beta1_powers")},
                    {paddle::Vec("beta2_powers"), paddle::Vec("new_beta2_powers")}})
    .Attrs({"learning_rates: std::vector<float>", "decays: std::vector<float>", "beta1: float", "beta2: float",
            "epsilon: float"})
    .SetKernelFn(PD_KERNEL(oarlock::adamw));
