// What the kernels share.
//
// bf16 in memory, fp32 in registers. Compiled by NVRTC without a single CUDA header, and by a C++ compiler over
// common/cuda-emulation/csrc/emulation.h, where tests run the kernels on the CPU: what is not plain C++ or a common
// intrinsic stands in this file, once for each of the two.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffff;
constexpr float LOG2_E = 1.44269504088896340736f;

struct Bf16 {
  unsigned short bits;
};

#ifdef AHA_EMULATED

// Rounds to nearest even, as the instruction does.
__device__ inline u32 round_bf16(float x) {
  const u32 bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

__device__ inline u32 pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

// d += a * b. Lane 4 g + t holds of a (16 x 16) rows g and g + 8, columns 2 t, 2 t + 1 and those + 8; of b (16 x 8)
// the same as rows, in column g; of d (16 x 8) rows g and g + 8, columns 2 t and 2 t + 1.
__device__ inline void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emulated::mma(d, a, b, __LINE__); }

template <class T>
__device__ inline T load(const void* address) {
  emulated::check_aligned(address, sizeof(T));
  return *static_cast<const T*>(address);
}

template <class T>
__device__ inline void store(void* address, T value) {
  emulated::check_aligned(address, sizeof(T));
  *static_cast<T*>(address) = value;
}

#else

#define KERNEL(name, max_threads) extern "C" __global__ void __launch_bounds__(max_threads) name
// One a kernel, of at most 48 KiB.
#define SHARED(type, name) __shared__ type name

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
__device__ __forceinline__ T load(const void* address) {
  return *static_cast<const T*>(address);
}

template <class T>
__device__ __forceinline__ void store(void* address, T value) {
  *static_cast<T*>(address) = value;
}

#endif

#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)

__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

// Neighbouring elements, two a word, from an address aligned to all of them.
__device__ __forceinline__ void load_pairs(const Bf16* address, u32 (&pairs)[4]) {
  const uint4 words = load<uint4>(address);
  pairs[0] = words.x;
  pairs[1] = words.y;
  pairs[2] = words.z;
  pairs[3] = words.w;
}

__device__ __forceinline__ void load_pairs(const Bf16* address, u32 (&pairs)[2]) {
  const uint2 words = load<uint2>(address);
  pairs[0] = words.x;
  pairs[1] = words.y;
}

__device__ __forceinline__ void load8(const Bf16* address, float (&x)[8]) {
  u32 pairs[4];
  load_pairs(address, pairs);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = low_bf16(pairs[i]);
    x[2 * i + 1] = high_bf16(pairs[i]);
  }
}

__device__ __forceinline__ void load8(const float* address, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 half = load<float4>(address + 4 * i);
    x[4 * i] = half.x;
    x[4 * i + 1] = half.y;
    x[4 * i + 2] = half.z;
    x[4 * i + 3] = half.w;
  }
}

__device__ __forceinline__ void store_bf16(Bf16* address, const float (&x)[8]) {
  store(address, uint4{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])});
}

__device__ __forceinline__ void store_bf16(Bf16* address, const float (&x)[4]) {
  store(address, uint2{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])});
}

__device__ __forceinline__ void store_fp32(float* address, const float (&x)[8]) {
  store(address, float4{x[0], x[1], x[2], x[3]});
  store(address + 4, float4{x[4], x[5], x[6], x[7]});
}
