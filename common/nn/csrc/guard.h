// Turns C++ exceptions into messages at the border to Rust.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <utility>

namespace aha {

// A copy that `aha_string_free` frees; never null.
char* copy_message(const char* message) noexcept;

// Runs `body`; returns null, or what it threw as a message.
template <typename Body>
char* guarded(Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return nullptr;
  } catch (const c10::Error& error) {
    return copy_message(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return copy_message(error.what());
  } catch (...) {
    return copy_message("unknown C++ exception");
  }
}

}  // namespace aha
