// Between two decoding steps: takes what was sampled, and prepares the next step, without the host.
#include "prelude.cuh"

// One row of `state` each, `stride` long; keep in step with StateField in step.rs.
enum Field {
  TOKEN,          // input of the next step
  POSITION,       // of TOKEN
  CONTEXT_LEN,    // keys that the next step sees; 0 for a row that is not in use
  SLOT,           // where the key and value of TOKEN go; -1 for a row that is not in use
  NUM_GENERATED,  // tokens sampled so far
  MIN_TOKENS,
  MAX_TOKENS,
  CAPACITY,       // positions that the row's blocks hold
  SEED_LOW,
  SEED_HIGH,
  SAMPLE_INDEX,
  UNIFORM,        // for the next sampling, an fp32
  NUM_LOGGED,     // tokens in the log
  OUTCOME,
};

// Why a row left; keep in step with Outcome in step.rs.
enum Reason { RUNNING, STOP, LENGTH, NEEDS_BLOCKS, LOG_FULL, BAD_LOGIT, NOTHING_ALLOWED };

struct Advance {
  int* state;               // [fields, stride]
  const int* tokens;        // [B], sampled
  const float* log_probs;   // [B]
  const int* statuses;      // [B], of sampling
  const int* block_tables;  // [B, max_blocks]
  const int* stop_tokens;   // [B, max_stops], negative past a row's last
  int* logged_tokens;       // [B, log_len]
  float* logged_log_probs;  // [B, log_len]
  int stride;
  int num_rows;             // B
  int max_blocks;
  int block_size;
  int max_stops;
  int log_len;
};

// The number in 0..1 for the token at `position` of a completion: Philox4x32-10 as in aha_core::random.
__device__ float sampling_uniform(u32 seed_low, u32 seed_high, u32 sample_index, u32 position) {
  u32 counter[4] = {position, sample_index, 0, 0}, key[2] = {seed_low, seed_high};
  for (int round = 0; round < 10; ++round) {
    const u32 high0 = __umulhi(0xD2511F53u, counter[0]), low0 = 0xD2511F53u * counter[0];
    const u32 high1 = __umulhi(0xCD9E8D57u, counter[2]), low1 = 0xCD9E8D57u * counter[2];
    counter[0] = high1 ^ counter[1] ^ key[0];
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key[1];
    counter[3] = low0;
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return float(counter[0] >> 8) / 16777216.0f;
}

// Logs the sampled token of every row in use. A row that goes on gets its next input; one that does not leaves the
// following steps, with the reason: for NEEDS_BLOCKS and LOG_FULL it is ready to go on once the host has set
// CONTEXT_LEN and SLOT.
// Grid (B / 128), 128 threads. Moves some 100 bytes a row.
KERNEL(advance, 128)
(Advance p) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.num_rows) return;
  auto field = [&](Field name) -> int& { return p.state[name * p.stride + row]; };
  const int context_len = field(CONTEXT_LEN);
  if (context_len == 0) return;
  field(CONTEXT_LEN) = 0;
  field(SLOT) = -1;
  if (p.statuses[row] != 0) {
    field(OUTCOME) = BAD_LOGIT + p.statuses[row] - 1;
    return;
  }

  const int token = p.tokens[row], num_logged = field(NUM_LOGGED), generated = field(NUM_GENERATED) + 1;
  p.logged_tokens[size_t(row) * p.log_len + num_logged] = token;
  p.logged_log_probs[size_t(row) * p.log_len + num_logged] = p.log_probs[row];
  field(NUM_LOGGED) = num_logged + 1;
  field(NUM_GENERATED) = generated;
  bool stops = false;
  for (int i = 0; i < p.max_stops; ++i) stops |= p.stop_tokens[size_t(row) * p.max_stops + i] == token;
  if (stops && generated > field(MIN_TOKENS)) {
    field(OUTCOME) = STOP;
    return;
  }
  if (generated >= field(MAX_TOKENS)) {
    field(OUTCOME) = LENGTH;
    return;
  }

  // The token stands after the keys that the row has seen.
  const int position = context_len;
  field(TOKEN) = token;
  field(POSITION) = position;
  field(UNIFORM) = int(__float_as_uint(
      sampling_uniform(field(SEED_LOW), field(SEED_HIGH), field(SAMPLE_INDEX), generated)));
  if (position >= field(CAPACITY)) {
    field(OUTCOME) = NEEDS_BLOCKS;
  } else if (num_logged + 1 >= p.log_len) {
    field(OUTCOME) = LOG_FULL;
  } else {
    const int block = p.block_tables[size_t(row) * p.max_blocks + position / p.block_size];
    field(SLOT) = block * p.block_size + position % p.block_size;
    field(CONTEXT_LEN) = position + 1;
  }
}
