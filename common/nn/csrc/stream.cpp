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
