//! The memory of a tensor, which can be taken away and given back while the tensor, its views and graphs live on.

use tch::Tensor;

use crate::shim::{self, aha_memory_bytes, aha_swap_memory};

/// Exchanges the memory of two tensors on one device. Views follow; autograd does not take it for a write.
///
/// # Panics
/// If they are on two devices.
pub(crate) fn swap_memory(a: &mut Tensor, b: &mut Tensor) {
    // SAFETY: both are live tensors with a storage.
    let message = unsafe { aha_swap_memory(a.as_ptr(), b.as_ptr()) };
    // SAFETY: the shim returned `message` just now.
    if let Err(reason) = unsafe { shim::check(message) } {
        panic!("swapping the memory of {a:?} and {b:?}: {reason}");
    }
}

/// Bytes of the memory that a tensor is a view of, all of it; 0 while another tensor has it.
#[must_use]
pub fn memory_bytes(tensor: &Tensor) -> usize {
    // SAFETY: it is a live tensor.
    unsafe { aha_memory_bytes(tensor.as_ptr()) }
}

/// Whether the elements of a tensor are anywhere.
pub(crate) fn has_memory(tensor: &Tensor) -> bool {
    tensor.numel() == 0 || memory_bytes(tensor) > 0
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::autograd::grad;

    #[test]
    fn a_graph_outlives_the_memory_of_its_parameters() {
        let (cpu, values) = ((Kind::Float, Device::Cpu), [3.0f32, 5.0, 7.0]);
        let mut flat = Tensor::from_slice(&values);
        let weight = flat.narrow(0, 1, 2).detach().set_requires_grad(true);
        let x = Tensor::from_slice(&[2.0f32, 4.0]).set_requires_grad(true);
        let product = (&x * &weight).sum(Kind::Float);
        let mut other = Tensor::empty([0], cpu);
        swap_memory(&mut flat, &mut other);
        assert!(!has_memory(&flat) && !has_memory(&weight) && has_memory(&other));

        // The memory serves another tensor meanwhile, and is filled again elsewhere.
        let mut again = Tensor::zeros([3], cpu);
        again.copy_(&Tensor::from_slice(&values));
        swap_memory(&mut flat, &mut again);
        let grads = grad(&[product], &[x, weight], &[None], false).unwrap();
        let values = |grad: &Option<Tensor>| Vec::<f32>::try_from(grad.as_ref().unwrap()).unwrap();
        assert_eq!((values(&grads[0]), values(&grads[1])), (vec![5.0, 7.0], vec![2.0, 4.0]));
    }
}
