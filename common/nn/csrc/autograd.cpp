#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/autograd.h>

#include "guard.h"
#include "shim.h"

namespace {

// While it lives, libtorch runs the graph of every device on this thread: closures of Rust code stay where they were made.
struct OnThisThread {
  OnThisThread() { state.set_multithreading_enabled(false); }
  ~OnThisThread() { state.set_multithreading_enabled(before); }

  c10::AutogradState& state = c10::AutogradState::get_tls_state();
  const bool before = state.get_multithreading_enabled();
};

}  // namespace

char* aha_autograd_grad(at::Tensor* const* outputs, at::Tensor* const* grad_outputs, size_t num_outputs,
                        at::Tensor* const* inputs, at::Tensor** grads, size_t num_inputs, bool allow_unused) {
  return aha::guarded([&] {
    const OnThisThread on_this_thread;
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
