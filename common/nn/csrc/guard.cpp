#include "guard.h"

#include <cstdlib>
#include <cstring>

#include "shim.h"

namespace aha {

char* copy_message(const char* message) noexcept {
  char* copy = strdup(message);
  // Null would read as success.
  return copy != nullptr ? copy : (std::abort(), nullptr);
}

}  // namespace aha

void aha_string_free(char* message) { std::free(message); }
