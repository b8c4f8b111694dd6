// How libtorch was built.
#include <ATen/Version.h>

#include <string>

#include "guard.h"
#include "shim.h"

char* aha_torch_config(void) {
  std::string config;
  char* message = aha::guarded([&] { config = at::show_config(); });
  return message != nullptr ? message : aha::copy_message(config.c_str());
}
