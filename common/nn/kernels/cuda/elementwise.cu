// Embedding, residual and norm, SwiGLU: one row a block, or eight elements a thread.
//
// The residual stream is fp32: rounding it to bf16 after each of the 2 L additions is the largest avoidable error of
// a forward pass, and the 4 bytes more an element are nothing beside the weights.
#include "prelude.cuh"

// residual[i] = table[tokens[i]]: [N, C] of [V, C], C a multiple of 8.
// Grid N, C / 8 threads or more. Moves 6 bytes an element.
KERNEL(embed, 1024)
(const int* tokens, const Bf16* table, float* residual, int width) {
  const int column = threadIdx.x * 8;
  if (column >= width) return;
  float x[8];
  load8(table + size_t(tokens[blockIdx.x]) * width + column, x);
  store_fp32(residual + size_t(blockIdx.x) * width + column, x);
}

struct NormShared {
  float sums[WARP];
};

// residual += delta, then out = residual / sqrt(mean(residual^2) + epsilon) * weight: [N, C], C a multiple of 8.
//
// No delta: nothing is added. With `rows`, out[i] is the norm of row rows[i], and the residual is left as it was: for
// the last norm, of the rows whose logits are wanted.
// Grid N, C / 8 threads in whole warps. Moves 12 bytes an element (6 without a delta).
KERNEL(add_rms_norm, 1024)
(float* residual, const Bf16* delta, const Bf16* weight, Bf16* out, const int* rows, int width, float epsilon) {
  SHARED(NormShared, partial);
  const int column = threadIdx.x * 8;
  const bool inside = column < width;
  const size_t source = size_t(rows ? rows[blockIdx.x] : blockIdx.x) * width + column;
  float x[8] = {};
  if (inside) {
    load8(residual + source, x);
    if (delta) {
      float y[8];
      load8(delta + source, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += y[i];
      if (!rows) store_fp32(residual + source, x);
    }
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
  if (threadIdx.x % WARP == 0) partial.sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (!inside) return;
  sum = 0;
  for (int i = 0; i < int(blockDim.x) / WARP; ++i) sum += partial.sums[i];
  const float scale = 1 / sqrtf(sum / width + epsilon);
  float w[8];
  load8(weight + column, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= scale * w[i];
  store_bf16(out + size_t(blockIdx.x) * width + column, x);
}

// out = silu(gate) * up, the halves of each row of gate_up: [N, F] of [N, 2 F], F a multiple of 8.
// Grid (F / 8 / 256, N). Moves 6 bytes an element of the output.
KERNEL(silu_mul, 256)
(const Bf16* gate_up, Bf16* out, int num_features) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (column >= num_features) return;
  const Bf16* row = gate_up + size_t(blockIdx.y) * 2 * num_features;
  float gate[8], up[8];
  load8(row + column, gate);
  load8(row + num_features + column, up);
#pragma unroll
  for (int i = 0; i < 8; ++i) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
  store_bf16(out + size_t(blockIdx.y) * num_features + column, gate);
}
