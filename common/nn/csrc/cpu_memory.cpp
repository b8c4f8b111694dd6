// Large blocks of host memory that go back into use instead of to the system: a step asks for the same sizes again and
// again, and memory that is new to the process is cleared page by page, where a training step was seen to spend a tenth.
#include <c10/core/CPUAllocator.h>

#include <sys/mman.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>

#include "guard.h"
#include "shim.h"

namespace {

// What is smaller is left to malloc.
constexpr size_t MIN_BYTES = size_t{1} << 20;

// Sizes that are about equal become equal: there are eight to each doubling.
size_t size_class(size_t bytes) {
  const int exponent = 63 - __builtin_clzll(bytes);
  const size_t step = size_t{1} << (exponent - 3);
  return (bytes + step - 1) / step * step;
}

// Holds no more than was once in use: before it asks the system, it gives back what would go beyond.
class BlockCache final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    if (bytes < MIN_BYTES) {
      return c10::GetDefaultCPUAllocator()->allocate(bytes);
    }
    void* block = take(size_class(bytes));
    return {block, block, &give_back, at::DeviceType::CPU};
  }

  at::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void release() {
    const std::lock_guard lock(mutex_);
    shrink(0);
    most_ = in_use_;
  }

  static BlockCache& instance() {
    // Never destroyed: tensors with a static lifetime may outlive every other object.
    static auto* cache = new BlockCache;
    return *cache;
  }

 private:
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    in_use_ += bytes;
    most_ = std::max(most_, in_use_);
    // A block that is a quarter larger does as well.
    if (const auto free = free_.lower_bound(bytes); free != free_.end() && free->first <= bytes + bytes / 4) {
      const auto [size, block] = *free;
      in_use_ += size - bytes;
      cached_ -= size;
      free_.erase(free);
      sizes_.emplace(block, size);
      return block;
    }
    shrink(most_ - in_use_);
    void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) {
      in_use_ -= bytes;
      TORCH_CHECK(false, "cannot get ", bytes, " bytes of memory");
    }
    sizes_.emplace(block, bytes);
    return block;
  }

  static void give_back(void* block) {
    BlockCache& cache = instance();
    const std::lock_guard lock(cache.mutex_);
    const auto found = cache.sizes_.find(block);
    if (found == cache.sizes_.end()) {
      return c10::GetDefaultCPUAllocator()->raw_deallocate(block);
    }
    const size_t bytes = found->second;
    cache.sizes_.erase(found);
    cache.in_use_ -= bytes;
    cache.cached_ += bytes;
    cache.free_.emplace(bytes, block);
  }

  // Gives the largest blocks back until at most `bytes` are kept.
  void shrink(size_t bytes) {
    while (cached_ > bytes) {
      const auto largest = std::prev(free_.end());
      munmap(largest->second, largest->first);
      cached_ -= largest->first;
      free_.erase(largest);
    }
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  std::unordered_map<void*, size_t> sizes_;
  size_t in_use_ = 0;
  size_t cached_ = 0;
  size_t most_ = 0;
};

}  // namespace

void aha_cache_cpu_memory() { c10::SetCPUAllocator(&BlockCache::instance()); }

void aha_map_large_blocks() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, MIN_BYTES);
#endif
}

void aha_release_cpu_memory() {
  BlockCache::instance().release();
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}
