// The CPU backend.
#define USE_C10D_GLOO 1
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "comm.h"
#include "guard.h"
#include "shim.h"

namespace {

class Gloo final : public c10d::ProcessGroupGloo {
 public:
  using c10d::ProcessGroupGloo::ProcessGroupGloo;

  // c10d's own does nothing. An exception on the connections ends every collective in flight, here and, because they
  // are closed, at the peers.
  void abort() override {
    for (auto& context : contexts_) {
      for (int peer = 0; peer < getSize(); ++peer) {
        // All devices of Gloo on Linux are TCP.
        auto* pair = reinterpret_cast<gloo::transport::tcp::Pair*>(context->getPair(peer).get());
        if (peer != getRank() && pair != nullptr) {
          pair->signalExceptionExternal("the group was aborted");
        }
      }
    }
  }
};

}  // namespace

char* aha_gloo_new(const AhaStore* store, const AhaGroupOptions* options, AhaGroup** out) {
  return aha::guarded([&] {
    auto gloo = c10d::ProcessGroupGloo::Options::create(std::chrono::milliseconds(options->timeout_ms));
    gloo->devices.push_back(options->interface != nullptr
                                ? c10d::ProcessGroupGloo::createDeviceForInterface(options->interface)
                                : c10d::ProcessGroupGloo::createDeviceForHostname(options->host));
    *out = new AhaGroup{c10::make_intrusive<Gloo>(store->inner, options->rank, options->size, gloo), std::nullopt};
  });
}
