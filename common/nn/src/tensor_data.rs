//! A CPU tensor's memory as a slice, for kernels and files.

use tch::{Device, Kind, Tensor};

use crate::storage;

/// The elements of a contiguous fp32 CPU tensor.
///
/// # Panics
/// If it is anything else.
#[must_use]
pub fn f32_slice(tensor: &Tensor) -> &[f32] {
    check(tensor, Kind::Float);
    // SAFETY: `check` saw a contiguous CPU tensor of floats, whose memory lives as long as the borrow of it.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}

/// The elements of a contiguous i64 CPU tensor.
///
/// # Panics
/// If it is anything else.
#[must_use]
pub fn i64_slice(tensor: &Tensor) -> &[i64] {
    check(tensor, Kind::Int64);
    // SAFETY: `check` saw a contiguous CPU tensor of i64, whose memory lives as long as the borrow of it.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<i64>(), tensor.numel()) }
}

/// The elements of a contiguous fp32 CPU tensor, to write. The caller holds no other view of the same memory.
///
/// # Panics
/// If it is anything else.
#[must_use]
pub fn f32_slice_mut(tensor: &mut Tensor) -> &mut [f32] {
    check(tensor, Kind::Float);
    // SAFETY: as in `f32_slice`; `tensor` is borrowed mutably, and the caller holds no other view of its memory.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}

/// The bytes of a contiguous CPU tensor of any type.
///
/// # Panics
/// If it is not contiguous or not on the CPU.
#[must_use]
pub fn bytes(tensor: &Tensor) -> &[u8] {
    check(tensor, tensor.kind());
    // SAFETY: `check` saw a contiguous CPU tensor, whose memory lives as long as the borrow of it.
    unsafe {
        std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), tensor.numel() * tensor.kind().elt_size_in_bytes())
    }
}

fn check(tensor: &Tensor, kind: Kind) {
    assert!(
        tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous(),
        "expected a contiguous {kind:?} tensor on the CPU, got {tensor:?}"
    );
    assert!(storage::has_memory(tensor), "{tensor:?} has given its memory to another tensor");
}
