// c10d's TCP key-value store, where ranks meet.
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <cstdlib>
#include <cstring>
#include <new>

#include "comm.h"
#include "guard.h"
#include "shim.h"

namespace {

c10d::TCPStoreOptions options(uint16_t port, int64_t timeout_ms) {
  c10d::TCPStoreOptions options;
  options.port = port;
  options.timeout = std::chrono::milliseconds(timeout_ms);
  options.waitWorkers = false;
  return options;
}

// c10d's flight recorder notes every collective in one table for the whole process, into which the first collective of
// a group is entered without a lock: two groups that start at once crash. It is read from the environment, which is
// safe to set only here, before main, where there is one thread. Setting TORCH_FR_BUFFER_SIZE brings the recorder back.
[[maybe_unused]] const int flight_recorder_off = setenv("TORCH_FR_BUFFER_SIZE", "0", /*overwrite=*/0);

// c10d logs, with stack traces, what it also throws and we report. TORCH_CPP_LOG_LEVEL brings its log back.
void silence_log() {
  if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) {
    FLAGS_caffe2_log_level = c10::GLOG_FATAL;
  }
}

AhaStore* open(const char* host, const c10d::TCPStoreOptions& options) {
  silence_log();
  return new AhaStore{c10::make_intrusive<c10d::TCPStore>(host, options)};
}

}  // namespace

char* aha_store_host(int listen_fd, const char* host, uint16_t port, int64_t timeout_ms, AhaStore** out) {
  return aha::guarded([&] {
    auto server = options(port, timeout_ms);
    server.isServer = true;
    server.masterListenFd = listen_fd;
    *out = open(host, server);
  });
}

char* aha_store_connect(const char* host, uint16_t port, int64_t timeout_ms, AhaStore** out) {
  return aha::guarded([&] { *out = open(host, options(port, timeout_ms)); });
}

char* aha_store_scoped(const AhaStore* store, const char* prefix, int64_t timeout_ms, AhaStore** out) {
  return aha::guarded([&] {
    // A waiting call holds its connection, so groups that shared one would wait for each other.
    auto connection = store->inner->clone();
    connection->setTimeout(std::chrono::milliseconds(timeout_ms));
    *out = new AhaStore{c10::make_intrusive<c10d::PrefixStore>(prefix, std::move(connection))};
  });
}

char* aha_store_set(const AhaStore* store, const char* key, const uint8_t* data, size_t len) {
  return aha::guarded([&] { store->inner->set(key, std::vector<uint8_t>(data, data + len)); });
}

char* aha_store_get(const AhaStore* store, const char* key, int64_t timeout_ms, uint8_t** data, size_t* len) {
  return aha::guarded([&] {
    store->inner->wait({key}, std::chrono::milliseconds(timeout_ms));
    const auto value = store->inner->get(key);
    // Never null, so that an empty value is not mistaken for none.
    auto* copy = static_cast<uint8_t*>(std::malloc(value.size() + 1));
    if (copy == nullptr) throw std::bad_alloc();
    std::memcpy(copy, value.data(), value.size());
    *data = copy;
    *len = value.size();
  });
}

char* aha_store_add(const AhaStore* store, const char* key, int64_t delta, int64_t* sum) {
  return aha::guarded([&] { *sum = store->inner->add(key, delta); });
}

void aha_store_free(AhaStore* store) { delete store; }
