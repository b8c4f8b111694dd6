// From a fused projection row to rotated queries and the paged cache.
//
// Macro: HEAD_DIM (D), 32, 64 or 128.
#include "prelude.cuh"

// A lane takes eight elements of a head's first half and the eight of its second half that they turn with.
constexpr int HALF = HEAD_DIM / 2;
constexpr int LANES_PER_HEAD = HALF / 8;
static_assert(LANES_PER_HEAD > 0 && WARP % LANES_PER_HEAD == 0 && HALF % 8 == 0, "HEAD_DIM must be 32, 64 or 128");

struct QkvRope {
  const Bf16* qkv;        // [N, (H + 2 K) * D]: queries, keys, values
  const Bf16* bias;       // [(H + 2 K) * D], or null
  const Bf16* q_norm;     // [D], or null: RMS norm of each query head, before it turns
  const Bf16* k_norm;     // [D], or null
  const float* cos;       // [T, D / 2]
  const float* sin;       // [T, D / 2]
  const int* positions;   // [N], below T
  const int* slots;       // [N]: block * block_size + offset; negative where nothing is to be kept
  Bf16* queries;          // [N, H * D]
  Bf16* keys;             // [num_blocks, K, block_size, D]
  Bf16* values;           // [num_blocks, K, block_size, D]
  int num_heads;          // H
  int num_kv_heads;       // K
  int block_size;
  float epsilon;
};

__device__ __forceinline__ void normalise(float (&x)[2][8], const Bf16* weight, int part, float epsilon) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x[0][i] * x[0][i] + x[1][i] * x[1][i];
#pragma unroll
  for (int lanes = LANES_PER_HEAD / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
  const float scale = 1 / sqrtf(sum / HEAD_DIM + epsilon);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float w[8];
    load8(weight + half * HALF + part * 8, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[half][i] *= scale * w[i];
  }
}

// Adds the bias, normalises, turns, and writes queries to their row, keys and values to their slot.
// Grid N, (H + 2 K) * D / 16 threads in whole warps. Moves 4 bytes an element, and 4 D for the angles of a row.
KERNEL(qkv_rope, 1024)
(QkvRope p) {
  const int row = blockIdx.x, num_heads = p.num_heads + 2 * p.num_kv_heads;
  const int index = threadIdx.x / LANES_PER_HEAD, part = threadIdx.x % LANES_PER_HEAD;
  // Threads past the last head compute it again, so that warps stay whole.
  const int head = min(index, num_heads - 1);
  const int offset = head * HEAD_DIM + part * 8;
  const bool is_query = head < p.num_heads, is_value = head >= p.num_heads + p.num_kv_heads;

  float x[2][8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load8(p.qkv + size_t(row) * num_heads * HEAD_DIM + offset + half * HALF, x[half]);
    if (p.bias) {
      float bias[8];
      load8(p.bias + offset + half * HALF, bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[half][i] += bias[i];
    }
  }
  if (p.q_norm) {
    // Heads of one warp may differ in kind, and all lanes must take part: a value's result is dropped.
    float normed[2][8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) normed[half][i] = x[half][i];
    }
    normalise(normed, is_query ? p.q_norm : p.k_norm, part, p.epsilon);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[half][i] = is_value ? x[half][i] : normed[half][i];
    }
  }
  if (!is_value) {
    float cos[8], sin[8];
    const size_t angles = size_t(p.positions[row]) * HALF + part * 8;
    load8(p.cos + angles, cos);
    load8(p.sin + angles, sin);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = x[0][i], b = x[1][i];
      x[0][i] = a * cos[i] - b * sin[i];
      x[1][i] = b * cos[i] + a * sin[i];
    }
  }
  if (index >= num_heads) return;

  Bf16* target;
  if (is_query) {
    target = p.queries + size_t(row) * p.num_heads * HEAD_DIM + head * HEAD_DIM;
  } else {
    const int slot = p.slots[row];
    if (slot < 0) return;
    const int kv_head = head - p.num_heads - (is_value ? p.num_kv_heads : 0);
    const size_t block = slot / p.block_size, within = slot % p.block_size;
    target = (is_value ? p.values : p.keys) + ((block * p.num_kv_heads + kv_head) * p.block_size + within) * HEAD_DIM;
  }
  store_bf16(target + part * 8, x[0]);
  store_bf16(target + HALF + part * 8, x[1]);
}
