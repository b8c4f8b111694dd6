#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>

#include "guard.h"
#include "shim.h"

char* aha_fused_adamw(at::Tensor* param, at::Tensor* grad, at::Tensor* exp_avg, at::Tensor* exp_avg_sq, double step,
                      const AhaAdamW* options) {
  return aha::guarded([&] {
    at::NoGradGuard no_grad;
    const auto step_tensor = at::full({}, step, param->options());
    at::_fused_adamw_({*param}, {*grad}, {*exp_avg}, {*exp_avg_sq}, /*max_exp_avg_sqs=*/{}, {step_tensor},
                      options->learning_rate, options->beta1, options->beta2, options->weight_decay, options->epsilon,
                      /*amsgrad=*/false, /*maximize=*/false);
  });
}
