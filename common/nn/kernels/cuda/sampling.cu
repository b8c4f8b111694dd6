// From rows of logits to tokens and their log-probabilities, as kernels/cpu/sampling.rs does it and with its rules for
// ties, masks and bad logits.
//
// Macro: LOGITS_BF16, 1 where logits are bf16, 0 where they are fp32.
//
// One pass over the row collects, per chunk, the largest logit and the mass relative to it; an unrestricted draw then
// reads one chunk more. Top-k and top-p find their last token by a radix search over the bits of the logits, three
// passes that skip every chunk without a candidate; nothing is sorted. Restricted masses are fixed-point integers,
// whose sums do not depend on the order in which threads arrive.
#include "prelude.cuh"

#if LOGITS_BF16
typedef Bf16 Logit;
#else
typedef float Logit;
#endif

constexpr int THREADS = 512;
// As on the CPU: small enough that an fp32 sum over it is exact to a few units in the last place.
constexpr int CHUNK = 512;
// At most 512 Ki logits a row.
constexpr int MAX_CHUNKS = 1024;
// A lane reads 8 neighbouring logits at a time.
constexpr int VECTOR = 8;
constexpr int ROUNDS = CHUNK / (WARP * VECTOR);
constexpr float TEMPERATURE_MIN = 1e-5f;
constexpr int BINS = 2048;
// Weights are at most 1, and 2^19 of them fit 64 bits.
constexpr float FIXED_ONE = 17592186044416.0f;

constexpr int STATUS_BAD_LOGIT = 1;
constexpr int STATUS_NOTHING_ALLOWED = 2;

struct Params {
  float temperature;
  u32 top_k;  // 0 keeps all
  float top_p;
  float min_p;
};

struct SampleShared {
  u64 bins[BINS];
  // Of each chunk, in fixed point: the mass of what is kept.
  u64 kept[MAX_CHUNKS];
  // Of each chunk: tokens that tie with the last one that top-p keeps.
  int ties[MAX_CHUNKS];
  float largest[MAX_CHUNKS];
  float masses[MAX_CHUNKS];
  u64 above;
  float floor;
  u32 key;
  int first_bad;
};

// What every thread knows of the row.
struct Row {
  const Logit* logits;
  int vocab;
  int num_chunks;
  // Whether vectors may be loaded: rows of an odd vocabulary start anywhere.
  bool aligned;
  float largest;
  float temperature;
  float sharpness;
  float min_p;
};

__device__ __forceinline__ int lane_index() { return threadIdx.x % WARP; }

__device__ __forceinline__ int first_lane(u32 lanes) { return __ffs(int(lanes)) - 1; }
__device__ __forceinline__ int last_lane(u32 lanes) { return WARP - 1 - __clz(int(lanes)); }

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
  return x;
}

// The sum of x over this lane and those before it.
template <class T>
__device__ __forceinline__ T warp_scan(T x) {
  for (int delta = 1; delta < WARP; delta *= 2) {
    const T other = __shfl_up_sync(ALL_LANES, x, delta);
    if (lane_index() >= delta) x += other;
  }
  return x;
}

// The lane before, 0 for the first.
template <class T>
__device__ __forceinline__ T previous(T x) {
  const T other = __shfl_up_sync(ALL_LANES, x, 1);
  return lane_index() == 0 ? T(0) : other;
}

__device__ __forceinline__ int first_token(int chunk, int round) {
  return chunk * CHUNK + (round * WARP + lane_index()) * VECTOR;
}

// This lane's logits of a round, in order of token id; -inf past the end.
__device__ __forceinline__ void load_round(const Row& row, int chunk, int round, float (&x)[VECTOR]) {
  const int token = first_token(chunk, round);
  if (row.aligned && token + VECTOR <= row.vocab) {
    load8(row.logits + token, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    x[i] = NEGATIVE_INFINITY;
    if (token + i < row.vocab) {
#if LOGITS_BF16
      x[i] = to_float(row.logits[token + i]);
#else
      x[i] = row.logits[token + i];
#endif
    }
  }
}

__device__ __forceinline__ float weight(const Row& row, float x) { return expf((x - row.largest) * row.sharpness); }

__device__ __forceinline__ u64 fixed_weight(float weight) { return u64(weight * FIXED_ONE); }

__device__ __forceinline__ double log_weight(const Row& row, float x) {
  return (double(x) - double(row.largest)) / double(row.temperature);
}

// Larger logits have larger keys; both zeros have the same.
__device__ __forceinline__ u32 to_key(float x) {
  const u32 bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_key(u32 key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ void summarise(const Row& row, SampleShared& shared) {
  for (int chunk = threadIdx.x / WARP; chunk < row.num_chunks; chunk += THREADS / WARP) {
    float x[ROUNDS][VECTOR];
    float largest = NEGATIVE_INFINITY;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      load_round(row, chunk, round, x[round]);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        largest = fmaxf(largest, x[round][i]);
        // Neither a NaN nor +inf is at most the largest number.
        if (!(x[round][i] <= 3.4028234663852886e38f)) atomicMin(&shared.first_bad, first_token(chunk, round) + i);
      }
    }
    largest = warp_max(largest);
    const float offset = largest == NEGATIVE_INFINITY ? 0 : largest;
    float mass = 0;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) mass += expf((x[round][i] - offset) * row.sharpness);
    }
    mass = warp_sum(mass);
    if (lane_index() == 0) {
      shared.largest[chunk] = largest;
      shared.masses[chunk] = mass;
    }
  }
}

__device__ __forceinline__ double chunk_mass(const Row& row, const SampleShared& shared, int chunk) {
  return double(shared.masses[chunk]) * exp(log_weight(row, shared.largest[chunk]));
}

// The chunks of this lane when a warp divides them in order.
struct Run {
  int begin;
  int end;
};

__device__ __forceinline__ Run lane_run(int num_chunks) {
  const int length = (num_chunks + WARP - 1) / WARP;
  const int begin = min(lane_index() * length, num_chunks);
  return {begin, min(begin + length, num_chunks)};
}

// The mass of the whole row, in every lane of the warp alike.
__device__ double total_mass(const Row& row, const SampleShared& shared) {
  double sum = 0;
  const Run run = lane_run(row.num_chunks);
  for (int chunk = run.begin; chunk < run.end; ++chunk) sum += chunk_mass(row, shared, chunk);
  return __shfl_sync(ALL_LANES, warp_scan(sum), WARP - 1);
}

// What one warp found.
struct Found {
  int token;
  float logit;
};

__device__ Found first_largest(const Row& row, const SampleShared& shared) {
  int chunk = 0;
  while (shared.largest[chunk] != row.largest) ++chunk;
  for (int round = 0;; ++round) {
    float x[VECTOR];
    load_round(row, chunk, round, x);
    int token = -1;
    for (int i = VECTOR - 1; i >= 0; --i) {
      if (x[i] == row.largest) token = first_token(chunk, round) + i;
    }
    const u32 lanes = __ballot_sync(ALL_LANES, token >= 0);
    if (lanes) return {__shfl_sync(ALL_LANES, token, first_lane(lanes)), row.largest};
  }
}

// Draws from the unrestricted distribution.
__device__ Found draw(const Row& row, const SampleShared& shared, double target) {
  double sum = 0;
  const Run run = lane_run(row.num_chunks);
  for (int chunk = run.begin; chunk < run.end; ++chunk) sum += chunk_mass(row, shared, chunk);
  const double through = warp_scan(sum), before_run = previous(through);
  // Rounding can leave the target at the very end; then it is the last token with any mass.
  const u32 past_run = __ballot_sync(ALL_LANES, through > target), with_mass = __ballot_sync(ALL_LANES, sum > 0);
  const int source = past_run ? first_lane(past_run) : last_lane(with_mass);
  int chosen = run.begin;
  double running = before_run, before = before_run;
  for (int chunk = run.begin; chunk < run.end && running <= target; ++chunk) {
    const double mass = chunk_mass(row, shared, chunk);
    if (mass > 0) {
      chosen = chunk;
      before = running;
    }
    running += mass;
  }
  const int chunk = __shfl_sync(ALL_LANES, chosen, source);
  // Relative to the chunk's own largest, so that its weights never all vanish.
  const float offset = shared.largest[chunk];
  const double scale = exp(log_weight(row, offset));
  target = (target - __shfl_sync(ALL_LANES, before, source)) / scale;

  Found last = {0, 0};
  double base = 0;
  for (int round = 0; round < ROUNDS; ++round) {
    float x[VECTOR];
    load_round(row, chunk, round, x);
    double lane_sum = 0;
    for (int i = 0; i < VECTOR; ++i) lane_sum += double(expf((x[i] - offset) * row.sharpness));
    const double scan = warp_scan(lane_sum);
    const u32 past = __ballot_sync(ALL_LANES, base + scan > target);
    const u32 positive = __ballot_sync(ALL_LANES, lane_sum > 0);
    double running = base + previous(scan);
    Found own = {0, 0};
    for (int i = 0; i < VECTOR; ++i) {
      const double w = double(expf((x[i] - offset) * row.sharpness));
      if (w > 0 && running <= target) own = {first_token(chunk, round) + i, x[i]};
      running += w;
    }
    if (past | positive) {
      const int lane = past ? first_lane(past) : last_lane(positive);
      last = {__shfl_sync(ALL_LANES, own.token, lane), __shfl_sync(ALL_LANES, own.logit, lane)};
    }
    if (past) break;
    base += __shfl_sync(ALL_LANES, scan, WARP - 1);
  }
  return last;
}

// A logit that at least `k` chunks reach: at least as many tokens do. -inf if there are fewer chunks.
__device__ void kth_peak(const Row& row, SampleShared& shared, u32 k) {
  if (threadIdx.x == 0) shared.floor = NEGATIVE_INFINITY;
  __syncthreads();
  if (k <= u32(row.num_chunks)) {
    for (int chunk = threadIdx.x; chunk < row.num_chunks; chunk += THREADS) {
      const float own = shared.largest[chunk];
      u32 rank = 0;
      for (int other = 0; other < row.num_chunks; ++other) {
        const float x = shared.largest[other];
        rank += x > own || (x == own && other < chunk);
      }
      if (rank == k - 1) shared.floor = own;
    }
  }
  __syncthreads();
}

// Sets shared.key to the largest key for which the candidates (logits of at least `floor`) with that key or a larger
// one measure `target` or more, and shared.above to the measure of those with a larger one. A token measures its weight
// or, BY_COUNT, one. If all measure less, both are 0.
template <bool BY_COUNT>
__device__ void find_cut(const Row& row, SampleShared& shared, float floor, u64 target) {
  if (threadIdx.x == 0) {
    shared.key = 0;
    shared.above = 0;
  }
  // Eleven, eleven and ten bits, from the top.
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? 21 : level == 1 ? 10 : 0;
    const int num_bins = level == 2 ? BINS / 2 : BINS;
    for (int bin = threadIdx.x; bin < num_bins; bin += THREADS) shared.bins[bin] = 0;
    __syncthreads();
    const u32 prefix = shared.key;
    for (int chunk = threadIdx.x / WARP; chunk < row.num_chunks; chunk += THREADS / WARP) {
      if (shared.largest[chunk] < floor) continue;
      for (int round = 0; round < ROUNDS; ++round) {
        float x[VECTOR];
        load_round(row, chunk, round, x);
        for (int i = 0; i < VECTOR; ++i) {
          if (!(x[i] >= floor) || x[i] == NEGATIVE_INFINITY) continue;
          const u32 key = to_key(x[i]);
          if (level > 0 && (key ^ prefix) >> (level == 1 ? 21 : 10) != 0) continue;
          const u64 measure = BY_COUNT ? 1 : fixed_weight(weight(row, x[i]));
          atomicAdd(&shared.bins[key >> shift & (num_bins - 1)], measure);
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < WARP) {
      // Lane 0 has the highest bins. Each starts at another one, so that they do not all ask the same bank.
      const int per_lane = num_bins / WARP, first = num_bins - (lane_index() + 1) * per_lane;
      u64 sum = 0;
      for (int i = 0; i < per_lane; ++i) sum += shared.bins[first + (i + lane_index()) % per_lane];
      const u64 through = shared.above + warp_scan(sum);
      const u32 lanes = __ballot_sync(ALL_LANES, through >= target);
      if (lanes && lane_index() == first_lane(lanes)) {
        u64 above = through - sum;
        int bin = first + per_lane - 1;
        while (above + shared.bins[bin] < target) above += shared.bins[bin--];
        shared.above = above;
        shared.key = prefix | u32(bin) << shift;
      }
    }
    __syncthreads();
  }
}

// What is kept of the candidates: those above `key`, and of those at `key` the first `num_ties` in order of token id.
struct Cut {
  float floor;
  u32 key;
  u64 num_ties;
};

// The mass of a candidate above the cut, 0 for others.
__device__ __forceinline__ u64 mass_above(const Row& row, const Cut& cut, float x) {
  if (!(x >= cut.floor) || x == NEGATIVE_INFINITY || to_key(x) <= cut.key) return 0;
  const float w = weight(row, x);
  return w >= row.min_p ? fixed_weight(w) : 0;
}

__device__ __forceinline__ bool is_tie(const Cut& cut, float x) {
  return x >= cut.floor && x != NEGATIVE_INFINITY && to_key(x) == cut.key;
}

// Fills shared.kept and shared.ties.
__device__ void measure_chunks(const Row& row, SampleShared& shared, const Cut& cut) {
  for (int chunk = threadIdx.x / WARP; chunk < row.num_chunks; chunk += THREADS / WARP) {
    u64 mass = 0;
    int ties = 0;
    if (shared.largest[chunk] >= cut.floor) {
      for (int round = 0; round < ROUNDS; ++round) {
        float x[VECTOR];
        load_round(row, chunk, round, x);
        for (int i = 0; i < VECTOR; ++i) {
          mass += mass_above(row, cut, x[i]);
          ties += is_tie(cut, x[i]);
        }
      }
    }
    mass = warp_sum(mass);
    ties = warp_sum(ties);
    if (lane_index() == 0) {
      shared.kept[chunk] = mass;
      shared.ties[chunk] = ties;
    }
  }
  __syncthreads();
}

__device__ __forceinline__ u64 num_kept_ties(const Cut& cut, u64 ties_before, u64 ties) {
  return cut.num_ties <= ties_before ? 0 : min(cut.num_ties - ties_before, ties);
}

// Draws among what is kept: all of one warp. Sets `total` to its mass.
__device__ Found draw_kept(const Row& row, const SampleShared& shared, const Cut& cut, float uniform, u64& total) {
  const float tie_weight = cut.key ? weight(row, from_key(cut.key)) : 0;
  const u64 tie_mass = tie_weight >= row.min_p ? fixed_weight(tie_weight) : 0;
  const Run run = lane_run(row.num_chunks);
  u64 ties = 0;
  for (int chunk = run.begin; chunk < run.end; ++chunk) ties += shared.ties[chunk];
  const u64 ties_before_run = previous(warp_scan(ties));
  u64 mass = 0, ties_before = ties_before_run;
  for (int chunk = run.begin; chunk < run.end; ++chunk) {
    mass += shared.kept[chunk] + num_kept_ties(cut, ties_before, shared.ties[chunk]) * tie_mass;
    ties_before += shared.ties[chunk];
  }
  const u64 through = warp_scan(mass);
  total = __shfl_sync(ALL_LANES, through, WARP - 1);
  u64 target = min(u64(double(uniform) * double(total)), total - 1);

  int chosen = 0;
  u64 before = through - mass;
  ties_before = ties_before_run;
  for (int chunk = run.begin; chunk < run.end; ++chunk) {
    chosen = chunk;
    const u64 own = shared.kept[chunk] + num_kept_ties(cut, ties_before, shared.ties[chunk]) * tie_mass;
    if (before + own > target) break;
    before += own;
    ties_before += shared.ties[chunk];
  }
  const int source = first_lane(__ballot_sync(ALL_LANES, through > target));
  const int chunk = __shfl_sync(ALL_LANES, chosen, source);
  target -= __shfl_sync(ALL_LANES, before, source);
  ties_before = __shfl_sync(ALL_LANES, ties_before, source);

  for (int round = 0;; ++round) {
    float x[VECTOR];
    load_round(row, chunk, round, x);
    u64 lane_ties = 0;
    for (int i = 0; i < VECTOR; ++i) lane_ties += is_tie(cut, x[i]);
    const u64 ties_through = warp_scan(lane_ties);
    u64 rank = ties_before + ties_through - lane_ties, masses[VECTOR], lane_mass = 0;
    for (int i = 0; i < VECTOR; ++i) {
      masses[i] = mass_above(row, cut, x[i]);
      if (is_tie(cut, x[i]) && rank++ < cut.num_ties) masses[i] = tie_mass;
      lane_mass += masses[i];
    }
    const u64 mass_through = warp_scan(lane_mass);
    const u32 lanes = __ballot_sync(ALL_LANES, mass_through > target);
    Found own = {0, 0};
    u64 running = mass_through - lane_mass;
    for (int i = 0; i < VECTOR && running <= target; ++i) {
      if (masses[i] > 0) own = {first_token(chunk, round) + i, x[i]};
      running += masses[i];
    }
    if (lanes || round + 1 == ROUNDS) {
      const int lane = lanes ? first_lane(lanes) : 0;
      return {__shfl_sync(ALL_LANES, own.token, lane), __shfl_sync(ALL_LANES, own.logit, lane)};
    }
    target -= __shfl_sync(ALL_LANES, mass_through, WARP - 1);
    ties_before += __shfl_sync(ALL_LANES, ties_through, WARP - 1);
  }
}

// A logit below which nothing can be kept. Threads agree on it.
__device__ float candidate_floor(const Row& row, SampleShared& shared, const Params& params, double total) {
  if (params.top_k > 0) {
    kth_peak(row, shared, params.top_k);
    return shared.floor;
  }
  // Tokens that weigh less than this weigh less than 1 - top_p of the whole even all together.
  const double enough = params.top_p < 1 ? (1 - double(params.top_p)) * total / row.vocab : 0;
  // The margin is wider than any rounding on the way.
  const double weight = fmax(enough, double(params.min_p)) * 0.99;
  const double floor = double(row.largest) + double(row.temperature) * log(weight);
  return float(floor - fabs(floor) * 1e-6);
}

// What top-k and top-p leave. `total` is the mass of the row.
__device__ Cut restrict_row(const Row& row, SampleShared& shared, const Params& params, double total) {
  Cut cut = {candidate_floor(row, shared, params, total), 0, 0};
  double mass = total;
  if (params.top_k > 0) {
    find_cut<true>(row, shared, cut.floor, params.top_k);
    // Everything that ties with the last one is kept.
    if (shared.key) cut.floor = from_key(shared.key);
    if (params.top_p < 1) {
      Row all = row;
      all.min_p = 0;
      measure_chunks(all, shared, cut);
      u64 kept = 0;
      for (int chunk = lane_index(); chunk < row.num_chunks; chunk += WARP) kept += shared.kept[chunk];
      mass = double(warp_sum(kept)) / double(FIXED_ONE);
      __syncthreads();
    }
  }
  if (params.top_p < 1) {
    const u64 target = max(u64(ceil(double(params.top_p) * mass * double(FIXED_ONE))), u64(1));
    find_cut<false>(row, shared, cut.floor, target);
    cut.key = shared.key;
    if (cut.key) {
      const u64 tie = max(fixed_weight(weight(row, from_key(cut.key))), u64(1));
      cut.num_ties = (target - shared.above + tie - 1) / tie;
    }
  }
  return cut;
}

struct Sample {
  const Logit* logits;      // [rows, V]; -inf marks a token that must not be chosen
  const Params* params;     // [rows], checked by the host
  const float* uniforms;    // [rows], in 0..1
  const int* context_lens;  // [rows], 0 for a row that is not in use; or null
  int* tokens;              // [rows]; after a bad logit, where it stands
  float* log_probs;         // [rows], of the distribution drawn from
  int* statuses;            // [rows], 0 for success
  int vocab;
};

// Temperature, then top-k, then top-p, then min-p, each on what the one before left; then the inverse of the cumulative
// distribution, in order of token id. Below a temperature of 1e-5, the most likely token.
// Grid of rows, 512 threads. Moves the row once, and 1 KiB; restricted rows up to five times, out of L2.
KERNEL(sample, 512)
(Sample p) {
  SHARED(SampleShared, shared);
  const int index = blockIdx.x;
  if (p.context_lens && p.context_lens[index] == 0) return;
  const Params params = p.params[index];
  const bool greedy = params.temperature < TEMPERATURE_MIN;
  Row row;
  row.logits = p.logits + size_t(index) * p.vocab;
  row.vocab = p.vocab;
  row.num_chunks = (p.vocab + CHUNK - 1) / CHUNK;
  row.aligned = u64(row.logits) % 16 == 0;
  row.temperature = greedy ? 1 : params.temperature;
  row.sharpness = 1 / row.temperature;
  row.min_p = params.min_p;
  if (threadIdx.x == 0) shared.first_bad = p.vocab;
  __syncthreads();
  summarise(row, shared);
  __syncthreads();

  float largest = NEGATIVE_INFINITY;
  for (int chunk = lane_index(); chunk < row.num_chunks; chunk += WARP) largest = fmaxf(largest, shared.largest[chunk]);
  row.largest = warp_max(largest);
  if (shared.first_bad < p.vocab || row.largest == NEGATIVE_INFINITY) {
    if (threadIdx.x == 0) {
      const bool bad = shared.first_bad < p.vocab;
      p.tokens[index] = bad ? shared.first_bad : 0;
      p.log_probs[index] = NEGATIVE_INFINITY;
      p.statuses[index] = bad ? STATUS_BAD_LOGIT : STATUS_NOTHING_ALLOWED;
    }
    return;
  }

  const bool restricted = !greedy && (params.top_k > 0 || params.top_p < 1 || params.min_p > 0);
  if (!restricted && threadIdx.x >= WARP) return;
  const double total = total_mass(row, shared);
  Found found;
  double log_total = log(total);
  if (greedy) {
    found = first_largest(row, shared);
  } else if (!restricted) {
    found = draw(row, shared, double(p.uniforms[index]) * total);
  } else {
    const Cut cut = restrict_row(row, shared, params, total);
    measure_chunks(row, shared, cut);
    if (threadIdx.x >= WARP) return;
    u64 kept;
    found = draw_kept(row, shared, cut, p.uniforms[index], kept);
    log_total = log(double(kept) / double(FIXED_ONE));
  }
  if (threadIdx.x == 0) {
    p.tokens[index] = found.token;
    p.log_probs[index] = float(log_weight(row, found.logit) - log_total);
    p.statuses[index] = 0;
  }
}

// Masks the tokens that may not end a row yet.
// Grid of rows, 32 threads. Moves one logit a stop token.
KERNEL(suppress, 32)
(Logit* logits, const int* context_lens, const int* num_generated, const int* min_tokens, const int* stop_tokens,
 int max_stops, int vocab) {
  const int row = blockIdx.x;
  if (context_lens[row] == 0 || num_generated[row] >= min_tokens[row]) return;
  for (int i = threadIdx.x; i < max_stops; i += WARP) {
    const int token = stop_tokens[size_t(row) * max_stops + i];
    if (token < 0) continue;
#if LOGITS_BF16
    logits[size_t(row) * vocab + token] = Bf16{0xff80};
#else
    logits[size_t(row) * vocab + token] = NEGATIVE_INFINITY;
#endif
  }
}
