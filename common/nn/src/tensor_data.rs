//! A CPU tensor's memory as a slice, for kernels and files.

use half::bf16;
use tch::kind::Element;
use tch::{Device, Kind, Tensor};

use crate::storage;

/// Values on `device`. On a GPU by way of pinned memory, from which the copy is queued like anything else: the host does
/// not wait for what is queued before it.
pub fn to_device<T: Element>(values: &[T], device: Device) -> Tensor {
    let tensor = Tensor::from_slice(values);
    if device.is_cuda() { tensor.pin_memory(device).to_device_(device, T::KIND, true, false) } else { tensor }
}

/// The elements of a contiguous fp32 CPU tensor.
///
/// # Panics
/// If it is anything else.
#[must_use]
pub fn f32_slice(tensor: &Tensor) -> &[f32] {
    check(tensor, Kind::Float);
    // SAFETY: `check` saw a contiguous CPU tensor of floats, whose memory lives as long as the borrow of it.
    unsafe { std::slice::from_raw_parts(data(tensor), tensor.numel()) }
}

/// The elements of a contiguous bf16 CPU tensor.
///
/// # Panics
/// If it is anything else.
#[must_use]
pub fn bf16_slice(tensor: &Tensor) -> &[bf16] {
    check(tensor, Kind::BFloat16);
    // SAFETY: `check` saw a contiguous CPU tensor of bf16, whose memory lives as long as the borrow of it.
    unsafe { std::slice::from_raw_parts(data(tensor), tensor.numel()) }
}

/// The elements of a contiguous i64 CPU tensor.
///
/// # Panics
/// If it is anything else.
#[must_use]
pub fn i64_slice(tensor: &Tensor) -> &[i64] {
    check(tensor, Kind::Int64);
    // SAFETY: `check` saw a contiguous CPU tensor of i64, whose memory lives as long as the borrow of it.
    unsafe { std::slice::from_raw_parts(data(tensor), tensor.numel()) }
}

/// The elements of a contiguous fp32 CPU tensor, to write. The caller holds no other view of the same memory.
///
/// # Panics
/// If it is anything else.
#[must_use]
pub fn f32_slice_mut(tensor: &mut Tensor) -> &mut [f32] {
    check(tensor, Kind::Float);
    // SAFETY: as in `f32_slice`; `tensor` is borrowed mutably, and the caller holds no other view of its memory.
    unsafe { std::slice::from_raw_parts_mut(data::<f32>(tensor).cast_mut(), tensor.numel()) }
}

/// The bytes of a contiguous CPU tensor of any type.
///
/// # Panics
/// If it is not contiguous or not on the CPU.
#[must_use]
pub fn bytes(tensor: &Tensor) -> &[u8] {
    check(tensor, tensor.kind());
    // SAFETY: `check` saw a contiguous CPU tensor, whose memory lives as long as the borrow of it.
    unsafe { std::slice::from_raw_parts(data(tensor), tensor.numel() * tensor.kind().elt_size_in_bytes()) }
}

/// Where the elements begin; a tensor without any may have no memory, which a slice must have.
fn data<T>(tensor: &Tensor) -> *const T {
    if tensor.numel() == 0 { std::ptr::dangling() } else { tensor.data_ptr().cast::<T>().cast_const() }
}

fn check(tensor: &Tensor, kind: Kind) {
    assert!(
        tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous(),
        "expected a contiguous {kind:?} tensor on the CPU, got {tensor:?}"
    );
    assert!(storage::has_memory(tensor), "{tensor:?} has given its memory to another tensor");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_without_elements_are_empty_slices() {
        let empty = |kind| Tensor::zeros([0, 3], (kind, Device::Cpu));
        assert!(f32_slice(&empty(Kind::Float)).is_empty() && f32_slice_mut(&mut empty(Kind::Float)).is_empty());
        assert!(i64_slice(&empty(Kind::Int64)).is_empty() && bytes(&empty(Kind::BFloat16)).is_empty());
    }
}
