#pragma once
#include <exception>
#include <string>
namespace gloo::transport {
class Pair {
 public:
  virtual ~Pair() = 0;
};
namespace tcp {
// Its first base is transport::Pair.
class Pair {
 public:
  std::exception_ptr signalExceptionExternal(const std::string& message);
};
}  // namespace tcp
}  // namespace gloo::transport
