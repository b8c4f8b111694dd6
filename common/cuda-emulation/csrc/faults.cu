// Kernels with one mistake each, for the emulator's own tests.
#include "prelude.cuh"

struct Row {
  int values[64];
};

// Each thread takes its neighbour's value; with a barrier in between, in every order the same.
KERNEL(neighbours, 64)
(int* out, int with_barrier) {
  SHARED(Row, row);
  row.values[threadIdx.x] = threadIdx.x;
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = row.values[(threadIdx.x + 1) % 64];
}

KERNEL(divided_barrier, 64)
(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[0] = 1;
}

KERNEL(missing_lanes, 64)
(int* out) {
  if (threadIdx.x % 32 < 7) return;
  out[0] = __shfl_xor_sync(ALL_LANES, 1, 1);
}

KERNEL(missing_threads, 64)
(int* out) {
  if (threadIdx.x < 32) return;
  __syncthreads();
  out[0] = 1;
}

KERNEL(misaligned, 64)
(int* out) { store(out + 1, uint4{0, 0, 0, 0}); }

KERNEL(past_shared_memory, 64)
(int* out) {
  SHARED(Row, row);
  row.values[threadIdx.x + 1] = 0;
  out[0] = row.values[0];
}
