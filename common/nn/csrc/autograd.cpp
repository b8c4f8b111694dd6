#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/autograd.h>

#include "guard.h"
#include "shim.h"

namespace {

// While it lives, backward passes run on the thread that asks for them, those of a GPU's tensors too: closures of the
// caller stay on their thread, and launches on the GPU that is current there.
struct OneThread {
  OneThread() { c10::AutogradState::get_tls_state().set_multithreading_enabled(false); }
  ~OneThread() { c10::AutogradState::get_tls_state().set_multithreading_enabled(before); }

  bool before = c10::AutogradState::get_tls_state().get_multithreading_enabled();
};

}  // namespace

char* aha_autograd_grad(at::Tensor* const* outputs, at::Tensor* const* grad_outputs, size_t num_outputs,
                        at::Tensor* const* inputs, at::Tensor** grads, size_t num_inputs, bool allow_unused) {
  return aha::guarded([&] {
    const OneThread one_thread;
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
