//! Differentiable functions whose backward pass is written here: `torch.autograd.Function`.
//!
//! They keep what their closures capture and nothing else. The memory of an input that a closure did not capture may be
//! written again.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::ptr;
use std::thread::{self, ThreadId};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::shim::{self, AhaBackward, aha_linear, aha_matmul, aha_parallel_for, aha_record};

/// From the gradients of the outputs (`None` where none flows) to those of the inputs.
type Backward = Box<dyn FnOnce(Vec<Option<Tensor>>) -> Vec<Option<Tensor>>>;

/// What libtorch's graph holds of a function.
struct Closure {
    backward: Backward,
    /// The only thread that may use it. `autograd::grad` runs a graph on the thread that asks for gradients.
    thread: ThreadId,
}

/// Makes `outputs` the results of a function of `inputs`.
///
/// `backward` takes the gradient of each output and returns that of each input; it captures tensors detached, and runs
/// at most once, on this thread.
///
/// # Panics
/// If an output has a history already.
pub(crate) fn differentiable<const N: usize>(
    inputs: &[&Tensor],
    outputs: [Tensor; N],
    backward: impl FnOnce(Vec<Option<Tensor>>) -> Vec<Option<Tensor>> + 'static,
) -> [Tensor; N] {
    let closure = Box::new(Closure { backward: Box::new(backward), thread: thread::current().id() });
    let backward = AhaBackward { call, drop: drop_closure, closure: Box::into_raw(closure).cast() };
    let input_ptrs: Vec<_> = inputs.iter().map(|input| input.as_ptr()).collect();
    let output_ptrs: Vec<_> = outputs.iter().map(|output| output.as_ptr().cast_mut()).collect();
    // SAFETY: every pointer is a live tensor, the arrays are as long as said; the shim uses the closure up once.
    let message =
        unsafe { aha_record(input_ptrs.as_ptr(), inputs.len(), output_ptrs.as_ptr(), outputs.len(), backward) };
    // SAFETY: the shim returned `message` just now.
    if let Err(reason) = unsafe { shim::check(message) } {
        panic!("recording a function of {} inputs: {reason}", inputs.len());
    }
    outputs
}

/// # Safety
/// `closure` is what `differentiable` handed over, not used up; the arrays are as long as said; those of `grads` that
/// are not null are live tensors; `input_grads` may be written.
unsafe extern "C" fn call(
    closure: *mut c_void,
    grads: *const *const C_tensor,
    num_outputs: usize,
    input_grads: *mut *mut C_tensor,
    num_inputs: usize,
) {
    // SAFETY: the caller vouches that it is the box that `differentiable` made.
    let closure = unsafe { take(closure) };
    // SAFETY: the caller vouches for the array.
    let grads = unsafe { std::slice::from_raw_parts(grads, num_outputs) };
    // SAFETY: a pointer that is not null is a live tensor; the clone shares it.
    let clone = |grad: &*const C_tensor| (!grad.is_null()).then(|| unsafe { Tensor::clone_from_ptr(grad.cast_mut()) });
    let results = (closure.backward)(grads.iter().map(clone).collect());
    assert_eq!(results.len(), num_inputs, "a backward pass gives a gradient for every input");
    for (index, result) in results.into_iter().enumerate() {
        if let Some(grad) = result {
            // The shim takes over the tensor.
            let grad = ManuallyDrop::new(grad);
            // SAFETY: the array has `num_inputs` places.
            unsafe { *input_grads.add(index) = grad.as_ptr().cast_mut() };
        }
    }
}

/// # Safety
/// `closure` is what `differentiable` handed over, not used up.
unsafe extern "C" fn drop_closure(closure: *mut c_void) {
    // SAFETY: forwarded to the caller.
    drop(unsafe { take(closure) });
}

/// # Panics
/// On another thread than the one that made it, which ends the process, as there is C++ above.
///
/// # Safety
/// `closure` is what `differentiable` handed over, not used up.
unsafe fn take(closure: *mut c_void) -> Box<Closure> {
    // SAFETY: forwarded to the caller.
    let closure = unsafe { Box::from_raw(closure.cast::<Closure>()) };
    assert_eq!(
        closure.thread,
        thread::current().id(),
        "a graph stays on its thread: ask for gradients by autograd::grad"
    );
    closure
}

/// `x W^T + bias + addend`, by oneDNN where libtorch has it. No gradient flows.
///
/// # Shapes
/// - x: `[N, in]`, weight: `[out, in]`, bias: `[out]`, addend: `[N, out]`; returns `[N, out]`. fp32 on the CPU; x and
///   weight may be transposed.
///
/// # Panics
/// If libtorch refuses them.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, addend: Option<&Tensor>) -> Tensor {
    let pointer = |tensor: Option<&Tensor>| tensor.map_or(ptr::null(), Tensor::as_ptr);
    let mut out = ptr::null_mut();
    // SAFETY: the pointers are live tensors, or null where the shim allows it; it writes `out` only when it succeeds.
    let message = unsafe { aha_linear(x.as_ptr(), weight.as_ptr(), pointer(bias), pointer(addend), &raw mut out) };
    // SAFETY: the shim returned `message` just now.
    if let Err(reason) = unsafe { shim::check(message) } {
        panic!("{:?} times {:?}: {reason}", x.size(), weight.size());
    }
    // SAFETY: the shim allocated the tensor for us to own.
    unsafe { Tensor::from_ptr(out) }
}

/// `a b`, by oneDNN where libtorch has it. No gradient flows.
///
/// # Shapes
/// - a: `[M, K]`, b: `[K, N]`, of one type; either may be transposed. Returns `[M, N]`.
pub(crate) fn matmul(a: &Tensor, b: &Tensor) -> Tensor {
    let out = Tensor::empty([a.size()[0], b.size()[1]], (a.kind(), a.device()));
    matmul_into(&out, a, b, false);
    out
}

/// Adds [`matmul`] to `sum`, `[M, N]`, in its memory. No gradient flows.
pub(crate) fn add_matmul(sum: &Tensor, a: &Tensor, b: &Tensor) {
    matmul_into(sum, a, b, true);
}

fn matmul_into(out: &Tensor, a: &Tensor, b: &Tensor, adds: bool) {
    // SAFETY: the pointers are live tensors; the shim checks their shapes, and writes to `out` alone.
    let message = unsafe { aha_matmul(a.as_ptr(), b.as_ptr(), out.as_ptr(), adds) };
    // SAFETY: the shim returned `message` just now.
    if let Err(reason) = unsafe { shim::check(message) } {
        panic!("{:?} times {:?} into {:?}: {reason}", a.size(), b.size(), out.size());
    }
}

/// Calls `body` with ranges of at least `grain` numbers that cover `0..end`, on libtorch's threads.
pub(crate) fn parallel_for<F: Fn(Range<usize>) + Sync>(end: usize, grain: usize, body: F) {
    /// # Safety
    /// `data` refers to a live `F`.
    unsafe extern "C" fn run<F: Fn(Range<usize>) + Sync>(data: *mut c_void, first: i64, last: i64) {
        // SAFETY: forwarded to the caller.
        let body = unsafe { &*data.cast_const().cast::<F>() };
        body(first as usize..last as usize);
    }
    let data = (&raw const body).cast::<c_void>().cast_mut();
    // SAFETY: `body` outlives the call, which returns when all ranges are done, and may be shared between threads.
    unsafe { aha_parallel_for(end as i64, grain.max(1) as i64, run::<F>, data) };
}
