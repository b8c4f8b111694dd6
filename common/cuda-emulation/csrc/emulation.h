// CUDA's device language as far as the kernels use it, on the CPU.
//
// Every CUDA thread is a fiber, and fibers switch at barriers and warp operations only, in an order that the launch
// chooses: a kernel that lacks a barrier gives other results in the reversed order. What CUDA leaves undefined is an
// error here: lanes missing from a warp operation, threads at different barriers, misaligned vectors, writes past
// shared memory. Shared memory starts as NaN.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>

#define AHA_EMULATED
#define __device__
#define __forceinline__ inline
#define KERNEL(name, max_threads) static void name
#define SHARED(type, name) type& name = *static_cast<type*>(emulated::shared_memory(sizeof(type)))

struct Dim3 {
  unsigned x, y, z;
};
extern __thread Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulated {

constexpr unsigned FULL_MASK = 0xffffffff;
constexpr size_t SLOT_BYTES = 64;

// What each lane brings to a warp operation.
struct Slot {
  alignas(16) unsigned char bytes[SLOT_BYTES];
};

// Ends the launch with an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void sync_block(int line);
// Waits for the whole warp; returns the slots of all 32 lanes, valid until this lane's second next exchange.
const Slot* exchange(const void* data, size_t size, int line);
void* shared_memory(size_t size);

inline unsigned lane() { return threadIdx.x % 32; }

template <class T>
T shuffle(T value, unsigned source, unsigned mask, int line) {
  static_assert(sizeof(T) <= SLOT_BYTES);
  if (mask != FULL_MASK) fail("line %d: a warp operation of some lanes only", line);
  T result;
  std::memcpy(&result, exchange(&value, sizeof(T), line)[source % 32].bytes, sizeof(T));
  return result;
}

inline void check_aligned(const void* address, size_t size) {
  if (reinterpret_cast<uintptr_t>(address) % size != 0) fail("%zu bytes are read or written at %p", size, address);
}

inline float bf16_value(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Multiplies `a` (16 x 16) by `b` (16 x 8), adding to `d`: the fragments of mma.sync.m16n8k16.
inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line) {
  const unsigned own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Slot* slots = exchange(own, sizeof(own), line);
  auto word = [&](unsigned lane, unsigned i) {
    uint32_t bits;
    std::memcpy(&bits, slots[lane].bytes + 4 * i, 4);
    return bits;
  };
  auto half = [](uint32_t pair, unsigned high) { return bf16_value(high ? pair >> 16 : pair & 0xffff); };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned in_group = k % 8 / 2;
      const float x = half(word(row % 8 * 4 + in_group, row / 8 + k / 8 * 2), k % 2);
      const float y = half(word(column * 4 + in_group, 4 + k / 8), k % 2);
      d[i] += x * y;
    }
  }
}

// === Entry ===

struct Args {
  void* const* values;
  const size_t* sizes;
  size_t count;
};

// Null, or how the arguments differ from the parameters.
template <class... P, size_t... I>
const char* check(const Args& args, std::index_sequence<I...>) {
  if (args.count != sizeof...(P)) return "the number of arguments is not that of the parameters";
  const bool same = ((args.sizes[I] == sizeof(P)) && ...);
  return same ? nullptr : "an argument has another size than its parameter";
}

template <class... P, size_t... I>
void invoke(void (*kernel)(P...), const Args& args, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(args.values[I])...);
}

// With `run` false, checks the arguments; with true, runs one thread.
template <class... P>
const char* call(void (*kernel)(P...), const Args& args, bool run) {
  const auto indices = std::index_sequence_for<P...>();
  if (!run) return check<P...>(args, indices);
  invoke(kernel, args, indices);
  return nullptr;
}

}  // namespace emulated

#define __syncthreads() emulated::sync_block(__LINE__)

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return emulated::shuffle(value, source, mask, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return emulated::shuffle(value, emulated::lane() ^ lanes, mask, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const unsigned lane = emulated::lane();
  return emulated::shuffle(value, lane < delta ? lane : lane - delta, mask, line);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, int line = __builtin_LINE()) {
  if (mask != emulated::FULL_MASK) emulated::fail("line %d: a ballot of some lanes only", line);
  const unsigned char own = predicate;
  const emulated::Slot* slots = emulated::exchange(&own, 1, line);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) result |= unsigned(slots[lane].bytes[0]) << lane;
  return result;
}

// Fibers never run at the same time.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
template <class T>
T atomicMin(T* address, T value) {
  const T old = *address;
  if (value < old) *address = value;
  return old;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
template <class T>
T min(T x, T y) {
  return y < x ? y : x;
}
template <class T>
T max(T x, T y) {
  return x < y ? y : x;
}
