#include <ATen/DeviceAccelerator.h>
#include <c10/core/Stream.h>

#include "guard.h"
#include "shim.h"

char* aha_current_stream(int32_t device, void** out) {
  return aha::guarded([&] {
    const auto accelerator = at::accelerator::getAccelerator(/*checked=*/true);
    TORCH_CHECK(*accelerator == at::DeviceType::CUDA, "libtorch has no CUDA device");
    *out = at::accelerator::getCurrentStream(static_cast<c10::DeviceIndex>(device)).native_handle();
  });
}

char* aha_set_device(int32_t device) {
  return aha::guarded([&] { at::accelerator::setDeviceIndex(static_cast<c10::DeviceIndex>(device)); });
}

char* aha_peak_memory(int32_t device, uint64_t* bytes) {
  return aha::guarded([&] {
    const auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *bytes = static_cast<uint64_t>(stats.allocated_bytes[all].peak);
  });
}

char* aha_used_memory(int32_t device, uint64_t* bytes) {
  return aha::guarded([&] {
    const auto [free, total] = at::accelerator::getMemoryInfo(static_cast<c10::DeviceIndex>(device));
    *bytes = static_cast<uint64_t>(total - free);
  });
}
