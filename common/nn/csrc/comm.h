// What the files of the process groups share.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

struct AhaStore {
  c10::intrusive_ptr<c10d::Store> inner;
};

struct AhaGroup {
  c10::intrusive_ptr<c10d::Backend> inner;
  // Set for NCCL, whose barrier must be told its device.
  std::optional<at::Device> device;
};
