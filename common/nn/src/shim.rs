//! The C++ shim (`csrc/shim.h`): declarations, and the rules for what it hands over.

use std::ffi::{CStr, c_char, c_int, c_void};
use torch_sys::C_tensor;

/// What libtorch threw, as text.
pub(crate) type Message = String;

#[repr(C)]
pub(crate) struct AhaStore {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct AhaGroup {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct AhaWork {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct AhaGraph {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct AhaGroupOptions {
    pub(crate) rank: i32,
    pub(crate) size: i32,
    pub(crate) timeout_ms: i64,
    pub(crate) host: *const c_char,
    pub(crate) interface: *const c_char,
    pub(crate) device: i32,
}

#[repr(C)]
pub(crate) struct AhaAdamW {
    pub(crate) learning_rate: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) epsilon: f64,
    pub(crate) weight_decay: f64,
}

#[repr(C)]
pub(crate) struct AhaPackedHeads {
    pub(crate) q: *const C_tensor,
    pub(crate) k: *const C_tensor,
    pub(crate) v: *const C_tensor,
}

#[repr(C)]
pub(crate) struct AhaSequences {
    pub(crate) query_starts: *const C_tensor,
    pub(crate) key_starts: *const C_tensor,
    pub(crate) max_queries: i64,
    pub(crate) max_keys: i64,
    pub(crate) is_causal: bool,
}

#[repr(C)]
pub(crate) struct AhaBackward {
    pub(crate) call: unsafe extern "C" fn(*mut c_void, *const *const C_tensor, usize, *mut *mut C_tensor, usize),
    pub(crate) drop: unsafe extern "C" fn(*mut c_void),
    pub(crate) closure: *mut c_void,
}

unsafe extern "C" {
    pub(crate) fn aha_string_free(message: *mut c_char);
    pub(crate) safe fn aha_torch_config() -> *mut c_char;

    pub(crate) fn aha_store_host(
        listen_fd: c_int,
        host: *const c_char,
        port: u16,
        timeout_ms: i64,
        out: *mut *mut AhaStore,
    ) -> *mut c_char;
    pub(crate) fn aha_store_connect(
        host: *const c_char,
        port: u16,
        timeout_ms: i64,
        out: *mut *mut AhaStore,
    ) -> *mut c_char;
    pub(crate) fn aha_store_scoped(
        store: *const AhaStore,
        prefix: *const c_char,
        timeout_ms: i64,
        out: *mut *mut AhaStore,
    ) -> *mut c_char;
    pub(crate) fn aha_store_set(store: *const AhaStore, key: *const c_char, data: *const u8, len: usize)
    -> *mut c_char;
    pub(crate) fn aha_store_get(
        store: *const AhaStore,
        key: *const c_char,
        timeout_ms: i64,
        data: *mut *mut u8,
        len: *mut usize,
    ) -> *mut c_char;
    pub(crate) fn aha_store_add(store: *const AhaStore, key: *const c_char, delta: i64, sum: *mut i64) -> *mut c_char;
    pub(crate) fn aha_store_free(store: *mut AhaStore);

    pub(crate) safe fn aha_nccl_built() -> bool;
    pub(crate) fn aha_gloo_new(
        store: *const AhaStore,
        options: *const AhaGroupOptions,
        out: *mut *mut AhaGroup,
    ) -> *mut c_char;
    pub(crate) fn aha_nccl_new(
        store: *const AhaStore,
        options: *const AhaGroupOptions,
        out: *mut *mut AhaGroup,
    ) -> *mut c_char;
    pub(crate) fn aha_group_all_reduce(
        group: *mut AhaGroup,
        tensor: *const C_tensor,
        reduce_op: i32,
        out: *mut *mut AhaWork,
    ) -> *mut c_char;
    pub(crate) fn aha_group_reduce_scatter(
        group: *mut AhaGroup,
        output: *const C_tensor,
        input: *const C_tensor,
        reduce_op: i32,
        out: *mut *mut AhaWork,
    ) -> *mut c_char;
    pub(crate) fn aha_group_all_gather(
        group: *mut AhaGroup,
        output: *const C_tensor,
        input: *const C_tensor,
        out: *mut *mut AhaWork,
    ) -> *mut c_char;
    pub(crate) fn aha_group_broadcast(
        group: *mut AhaGroup,
        tensor: *const C_tensor,
        root: i64,
        out: *mut *mut AhaWork,
    ) -> *mut c_char;
    pub(crate) fn aha_group_barrier(group: *mut AhaGroup, out: *mut *mut AhaWork) -> *mut c_char;
    pub(crate) fn aha_group_abort(group: *mut AhaGroup) -> *mut c_char;
    pub(crate) fn aha_group_free(group: *mut AhaGroup);
    pub(crate) fn aha_work_wait(work: *mut AhaWork, timeout_ms: i64) -> *mut c_char;
    pub(crate) fn aha_work_is_completed(work: *const AhaWork) -> bool;
    pub(crate) fn aha_work_free(work: *mut AhaWork);

    pub(crate) fn aha_autograd_grad(
        outputs: *const *const C_tensor,
        grad_outputs: *const *const C_tensor,
        num_outputs: usize,
        inputs: *const *const C_tensor,
        grads: *mut *mut C_tensor,
        num_inputs: usize,
        allow_unused: bool,
    ) -> *mut c_char;

    pub(crate) fn aha_record(
        inputs: *const *const C_tensor,
        num_inputs: usize,
        outputs: *const *mut C_tensor,
        num_outputs: usize,
        backward: AhaBackward,
    ) -> *mut c_char;
    pub(crate) fn aha_matmul(a: *const C_tensor, b: *const C_tensor, out: *const C_tensor, adds: bool) -> *mut c_char;
    pub(crate) fn aha_linear(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        addend: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn aha_flash_attention(
        heads: *const AhaPackedHeads,
        sequences: *const AhaSequences,
        out: *mut *mut C_tensor,
        log_sums: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn aha_parallel_for(
        end: i64,
        grain: i64,
        body: unsafe extern "C" fn(*mut c_void, i64, i64),
        data: *mut c_void,
    );

    pub(crate) fn aha_swap_memory(a: *const C_tensor, b: *const C_tensor) -> *mut c_char;
    pub(crate) fn aha_memory_bytes(tensor: *const C_tensor) -> usize;

    pub(crate) fn aha_fused_adamw(
        param: *const C_tensor,
        grad: *const C_tensor,
        exp_avg: *const C_tensor,
        exp_avg_sq: *const C_tensor,
        step: f64,
        options: *const AhaAdamW,
    ) -> *mut c_char;

    pub(crate) fn aha_current_stream(device: i32, stream: *mut *mut c_void) -> *mut c_char;

    pub(crate) fn aha_cache_cpu_memory();
    pub(crate) fn aha_map_large_blocks();
    pub(crate) fn aha_release_cpu_memory();

    pub(crate) fn aha_set_device(device: i32) -> *mut c_char;

    pub(crate) fn aha_peak_memory(device: i32, bytes: *mut u64) -> *mut c_char;
    pub(crate) fn aha_used_memory(device: i32, bytes: *mut u64) -> *mut c_char;
    pub(crate) fn aha_cuda_own_stream(device: i32) -> *mut c_char;
    pub(crate) fn aha_cuda_synchronize(device: i32) -> *mut c_char;
    pub(crate) fn aha_cuda_empty_cache() -> *mut c_char;
    pub(crate) fn aha_graph_begin(out: *mut *mut AhaGraph) -> *mut c_char;
    pub(crate) fn aha_graph_end(graph: *mut AhaGraph) -> *mut c_char;
    pub(crate) fn aha_graph_replay(graph: *mut AhaGraph) -> *mut c_char;
    pub(crate) fn aha_graph_free(graph: *mut AhaGraph);
}

/// Turns what a shim function returned into a `Result`.
///
/// # Safety
/// `message` is what a shim function returned just now: null, or a message that nobody has freed.
pub(crate) unsafe fn check(message: *mut c_char) -> Result<(), Message> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns a NUL-terminated string, and the caller says that it is still alive.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().trim().to_owned();
    // SAFETY: the string is ours to free, `text` is a copy, and nothing else refers to it.
    unsafe { aha_string_free(message) };
    Err(text)
}
