// The C interface to the parts of libtorch that tch leaves out. The Rust declarations are in src/shim.rs; keep the two
// in step.
//
// A function that can fail returns null on success, or a message that the caller owns and frees with `aha_string_free`.
// No C++ exception leaves it. Tensors are passed as tch passes them: a pointer to an at::Tensor that the caller owns.
#pragma once

#include <cstddef>
#include <cstdint>

namespace at {
class Tensor;
}

struct AhaStore;
struct AhaGroup;
struct AhaWork;
struct AhaGraph;

struct AhaGroupOptions {
  int32_t rank;
  int32_t size;
  int64_t timeout_ms;
  // Exactly one of the two is set for Gloo: which address, or which network interface, to listen on.
  const char* host;
  const char* interface;
  // CUDA device index, for NCCL.
  int32_t device;
};

struct AhaAdamW {
  double learning_rate;
  double beta1;
  double beta2;
  double epsilon;
  double weight_decay;
};

// [rows, heads, D]; k and v have the same number of heads, which divides that of q.
struct AhaPackedHeads {
  const at::Tensor* q;
  const at::Tensor* k;
  const at::Tensor* v;
};

// Sequence i has rows starts[i] to starts[i + 1] of queries and of keys; int32, on the device, one more than sequences.
struct AhaSequences {
  const at::Tensor* query_starts;
  const at::Tensor* key_starts;
  int64_t max_queries;
  int64_t max_keys;
  bool is_causal;
};

struct AhaBackward {
  void (*call)(void* closure, const at::Tensor* const* grads, size_t num_outputs, at::Tensor** input_grads,
               size_t num_inputs);
  void (*drop)(void* closure);
  void* closure;
};

extern "C" {
void aha_string_free(char* message);

// Takes over `listen_fd`, a listening socket on `port`, and serves the store from a thread of its own.
char* aha_store_host(int listen_fd, const char* host, uint16_t port, int64_t timeout_ms, AhaStore** out);
char* aha_store_connect(const char* host, uint16_t port, int64_t timeout_ms, AhaStore** out);
// A second connection to the same server whose keys all begin with `prefix`.
char* aha_store_scoped(const AhaStore* store, const char* prefix, int64_t timeout_ms, AhaStore** out);
char* aha_store_set(const AhaStore* store, const char* key, const uint8_t* data, size_t len);
// Waits for the key. The bytes belong to the caller and are freed with `aha_string_free`.
char* aha_store_get(const AhaStore* store, const char* key, int64_t timeout_ms, uint8_t** data, size_t* len);
char* aha_store_add(const AhaStore* store, const char* key, int64_t delta, int64_t* sum);
void aha_store_free(AhaStore* store);

bool aha_nccl_built(void);
char* aha_gloo_new(const AhaStore* store, const AhaGroupOptions* options, AhaGroup** out);
char* aha_nccl_new(const AhaStore* store, const AhaGroupOptions* options, AhaGroup** out);
// `reduce_op`: 0 sum, 1 max, 2 min. Each collective only starts here; `aha_work_wait` finishes it.
char* aha_group_all_reduce(AhaGroup* group, at::Tensor* tensor, int32_t reduce_op, AhaWork** out);
char* aha_group_reduce_scatter(AhaGroup* group, at::Tensor* output, at::Tensor* input, int32_t reduce_op, AhaWork** out);
char* aha_group_all_gather(AhaGroup* group, at::Tensor* output, at::Tensor* input, AhaWork** out);
char* aha_group_broadcast(AhaGroup* group, at::Tensor* tensor, int64_t root, AhaWork** out);
char* aha_group_barrier(AhaGroup* group, AhaWork** out);
// May be called from any thread while others wait.
char* aha_group_abort(AhaGroup* group);
void aha_group_free(AhaGroup* group);
char* aha_work_wait(AhaWork* work, int64_t timeout_ms);
bool aha_work_is_completed(const AhaWork* work);
void aha_work_free(AhaWork* work);

// `grad_outputs[i]` may be null (a scalar output), and so may `grads[i]` become (an unused input). The tensors in `grads`
// belong to the caller.
char* aha_autograd_grad(at::Tensor* const* outputs, at::Tensor* const* grad_outputs, size_t num_outputs,
                        at::Tensor* const* inputs, at::Tensor** grads, size_t num_inputs, bool allow_unused);

// Makes `outputs`, which have no history, the results of a function of `inputs`: the backward pass gives `backward` the
// gradient of each (null where none flows) and takes those of `inputs`, which it fills in as tensors that the caller
// allocated, or leaves null. The closure is used up by `call` or `drop`, exactly one of them; at once by `drop` where
// nobody asks for gradients, or after an error.
char* aha_record(const at::Tensor* const* inputs, size_t num_inputs, at::Tensor* const* outputs, size_t num_outputs,
                 AhaBackward backward);
// x W^T + bias + addend without a graph; both may be null. By oneDNN in fp32 on the CPU.
char* aha_linear(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias, const at::Tensor* addend,
                 at::Tensor** out);
// Writes a b to `out`, or adds it, without a graph. By oneDNN in fp32 on the CPU. a and b may be transposed.
char* aha_matmul(const at::Tensor* a, const at::Tensor* b, const at::Tensor* out, bool adds);
// CUDA, bf16 or fp16: `out` [rows, H, D] and `log_sums` [H, rows], fp32, without a graph.
char* aha_flash_attention(const AhaPackedHeads* heads, const AhaSequences* sequences, at::Tensor** out,
                          at::Tensor** log_sums);
// Calls `body` with ranges that cover 0..end, at least `grain` long but the last, on libtorch's threads.
void aha_parallel_for(int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* data);

// Exchanges what the storages of two tensors refer to, on one device: their views follow, their versions stay.
char* aha_swap_memory(at::Tensor* a, at::Tensor* b);
// Of the storage that a tensor is a view of; 0 while another one has it.
size_t aha_memory_bytes(const at::Tensor* tensor);

char* aha_fused_adamw(at::Tensor* param, at::Tensor* grad, at::Tensor* exp_avg, at::Tensor* exp_avg_sq, double step,
                      const AhaAdamW* options);

// How the loaded libtorch was built, as text for people; freed with `aha_string_free`.
char* aha_torch_config(void);

// The CUDA stream that libtorch's operators on `device` are queued on.
char* aha_current_stream(int32_t device, void** out);

// Tensors on the CPU that are made from now on take their memory from a cache of large blocks.
void aha_cache_cpu_memory(void);
// Lets malloc take large blocks from the system one by one, and give each back when it is freed.
void aha_map_large_blocks(void);
// Gives what the cache and malloc hold unused back to the system.
void aha_release_cpu_memory(void);

// Makes `device` this thread's.
char* aha_set_device(int32_t device);

// The most bytes that tensors on CUDA `device` ever had at once.
char* aha_peak_memory(int32_t device, uint64_t* bytes);

// The bytes of CUDA `device` that anybody has.
char* aha_used_memory(int32_t device, uint64_t* bytes);

// Makes `device` this thread's, with a stream that nobody else queues on.
char* aha_cuda_own_stream(int32_t device);
// Waits for what this thread has queued on `device`.
char* aha_cuda_synchronize(int32_t device);
// Gives the memory that libtorch keeps for later back to the driver.
char* aha_cuda_empty_cache(void);
// What this thread queues between the two calls is captured, not performed. Freed with `aha_graph_free` in any case.
char* aha_graph_begin(AhaGraph** out);
char* aha_graph_end(AhaGraph* graph);
char* aha_graph_replay(AhaGraph* graph);
void aha_graph_free(AhaGraph* graph);
}
