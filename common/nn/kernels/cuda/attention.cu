// Causal attention over a paged cache: decoding (one query a sequence) and prefill (a chunk of queries).
//
// Macros: HEAD_DIM (D), 32, 64 or 128; GROUP, the query heads of a key head, 1 to 16; BLOCK_SIZE, the tokens of a cache
// block, a multiple of 16. Keys and values are [num_blocks, K, BLOCK_SIZE, D].
//
// Both kernels are one loop (`advance`): a warp takes 16 rows past 16 keys on tensor cores, with the online softmax of
// https://arxiv.org/abs/1805.02867. The query heads that share a key head are rows of the same tile
// (https://arxiv.org/abs/2305.13245), so that keys are read once for all of them. Keys and values go from global memory
// straight into the registers that mma wants, 16 bytes a lane: a product does not care in which order its inner
// dimension is counted, nor a store in which order its columns come, so both are permuted to make it fit. There is no
// shared memory in the loop, hence neither copies nor bank conflicts.
//
// A row's result depends on its own query, position and keys alone, whatever the batch; decoding and prefill of the
// same token differ in the last bits, as they add up the keys in another order.
#include "prelude.cuh"

constexpr int STEP = 16;
constexpr int WARPS = 4;
// Keys of one block of decoding: fixed, so that the batch and the longest context do not change a sum.
constexpr int SPLIT_KEYS = 256;

constexpr int QUERY_CHUNKS = HEAD_DIM / 32;
// Neighbouring elements that a lane loads of a value.
constexpr int VECTOR = HEAD_DIM % 64 == 0 ? 8 : 4;
constexpr int VALUE_CHUNKS = HEAD_DIM / (8 * VECTOR);
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 128, "HEAD_DIM must be 32, 64, 96 or 128");
static_assert(GROUP >= 1 && GROUP <= STEP, "a key head serves 1 to 16 query heads");
static_assert(BLOCK_SIZE % STEP == 0, "BLOCK_SIZE must be a multiple of 16");

// The cache, as both kernels see it.
struct Paged {
  const Bf16* keys;
  const Bf16* values;
  const int* block_tables;  // [sequences, max_blocks]
  int max_blocks;
  int num_kv_heads;
  float scale_log2;  // log2(e) / sqrt(D)
};

// The running softmax of 16 rows. Lane 4 g + t has part of rows g and g + 8.
struct Rows {
  // Of each row, elements 8 t to 8 t + 7 of every 32.
  u32 queries[2][QUERY_CHUNKS][4];
  // Of tile VECTOR * c + j, the elements (8 c + 2 t) * VECTOR + j and VECTOR past it, of row g, then of row g + 8.
  float sums[HEAD_DIM / 8][4];
  // Scores are in powers of 2.
  float largest[2];
  // Of this lane's keys alone.
  float totals[2];
};

__device__ __forceinline__ int lane_row() { return threadIdx.x % WARP / 4; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % 4; }

// `queries[i]` is row g + 8 i, null for a row that is not there.
__device__ __forceinline__ void start(Rows& rows, const Bf16* const (&queries)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int chunk = 0; chunk < QUERY_CHUNKS; ++chunk) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) rows.queries[i][chunk][pair] = 0;
      if (queries[i]) load_pairs(queries[i] + 32 * chunk + 8 * lane_column(), rows.queries[i][chunk]);
    }
    rows.largest[i] = NEGATIVE_INFINITY;
    rows.totals[i] = 0;
  }
#pragma unroll
  for (int tile = 0; tile < HEAD_DIM / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.sums[tile][i] = 0;
  }
}

struct Values {
  // Of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9: elements VECTOR * g on of every 8 * VECTOR, in pairs.
  u32 pairs[4][VALUE_CHUNKS][VECTOR / 2];
};

// Keys of the step from `num_keys` on may hold anything, NaN too: they count as zero.
__device__ __forceinline__ void load_values(Values& v, const Bf16* values, int num_keys) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = 2 * lane_column() + i % 2 + i / 2 * 8;
#pragma unroll
    for (int chunk = 0; chunk < VALUE_CHUNKS; ++chunk) {
      const Bf16* address = values + key * HEAD_DIM + (8 * chunk + lane_row()) * VECTOR;
#pragma unroll
      for (int pair = 0; pair < VECTOR / 2; ++pair) v.pairs[i][chunk][pair] = 0;
      if (key < num_keys) load_pairs(address, v.pairs[i][chunk]);
    }
  }
}

// scores[tile] of rows g, g + 8 and keys 8 * tile + 2 t, + 1.
__device__ __forceinline__ void score(const Rows& rows, const Bf16* keys, float (&scores)[2][4]) {
  uint4 words[2][QUERY_CHUNKS];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int chunk = 0; chunk < QUERY_CHUNKS; ++chunk) {
      words[tile][chunk] = load<uint4>(keys + (8 * tile + lane_row()) * HEAD_DIM + 32 * chunk + 8 * lane_column());
    }
  }
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[tile][i] = 0;
#pragma unroll
    for (int chunk = 0; chunk < QUERY_CHUNKS; ++chunk) {
      const auto& q = rows.queries;
      const uint4 k = words[tile][chunk];
      mma(scores[tile], {q[0][chunk][0], q[1][chunk][0], q[0][chunk][1], q[1][chunk][1]}, {k.x, k.y});
      mma(scores[tile], {q[0][chunk][2], q[1][chunk][2], q[0][chunk][3], q[1][chunk][3]}, {k.z, k.w});
    }
  }
}

// Takes the rows past 16 keys from position `first` on. Row g + 8 i sees those below limits[i]; keys from `end` on are
// not there.
__device__ __forceinline__ void advance(Rows& rows, const Paged& paged, const int* block_table, int kv_head, int first,
                                        int end, const int (&limits)[2]) {
  const size_t block = block_table[first / BLOCK_SIZE];
  const size_t offset = ((block * paged.num_kv_heads + kv_head) * BLOCK_SIZE + first % BLOCK_SIZE) * HEAD_DIM;
  Values values;
  load_values(values, paged.values + offset, end - first);
  float scores[2][4];
  score(rows, paged.keys + offset, scores);

  // Weights of rows g and g + 8, as a second product wants them.
  u32 weights[4];
  float decays[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float largest = rows.largest[i];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int key = first + 8 * tile + 2 * lane_column() + j;
        float& x = scores[tile][2 * i + j];
        x = key < limits[i] ? x * paged.scale_log2 : NEGATIVE_INFINITY;
        largest = fmaxf(largest, x);
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
    // A row that has seen nothing yet would subtract infinities.
    const float base = largest == NEGATIVE_INFINITY ? 0 : largest;
    decays[i] = exp2f(rows.largest[i] - base);
    rows.largest[i] = largest;
    rows.totals[i] *= decays[i];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const u32 pair = pack_bf16(exp2f(scores[tile][2 * i] - base), exp2f(scores[tile][2 * i + 1] - base));
      weights[2 * tile + i] = pair;
      // What was rounded is what is summed: the result stays a mean of the values.
      rows.totals[i] += low_bf16(pair) + high_bf16(pair);
    }
  }
#pragma unroll
  for (int tile = 0; tile < HEAD_DIM / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.sums[tile][i] *= decays[i / 2];
  }
#pragma unroll
  for (int chunk = 0; chunk < VALUE_CHUNKS; ++chunk) {
#pragma unroll
    for (int pair = 0; pair < VECTOR / 2; ++pair) {
      const u32 v[4] = {values.pairs[0][chunk][pair], values.pairs[1][chunk][pair], values.pairs[2][chunk][pair],
                        values.pairs[3][chunk][pair]};
      const int tile = VECTOR * chunk + 2 * pair;
      mma(rows.sums[tile], weights, {__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410)});
      mma(rows.sums[tile + 1], weights, {__byte_perm(v[0], v[1], 0x7632), __byte_perm(v[2], v[3], 0x7632)});
    }
  }
}

// Sums the totals over the lanes of a row.
__device__ __forceinline__ void finish(Rows& rows) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.totals[i] += __shfl_xor_sync(ALL_LANES, rows.totals[i], 1);
    rows.totals[i] += __shfl_xor_sync(ALL_LANES, rows.totals[i], 2);
  }
}

// Where this lane's neighbouring elements of value chunk `chunk` start, `2 * VECTOR` of them.
__device__ __forceinline__ int first_element(int chunk) { return (8 * chunk + 2 * lane_column()) * VECTOR; }

// === Decoding ===

struct Decode {
  Paged paged;
  const Bf16* queries;      // [B, H * D]
  const int* context_lens;  // [B]: keys that the row sees, its own among them; 0 for a row that is not in use
  Bf16* out;                // [B, H * D]
  float* partial_out;       // [B, H, S, D], for contexts of more than one split
  float* partial_lse;       // [B, H, S], log2 of the sum of the weights
};

// A row stride of D + 4 floats spreads the rows of a warp over the banks.
struct DecodeShared {
  float sums[WARPS][GROUP][HEAD_DIM + 4];
  float largest[WARPS][GROUP];
  float totals[WARPS][GROUP];
};

__device__ __forceinline__ int num_splits(int context_len, int max_splits) {
  return min((context_len + SPLIT_KEYS - 1) / SPLIT_KEYS, max_splits);
}

// Grid (S, K, B), 128 threads. Block (s, k, b) takes sequence b's keys 256 s to 256 s + 255 (the last split all that
// are left), its warps every fourth 16 of them. A block without keys leaves: the grid depends on the longest context
// that is allowed, never on those at hand.
// Moves 4 D bytes a key and key head, and nearly nothing else. 8 KiB a warp are in flight at D 128.
KERNEL(decode_attention, 128)
(Decode p) {
  SHARED(DecodeShared, shared);
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z, warp = threadIdx.x / WARP;
  const int context_len = p.context_lens[sequence];
  const int splits = num_splits(context_len, gridDim.x);
  const size_t first_head = size_t(sequence) * p.paged.num_kv_heads * GROUP + kv_head * GROUP;
  if (split >= splits) {
    // Rows that are not in use must not carry NaN into the layers above.
    if (split == 0) {
      for (int i = threadIdx.x * 8; i < GROUP * HEAD_DIM; i += blockDim.x * 8) {
        store(p.out + first_head * HEAD_DIM + i, uint4{0, 0, 0, 0});
      }
    }
    return;
  }
  const int end = split + 1 == splits ? context_len : (split + 1) * SPLIT_KEYS;

  Rows rows;
  const Bf16* queries[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane_row() + 8 * i;
    queries[i] = row < GROUP ? p.queries + (first_head + row) * HEAD_DIM : nullptr;
  }
  start(rows, queries);
  const int* block_table = p.paged.block_tables + size_t(sequence) * p.paged.max_blocks;
  for (int key = split * SPLIT_KEYS + warp * STEP; key < end; key += WARPS * STEP) {
    advance(rows, p.paged, block_table, kv_head, key, end, {end, end});
  }
  finish(rows);

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane_row() + 8 * i;
    if (row >= GROUP) continue;
    shared.largest[warp][row] = rows.largest[i];
    shared.totals[warp][row] = rows.totals[i];
#pragma unroll
    for (int chunk = 0; chunk < VALUE_CHUNKS; ++chunk) {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        float* target = &shared.sums[warp][row][first_element(chunk) + j];
        target[0] = rows.sums[VECTOR * chunk + j][2 * i];
        target[VECTOR] = rows.sums[VECTOR * chunk + j][2 * i + 1];
      }
    }
  }
  __syncthreads();

  for (int i = threadIdx.x * 4; i < GROUP * HEAD_DIM; i += blockDim.x * 4) {
    const int row = i / HEAD_DIM, column = i % HEAD_DIM;
    float largest = NEGATIVE_INFINITY;
    for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, shared.largest[w][row]);
    float total = 0, sums[4] = {};
    for (int w = 0; w < WARPS; ++w) {
      const float factor = exp2f(shared.largest[w][row] - largest);
      total += factor * shared.totals[w][row];
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += factor * shared.sums[w][row][column + j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] /= total;
    const size_t head = first_head + row;
    if (splits == 1) {
      store_bf16(p.out + head * HEAD_DIM + column, sums);
    } else {
      const size_t part = head * gridDim.x + split;
      store(p.partial_out + part * HEAD_DIM + column, float4{sums[0], sums[1], sums[2], sums[3]});
      if (column == 0) p.partial_lse[part] = largest + log2f(total);
    }
  }
}

// Merges the splits of contexts that have more than one.
// Grid (H, B), D / 4 threads or more. Moves 4 S D bytes a head, of the splits that are there.
KERNEL(combine_splits, 32)
(const int* context_lens, const float* partial_out, const float* partial_lse, Bf16* out, int max_splits) {
  const size_t head = size_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const int splits = num_splits(context_lens[blockIdx.y], max_splits), column = threadIdx.x * 4;
  if (splits <= 1 || column >= HEAD_DIM) return;
  const float* lse = partial_lse + head * max_splits;
  float largest = NEGATIVE_INFINITY;
  for (int split = 0; split < splits; ++split) largest = fmaxf(largest, lse[split]);
  float total = 0, sums[4] = {};
  for (int split = 0; split < splits; ++split) {
    const float weight = exp2f(lse[split] - largest);
    const float4 part = load<float4>(partial_out + (head * max_splits + split) * HEAD_DIM + column);
    total += weight;
    sums[0] += weight * part.x;
    sums[1] += weight * part.y;
    sums[2] += weight * part.z;
    sums[3] += weight * part.w;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) sums[j] /= total;
  store_bf16(out + head * HEAD_DIM + column, sums);
}

// === Prefill ===

// The new tokens of one sequence; every earlier key is in the cache, and so are those of these tokens.
struct Span {
  int first_row;
  int num_rows;
  int first_position;
};

struct Prefill {
  Paged paged;
  const Bf16* queries;  // [N, H * D]
  const Span* spans;    // [sequences]
  Bf16* out;            // [N, H * D]; rows of no span are left alone
};

// Grid (tiles, K, sequences), 128 threads. A warp takes 16 rows (query, head of the group), the four of a block
// neighbouring ones: they read the same keys at about the same time, and all but the first find them in L1.
// Moves 4 D bytes a key, key head and 16 / GROUP queries out of L1. The fast route is wgmma with keys brought to shared
// memory by TMA, as FlashAttention 3 does; attention is a few percent of a prefill at the lengths of prompts here.
KERNEL(prefill_attention, 128)
(Prefill p) {
  const int kv_head = blockIdx.y, sequence = blockIdx.z;
  const Span span = p.spans[sequence];
  const int first = (blockIdx.x * WARPS + threadIdx.x / WARP) * STEP;
  const int num_rows = span.num_rows * GROUP;
  if (first >= num_rows) return;

  Rows rows;
  const Bf16* queries[2];
  Bf16* targets[2];
  int limits[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + lane_row() + 8 * i, query = row / GROUP;
    const bool inside = row < num_rows;
    const size_t head =
        (size_t(span.first_row + query) * p.paged.num_kv_heads + kv_head) * GROUP + row % GROUP;
    queries[i] = inside ? p.queries + head * HEAD_DIM : nullptr;
    targets[i] = inside ? p.out + head * HEAD_DIM : nullptr;
    limits[i] = inside ? span.first_position + query + 1 : 0;
  }
  start(rows, queries);
  const int* block_table = p.paged.block_tables + size_t(sequence) * p.paged.max_blocks;
  const int end = span.first_position + min(first + STEP - 1, num_rows - 1) / GROUP + 1;
  for (int key = 0; key < end; key += STEP) advance(rows, p.paged, block_table, kv_head, key, end, limits);
  finish(rows);

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!targets[i]) continue;
#pragma unroll
    for (int chunk = 0; chunk < VALUE_CHUNKS; ++chunk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) x[j] = rows.sums[VECTOR * chunk + j][2 * i + half] / rows.totals[i];
        store_bf16(targets[i] + first_element(chunk) + half * VECTOR, x);
      }
    }
  }
}
