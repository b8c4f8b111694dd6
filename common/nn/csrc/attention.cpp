// Flash attention over sequences of packed rows, whose forward half tch leaves out.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_flash_attention_forward.h>

#include "guard.h"
#include "shim.h"

char* aha_flash_attention(const AhaPackedHeads* heads, const AhaSequences* sequences, at::Tensor** out,
                          at::Tensor** log_sums) {
  return aha::guarded([&] {
    at::NoGradGuard no_grad;
    auto result = at::_flash_attention_forward(
        *heads->q, *heads->k, *heads->v, *sequences->query_starts, *sequences->key_starts, sequences->max_queries,
        sequences->max_keys, /*dropout_p=*/0.0, sequences->is_causal, /*return_debug_mask=*/false);
    const auto& log_sum = std::get<1>(result);
    // Earlier and later versions of libtorch may lay them out in another way, which the backward kernel would not notice.
    TORCH_CHECK(log_sum.dim() == 2 && log_sum.size(0) == heads->q->size(1) && log_sum.size(1) == heads->q->size(0) &&
                    log_sum.is_contiguous(),
                "log-sums of this libtorch are ", log_sum.sizes(), ", expected [heads, rows]");
    *log_sums = new at::Tensor(log_sum);
    *out = new at::Tensor(std::get<0>(result));
  });
}
