// Functions with a backward pass of our own, and what they are made of.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <cstdlib>
#include <optional>
#include <string_view>
#include <vector>

#include "guard.h"
#include "shim.h"

// oneDNN's product of two matrices in any layout, `result = beta * result + alpha * mat1 mat2`. libtorch exports it and
// has no header for it; null where it was built without oneDNN.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta,
                                         float alpha);
}

namespace {

// A node of libtorch's graph whose backward pass is a closure of the caller.
struct ClosureNode : torch::autograd::Node {
  explicit ClosureNode(AhaBackward backward) : backward(backward) {}
  ~ClosureNode() override { release_variables(); }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    TORCH_CHECK(backward.closure != nullptr, "the graph is already freed");
    std::vector<const at::Tensor*> in;
    for (const auto& grad : grads) {
      in.push_back(grad.defined() ? &grad : nullptr);
    }
    std::vector<at::Tensor*> out(num_outputs(), nullptr);
    backward.call(std::exchange(backward.closure, nullptr), in.data(), in.size(), out.data(), out.size());
    grads.clear();
    torch::autograd::variable_list result;
    for (at::Tensor* grad : out) {
      result.push_back(grad != nullptr ? std::move(*grad) : at::Tensor());
      delete grad;
    }
    return result;
  }

  void release_variables() override {
    if (void* closure = std::exchange(backward.closure, nullptr)) {
      backward.drop(closure);
    }
  }

  std::string name() const override { return "AhaClosure"; }

  AhaBackward backward;
};

using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                          c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
using LinearBinary = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, std::string_view);

// None where libtorch was built without oneDNN.
template <typename Signature>
std::optional<c10::TypedOperatorHandle<Signature>> find(const char* overload) {
  const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", overload});
  if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) {
    return std::nullopt;
  }
  return op->typed<Signature>();
}

// Whether oneDNN multiplies fp32 on this processor.
bool onednn_multiplies() {
  static const bool it_does = [] {
    if (at::native::mkldnn_matmul == nullptr) {
      return false;
    }
    try {
      const auto one = at::ones({2, 2});
      at::native::mkldnn_matmul(one, one, at::ones({2, 2}), 1, 1);
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return it_does;
}

void matmul(const at::Tensor& a, const at::Tensor& b, at::Tensor& out, float beta) {
  if (out.is_cpu() && out.scalar_type() == at::kFloat && out.numel() > 0 && a.numel() > 0 && onednn_multiplies()) {
    at::native::mkldnn_matmul(a, b, out, beta, 1);
  } else {
    at::addmm_out(out, out, a, b, beta, 1);
  }
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const at::Tensor* addend) {
  static const auto plain = find<Linear>("");
  static const auto binary = find<LinearBinary>("binary");
  if (!plain || !binary || x.size(0) == 0 || !x.is_cpu() || x.scalar_type() != at::kFloat) {
    auto product = at::linear(x, weight, bias);
    return addend != nullptr ? product.add_(*addend) : product;
  }
  return addend != nullptr ? binary->call(x, *addend, weight, bias, "add")
                           : plain->call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

char* aha_record(const at::Tensor* const* inputs, size_t num_inputs, at::Tensor* const* outputs, size_t num_outputs,
                 AhaBackward backward) {
  return aha::guarded([&] {
    const auto node = std::make_shared<ClosureNode>(backward);
    torch::autograd::edge_list edges;
    bool requires_grad = false;
    for (size_t i = 0; i < num_inputs; ++i) {
      requires_grad |= inputs[i]->requires_grad();
      edges.push_back(torch::autograd::impl::gradient_edge(*inputs[i]));
    }
    if (!at::GradMode::is_enabled() || !requires_grad) {
      return;
    }
    node->set_next_edges(std::move(edges));
    for (size_t i = 0; i < num_outputs; ++i) {
      torch::autograd::set_history(*outputs[i], node);
    }
  });
}

char* aha_linear(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias, const at::Tensor* addend,
                 at::Tensor** out) {
  return aha::guarded([&] {
    at::NoGradGuard no_grad;
    *out = new at::Tensor(linear(*x, *weight, bias != nullptr ? std::optional(*bias) : std::nullopt, addend));
  });
}

char* aha_matmul(const at::Tensor* a, const at::Tensor* b, const at::Tensor* out, bool adds) {
  return aha::guarded([&] {
    at::NoGradGuard no_grad;
    at::Tensor target = *out;
    matmul(*a, *b, target, adds ? 1 : 0);
  });
}

void aha_parallel_for(int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* data) {
  at::parallel_for(0, end, grain, [&](int64_t first, int64_t last) { body(data, first, last); });
}
