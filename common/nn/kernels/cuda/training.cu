// The trainer's operations, forward and backward, each in one pass over memory.
//
// Rows are of any width and their addresses of any alignment: what is aligned moves 16 bytes at a time, the rest one by
// one. No atomics: a result is the same to the last bit in every run.
//
// Macro: ELEMENT_BF16, 1 where activations and weights are bf16 and 0 where they are fp32. Arithmetic is fp32.
#include "prelude.cuh"

#if ELEMENT_BF16
typedef Bf16 Element;
#else
typedef float Element;
#endif

constexpr float LN_2 = 0.693147180559945309417f;
// Below every logit, and finite, so that what weighs nothing is no NaN.
constexpr float LOWEST = -1e30f;

__device__ __forceinline__ void store8(Bf16* address, const float (&x)[8]) { store_bf16(address, x); }
__device__ __forceinline__ void store8(float* address, const float (&x)[8]) { store_fp32(address, x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ void store_one(float* address, float x) { *address = x; }
__device__ __forceinline__ void store_one(Bf16* address, float x) { address->bits = pack_bf16(x, 0) & 0xffff; }

__device__ __forceinline__ bool is_aligned(const void* address) { return reinterpret_cast<size_t>(address) % 16 == 0; }

// The first `count` of eight neighbours; `rest` in place of the others.
template <class T>
__device__ __forceinline__ void load_some(const T* address, long long count, float (&x)[8], float rest = 0) {
  if (count >= 8 && is_aligned(address)) return load8(address, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? to_float(address[i]) : rest;
}

template <class T>
__device__ __forceinline__ void store_some(T* address, long long count, const float (&x)[8]) {
  if (count >= 8 && is_aligned(address)) return store8(address, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) store_one(address + i, x[i]);
  }
}

// What remains of a number that is stored.
__device__ __forceinline__ float rounded(float x) { return ELEMENT_BF16 ? low_bf16(pack_bf16(x, 0)) : x; }

// === Norm ===
//
// A row belongs to a team of threads, eight elements each: a power of two of them up to a warp, or the whole block.

struct WarpSums {
  float sums[WARP];
};

__device__ __forceinline__ float team_sum(float x, int team, WarpSums& shared) {
  for (int lanes = min(team, WARP) / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
  if (team <= WARP) return x;
  // Somebody may still read the sums of the row before.
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared.sums[threadIdx.x / WARP] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < team / WARP; ++i) x += shared.sums[i];
  return x;
}

struct RmsNorm {
  const Element* x;       // [R, C]
  const Element* delta;   // [R, C], or null: nothing is added
  const Element* weight;  // [C]
  Element* sum;           // [R, C], x + delta; null without a delta
  Element* out;           // [R, C]
  float* scales;          // [R], 1 / sqrt(mean(sum^2) + epsilon)
  int num_rows;
  int width;
  int team;
  float epsilon;
};

// sum = x + delta, out = sum * scale * weight. The norm is that of the sum as it is stored.
// Grid R / (threads / team). Moves 8 bytes an element of bf16, 4 without a delta.
KERNEL(rms_norm, 1024)
(RmsNorm p) {
  SHARED(WarpSums, shared);
  const int row = blockIdx.x * (blockDim.x / p.team) + threadIdx.x / p.team;
  const int column = int(threadIdx.x) % p.team * 8;
  const int count = row < p.num_rows ? p.width - column : 0;
  const size_t start = size_t(row) * p.width + column;
  float x[8] = {}, w[8];
  if (count > 0) {
    load_some(p.x + start, count, x);
    if (p.delta) {
      float y[8];
      load_some(p.delta + start, count, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = rounded(x[i] + y[i]);
      store_some(p.sum + start, count, x);
    }
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += x[i] * x[i];
  const float scale = 1 / sqrtf(team_sum(squares, p.team, shared) / p.width + p.epsilon);
  if (count <= 0) return;
  if (column == 0) p.scales[row] = scale;
  load_some(p.weight + column, count, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= scale * w[i];
  store_some(p.out + start, count, x);
}

struct RmsNormBackward {
  const Element* x;       // [R, C], what was normalised
  const Element* weight;  // [C]
  const float* scales;    // [R]
  const Element* d_out;   // [R, C]
  const Element* d_sum;   // [R, C], or null: added to d_x
  Element* d_x;           // [R, C]
  float* d_weight;        // [parts, C], which add up to the gradient; or null
  int num_rows;
  int num_parts;
  int width;
  int team;
};

// With n = x * scale and g = d_out * weight: d_x = scale * (g - n * mean(g * n)) + d_sum, d_weight = sum of d_out * n.
// Grid parts / (threads / team): a team takes every `parts`-th row. Moves 8 bytes an element of bf16, 6 without d_sum.
KERNEL(rms_norm_backward, 1024)
(RmsNormBackward p) {
  SHARED(WarpSums, shared);
  const int part = blockIdx.x * (blockDim.x / p.team) + threadIdx.x / p.team;
  const int column = int(threadIdx.x) % p.team * 8;
  const int inside = part < p.num_parts ? p.width - column : 0;
  float w[8] = {}, d_weight[8] = {};
  if (inside > 0) load_some(p.weight + column, inside, w);
  // All teams take as many turns, because their sums need whole warps.
  for (int first = 0; first < p.num_rows; first += p.num_parts) {
    const int row = first + part, count = row < p.num_rows ? inside : 0;
    const size_t start = size_t(row) * p.width + column;
    float n[8] = {}, d[8] = {}, scale = 0;
    if (count > 0) {
      load_some(p.x + start, count, n);
      load_some(p.d_out + start, count, d);
      scale = p.scales[row];
    }
    float product = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      n[i] *= scale;
      d_weight[i] += d[i] * n[i];
      d[i] *= w[i];
      product += d[i] * n[i];
    }
    const float mean = team_sum(product, p.team, shared) / p.width;
    if (count <= 0) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i] = scale * (d[i] - n[i] * mean);
    if (p.d_sum) {
      float y[8];
      load_some(p.d_sum + start, count, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) d[i] += y[i];
    }
    store_some(p.d_x + start, count, d);
  }
  if (p.d_weight && inside > 0) store_some(p.d_weight + size_t(part) * p.width + column, inside, d_weight);
}

// === Rotary positions ===

struct TurnHeads {
  Element* x;            // [N, heads * D]
  const int* positions;  // [N], below T
  const float* cos;      // [T, D / 2]
  const float* sin;      // [T, D / 2]
  int num_rows;
  int num_heads;
  int head_dim;
  float sign;  // 1 turns forth, -1 back
};

// Turns every head by the angles of its row, in place; a thread takes eight pairs of a head's halves.
// Grid N * heads * ceil(D / 16) / 256. Moves 4 bytes an element of bf16; the angles stay in the caches.
KERNEL(turn_heads, 256)
(TurnHeads p) {
  const int half = p.head_dim / 2, num_parts = (half + 7) / 8;
  const int index = blockIdx.x * blockDim.x + threadIdx.x, head = index / num_parts, row = head / p.num_heads;
  if (row >= p.num_rows) return;
  const int column = index % num_parts * 8, count = half - column;
  const size_t angles = size_t(p.positions[row]) * half + column;
  Element* first = p.x + size_t(head) * p.head_dim + column;
  float a[8], b[8], cos[8], sin[8];
  load_some(first, count, a);
  load_some(first + half, count, b);
  load_some(p.cos + angles, count, cos);
  load_some(p.sin + angles, count, sin);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float x = a[i], y = b[i], s = p.sign * sin[i];
    a[i] = x * cos[i] - y * s;
    b[i] = y * cos[i] + x * s;
  }
  store_some(first, count, a);
  store_some(first + half, count, b);
}

// === SwiGLU ===

// out = silu(gate) * up, all of `num_elements`.
// Grid elements / 2048. Moves 6 bytes an element of bf16.
KERNEL(silu_mul, 256)
(const Element* gate, const Element* up, Element* out, long long num_elements) {
  const long long start = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8, count = num_elements - start;
  if (count <= 0) return;
  float g[8], u[8];
  load_some(gate + start, count, g);
  load_some(up + start, count, u);
#pragma unroll
  for (int i = 0; i < 8; ++i) g[i] = g[i] / (1 + expf(-g[i])) * u[i];
  store_some(out + start, count, g);
}

// The gradients of gate and up; the latter is written over the gradient of the output.
// Grid elements / 2048. Moves 10 bytes an element of bf16.
KERNEL(silu_mul_backward, 256)
(const Element* gate, const Element* up, Element* d_out, Element* d_gate, long long num_elements) {
  const long long start = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8, count = num_elements - start;
  if (count <= 0) return;
  float g[8], u[8], d[8];
  load_some(gate + start, count, g);
  load_some(up + start, count, u);
  load_some(d_out + start, count, d);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float gated = 1 / (1 + expf(-g[i]));
    u[i] *= d[i] * gated * (1 + g[i] * (1 - gated));
    d[i] *= g[i] * gated;
  }
  store_some(d_out + start, count, d);
  store_some(d_gate + start, count, u);
}

// === Log-probs of targets ===

// Of some logits of a row, in powers of two: the largest, the sum of weights 2^(logit - peak), and the sum of each
// weight times logit - peak.
struct Tally {
  float peak, mass, moment;
};

// The same about another peak.
__device__ __forceinline__ Tally raised(Tally x, float peak) {
  const float shift = x.peak - peak, factor = exp2f(shift);
  return Tally{peak, factor * x.mass, factor * (x.moment + x.mass * shift)};
}

__device__ __forceinline__ Tally merged(Tally x, Tally y) {
  const float peak = fmaxf(x.peak, y.peak);
  x = raised(x, peak);
  y = raised(y, peak);
  return Tally{peak, x.mass + y.mass, x.moment + y.moment};
}

struct Tallies {
  Tally warps[WARP];
};

struct SummariseTargets {
  const float* logits;       // [M, V]
  const long long* targets;  // [M]; the log-prob of one that is not below V is NaN
  float* logprobs;           // [M]
  float* entropies;          // [M]
  float* log_sums;           // [M], of exponentials of the logits over the temperature
  int vocab_size;
  float sharpness;  // 1 / temperature
};

// Grid M, any number of whole warps. Moves 4 bytes a logit.
KERNEL(summarise_targets, 1024)
(SummariseTargets p) {
  SHARED(Tallies, shared);
  const float* row = p.logits + size_t(blockIdx.x) * p.vocab_size;
  const float factor = p.sharpness * LOG2_E;
  Tally tally{LOWEST, 0, 0};
  for (int start = threadIdx.x * 8; start < p.vocab_size; start += blockDim.x * 8) {
    float x[8];
    load_some(row + start, p.vocab_size - start, x, LOWEST);
    float peak = tally.peak;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] *= factor;
      peak = fmaxf(peak, x[i]);
    }
    tally = raised(tally, peak);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float weight = exp2f(x[i] - peak);
      tally.mass += weight;
      tally.moment += weight * (x[i] - peak);
    }
  }
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    tally = merged(tally, Tally{__shfl_xor_sync(ALL_LANES, tally.peak, lanes),
                                __shfl_xor_sync(ALL_LANES, tally.mass, lanes),
                                __shfl_xor_sync(ALL_LANES, tally.moment, lanes)});
  }
  if (threadIdx.x % WARP == 0) shared.warps[threadIdx.x / WARP] = tally;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < int(blockDim.x) / WARP; ++i) tally = merged(tally, shared.warps[i]);
  const float logarithm = log2f(tally.mass);
  const long long target = p.targets[blockIdx.x];
  const bool is_known = target >= 0 && target < p.vocab_size;
  const float logit = is_known ? row[target] * factor : __uint_as_float(0x7fc00000u);
  p.logprobs[blockIdx.x] = (logit - tally.peak - logarithm) * LN_2;
  p.entropies[blockIdx.x] = (logarithm - tally.moment / tally.mass) * LN_2;
  p.log_sums[blockIdx.x] = (tally.peak + logarithm) * LN_2;
}

struct LogitGradients {
  const float* logits;        // [M, V]
  const long long* targets;   // [M]
  const float* entropies;     // [M]
  const float* log_sums;      // [M]
  const float* d_logprobs;    // [M]
  const float* d_entropies;   // [M], or null: the entropies take no part
  Element* d_logits;          // [M, V]; the logits' own memory where elements are fp32
  int vocab_size;
  float sharpness;
};

// (d_logprob * (onehot(target) - softmax) - d_entropy * softmax * (log softmax + entropy)) / temperature.
// Grid (M, V / 2048). Moves 6 bytes a logit of bf16, 8 of fp32.
KERNEL(logit_gradients, 256)
(LogitGradients p) {
  const int row = blockIdx.x, start = (blockIdx.y * blockDim.x + threadIdx.x) * 8, count = p.vocab_size - start;
  if (count <= 0) return;
  const float d_logprob = p.d_logprobs[row] * p.sharpness;
  const float d_entropy = p.d_entropies ? p.d_entropies[row] * p.sharpness : 0;
  const float base = -d_logprob - d_entropy * p.entropies[row], log_sum = p.log_sums[row];
  const long long target = p.targets[row] - start;
  const size_t offset = size_t(row) * p.vocab_size + start;
  float x[8];
  load_some(p.logits + offset, count, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float logprob = x[i] * p.sharpness - log_sum;
    x[i] = (base - d_entropy * logprob) * exp2f(logprob * LOG2_E) + (i == target ? d_logprob : 0);
  }
  store_some(p.d_logits + offset, count, x);
}

// === Optimizer ===

struct DoubleSums {
  double warps[WARP];
};

// Sums of squares of a block's elements each, which add up to that of all. fp32 in, f64 out.
// Grid any, 256 threads. Moves 4 bytes an element.
KERNEL(sum_of_squares, 256)
(const float* values, double* sums, long long num_elements) {
  SHARED(DoubleSums, shared);
  const long long stride = (long long)gridDim.x * blockDim.x * 8;
  double sum = 0;
  for (long long start = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8; start < num_elements; start += stride) {
    float x[8];
    load_some(values + start, num_elements - start, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += double(x[i]) * x[i];
  }
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
  if (threadIdx.x % WARP == 0) shared.warps[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < int(blockDim.x) / WARP; ++i) sum += shared.warps[i];
  sums[blockIdx.x] = sum;
}

struct AdamW {
  float scale;       // of the gradient
  float decay;       // what the weights are multiplied by first
  float beta1;
  float beta2;
  float step_size;   // lr / (1 - beta1^step)
  float root_scale;  // 1 / sqrt(1 - beta2^step)
  float epsilon;
};

// Moves fp32 weights, and copies them rounded where there is a copy.
// Grid n / 2048. Moves 28 bytes an element, 30 with a copy.
KERNEL(adamw, 256)
(float* weights, const float* grad, float* exp_avg, float* exp_avg_sq, Bf16* copy, long long num_elements, AdamW p) {
  const long long start = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8, count = num_elements - start;
  if (count <= 0) return;
  float x[8], g[8], mean[8], square[8];
  load_some(weights + start, count, x);
  load_some(grad + start, count, g);
  load_some(exp_avg + start, count, mean);
  load_some(exp_avg_sq + start, count, square);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    g[i] *= p.scale;
    mean[i] = p.beta1 * mean[i] + (1 - p.beta1) * g[i];
    square[i] = p.beta2 * square[i] + (1 - p.beta2) * g[i] * g[i];
    x[i] = x[i] * p.decay - p.step_size * mean[i] / (sqrtf(square[i]) * p.root_scale + p.epsilon);
  }
  store_some(weights + start, count, x);
  store_some(exp_avg + start, count, mean);
  store_some(exp_avg_sq + start, count, square);
  if (copy) store_some(copy + start, count, x);
}
