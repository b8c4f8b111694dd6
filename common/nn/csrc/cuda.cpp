// What a GPU's own queue of work needs beside operators: a stream and graphs. Compiled in when libtorch is a CUDA build.
#include "guard.h"
#include "shim.h"

#ifdef AHA_CUDA

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <memory>

struct AhaGraph {
  at::cuda::CUDAGraph inner;
};

char* aha_cuda_own_stream(int32_t device) {
  return aha::guarded([&] {
    const auto index = static_cast<c10::DeviceIndex>(device);
    c10::cuda::set_device(index);
    // Work of the default stream cannot be captured.
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, index));
    // Parts of a product are added up in fp32.
    at::globalContext().setAllowBF16ReductionCuBLAS(false);
  });
}

char* aha_cuda_synchronize(int32_t device) {
  return aha::guarded([&] { at::accelerator::getCurrentStream(static_cast<c10::DeviceIndex>(device)).synchronize(); });
}

char* aha_cuda_empty_cache(void) {
  return aha::guarded([] { at::accelerator::emptyCache(); });
}

char* aha_graph_begin(AhaGraph** out) {
  return aha::guarded([&] {
    auto graph = std::make_unique<AhaGraph>();
    // A pool of its own, which stays empty: what is captured allocates nothing. Other threads go on as they like.
    graph->inner.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    *out = graph.release();
  });
}

char* aha_graph_end(AhaGraph* graph) {
  return aha::guarded([&] { graph->inner.capture_end(); });
}

char* aha_graph_replay(AhaGraph* graph) {
  return aha::guarded([&] { graph->inner.replay(); });
}

void aha_graph_free(AhaGraph* graph) { delete graph; }

#else

namespace {
char* no_cuda() { return aha::copy_message("this build has no CUDA"); }
}  // namespace

char* aha_cuda_own_stream(int32_t) { return no_cuda(); }
char* aha_cuda_synchronize(int32_t) { return no_cuda(); }
char* aha_cuda_empty_cache(void) { return no_cuda(); }
char* aha_graph_begin(AhaGraph**) { return no_cuda(); }
char* aha_graph_end(AhaGraph*) { return no_cuda(); }
char* aha_graph_replay(AhaGraph*) { return no_cuda(); }
void aha_graph_free(AhaGraph*) {}

#endif
