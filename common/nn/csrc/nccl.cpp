// The CUDA backend: compiled in when libtorch is a CUDA build.
#include "comm.h"
#include "guard.h"
#include "shim.h"

#ifdef USE_C10D_NCCL

#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

namespace {

class Nccl final : public c10d::ProcessGroupNCCL {
 public:
  Nccl(c10::intrusive_ptr<c10d::Store> store, int rank, int size, c10::intrusive_ptr<Options> options)
      : c10d::ProcessGroupNCCL(std::move(store), rank, size, std::move(options)) {
    // The default ends the process when a collective times out. A generator must outlive a trainer, and a trainer ends
    // itself with the error that names the group, so the watchdog only aborts the communicators.
    asyncErrorHandling_ = c10d::CleanUpOnly;
  }
};

}  // namespace

bool aha_nccl_built(void) { return true; }

char* aha_nccl_new(const AhaStore* store, const AhaGroupOptions* options, AhaGroup** out) {
  return aha::guarded([&] {
    auto nccl = c10d::ProcessGroupNCCL::Options::create();
    nccl->timeout = std::chrono::milliseconds(options->timeout_ms);
    const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(options->device));
    *out = new AhaGroup{c10::make_intrusive<Nccl>(store->inner, options->rank, options->size, nccl), device};
  });
}

#else

bool aha_nccl_built(void) { return false; }

char* aha_nccl_new(const AhaStore*, const AhaGroupOptions*, AhaGroup**) {
  return aha::copy_message("this build has no NCCL");
}

#endif
