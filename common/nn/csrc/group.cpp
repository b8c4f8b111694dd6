// Collectives over any c10d backend.
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "comm.h"
#include "guard.h"
#include "shim.h"

struct AhaWork {
  c10::intrusive_ptr<c10d::Work> inner;
};

namespace {

c10d::ReduceOp reduce_op(int32_t code) {
  switch (code) {
    case 0:
      return c10d::ReduceOp::SUM;
    case 1:
      return c10d::ReduceOp::MAX;
    case 2:
      return c10d::ReduceOp::MIN;
    default:
      TORCH_CHECK(false, "unknown reduce operation ", code);
  }
}

// Starts a collective and hands its work to the caller.
template <typename Start>
char* start(AhaWork** out, Start&& start) noexcept {
  return aha::guarded([&] { *out = new AhaWork{start()}; });
}

}  // namespace

char* aha_group_all_reduce(AhaGroup* group, at::Tensor* tensor, int32_t op, AhaWork** out) {
  return start(out, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = reduce_op(op);
    return group->inner->allreduce(tensors, options);
  });
}

char* aha_group_reduce_scatter(AhaGroup* group, at::Tensor* output, at::Tensor* input, int32_t op, AhaWork** out) {
  return start(out, [&] {
    c10d::ReduceScatterOptions options;
    options.reduceOp = reduce_op(op);
    return group->inner->_reduce_scatter_base(*output, *input, options);
  });
}

char* aha_group_all_gather(AhaGroup* group, at::Tensor* output, at::Tensor* input, AhaWork** out) {
  return start(out, [&] { return group->inner->_allgather_base(*output, *input); });
}

char* aha_group_broadcast(AhaGroup* group, at::Tensor* tensor, int64_t root, AhaWork** out) {
  return start(out, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return group->inner->broadcast(tensors, options);
  });
}

char* aha_group_barrier(AhaGroup* group, AhaWork** out) {
  return start(out, [&] {
    c10d::BarrierOptions options;
    options.device = group->device;
    return group->inner->barrier(options);
  });
}

char* aha_group_abort(AhaGroup* group) {
  return aha::guarded([&] { group->inner->abort(); });
}

void aha_group_free(AhaGroup* group) { delete group; }

char* aha_work_wait(AhaWork* work, int64_t timeout_ms) {
  // With an explicit timeout NCCL, too, blocks until the collective is done, so that its failure is seen here.
  return aha::guarded([&] { work->inner->wait(std::chrono::milliseconds(timeout_ms)); });
}

bool aha_work_is_completed(const AhaWork* work) { return work->inner->isCompleted(); }

void aha_work_free(AhaWork* work) { delete work; }
