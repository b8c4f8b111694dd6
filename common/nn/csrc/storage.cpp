// The memory of tensors, apart from the tensors.
#include <ATen/core/Tensor.h>

#include <utility>

#include "guard.h"
#include "shim.h"

char* aha_swap_memory(at::Tensor* a, at::Tensor* b) {
  return aha::guarded([&] {
    auto* x = a->storage().unsafeGetStorageImpl();
    auto* y = b->storage().unsafeGetStorageImpl();
    TORCH_CHECK(x->device() == y->device(), "memory on ", x->device(), " and on ", y->device());
    const auto x_bytes = x->nbytes();
    const auto y_bytes = y->nbytes();
    auto x_memory = x->set_data_ptr(at::DataPtr(nullptr, x->device()));
    auto y_memory = y->set_data_ptr(std::move(x_memory));
    x->set_data_ptr_noswap(std::move(y_memory));
    x->set_nbytes(y_bytes);
    y->set_nbytes(x_bytes);
  });
}

size_t aha_memory_bytes(const at::Tensor* tensor) {
  return tensor->has_storage() && tensor->storage().data() != nullptr ? tensor->storage().nbytes() : 0;
}
