#include <torch/csrc/autograd/autograd.h>

#include "guard.h"
#include "shim.h"

char* aha_autograd_grad(at::Tensor* const* outputs, at::Tensor* const* grad_outputs, size_t num_outputs,
                        at::Tensor* const* inputs, at::Tensor** grads, size_t num_inputs, bool allow_unused) {
  return aha::guarded([&] {
    torch::autograd::variable_list output_list, grad_output_list, input_list;
    for (size_t i = 0; i < num_outputs; ++i) {
      output_list.push_back(*outputs[i]);
      grad_output_list.push_back(grad_outputs[i] != nullptr ? *grad_outputs[i] : at::Tensor());
    }
    for (size_t i = 0; i < num_inputs; ++i) {
      input_list.push_back(*inputs[i]);
    }
    auto result = torch::autograd::grad(output_list, input_list, grad_output_list, /*retain_graph=*/false,
                                        /*create_graph=*/false, allow_unused);
    for (size_t i = 0; i < num_inputs; ++i) {
      grads[i] = result[i].defined() ? new at::Tensor(std::move(result[i])) : nullptr;
    }
  });
}
