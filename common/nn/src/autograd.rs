//! `torch.autograd.grad`: the gradients of some tensors, without touching `.grad` of any.
//!
//! The backward pass walks the units of the model in reverse and asks for the gradients of one unit at a time, given the
//! gradient that the unit above handed down. tch binds `run_backward`, but without gradients of the outputs.

use crate::shim::{self, aha_autograd_grad};
use std::ptr;
use tch::Tensor;
use torch_sys::C_tensor;

/// libtorch could not differentiate.
#[derive(Debug, thiserror::Error)]
#[error("autograd of {num_outputs} outputs over {num_inputs} inputs failed: {reason}")]
pub struct GradError {
    num_outputs: usize,
    num_inputs: usize,
    reason: String,
}

/// The gradient of `sum_i <outputs[i], grad_outputs[i]>` for each of `inputs`, in their order.
///
/// # Shapes
/// `grad_outputs[i]` has the shape of `outputs[i]`, or is `None` where that is a scalar (and then counts as 1);
/// a gradient has the shape of its input.
///
/// The graph is freed, and runs on this thread, whatever the device: libtorch would hand that of a GPU to a thread of its
/// own, where functions of ours must not run. An input that no output depends on gives `None` if `allow_unused`, and an error otherwise.
///
/// # Errors
/// Whatever libtorch refuses: `grad_outputs` of another length, shape or type, a graph that is already freed, outputs
/// that need no gradient.
pub fn grad(
    outputs: &[Tensor],
    inputs: &[Tensor],
    grad_outputs: &[Option<Tensor>],
    allow_unused: bool,
) -> Result<Vec<Option<Tensor>>, GradError> {
    let fail = |reason: String| GradError { num_outputs: outputs.len(), num_inputs: inputs.len(), reason };
    if grad_outputs.len() != outputs.len() {
        return Err(fail(format!("{} grad_outputs are given", grad_outputs.len())));
    }
    let output_ptrs: Vec<_> = outputs.iter().map(Tensor::as_ptr).collect();
    let grad_output_ptrs: Vec<_> =
        grad_outputs.iter().map(|grad| grad.as_ref().map_or(ptr::null(), Tensor::as_ptr)).collect();
    let input_ptrs: Vec<_> = inputs.iter().map(Tensor::as_ptr).collect();
    let mut grads: Vec<*mut C_tensor> = vec![ptr::null_mut(); inputs.len()];
    // SAFETY: the slices outlive the call and are as long as it is told; every pointer in them is a live tensor, or null
    // where the shim allows it; it writes `grads` only when it succeeds.
    let message = unsafe {
        aha_autograd_grad(
            output_ptrs.as_ptr(),
            grad_output_ptrs.as_ptr(),
            outputs.len(),
            input_ptrs.as_ptr(),
            grads.as_mut_ptr(),
            inputs.len(),
            allow_unused,
        )
    };
    // SAFETY: the shim returned `message` just now.
    unsafe { shim::check(message) }.map_err(fail)?;
    let owned = grads.into_iter().map(|grad| {
        // SAFETY: a gradient that is not null is a tensor that the shim allocated for us to own.
        (!grad.is_null()).then(|| unsafe { Tensor::from_ptr(grad) })
    });
    Ok(owned.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    fn values(grad: &Option<Tensor>) -> Vec<f32> {
        Vec::try_from(grad.as_ref().unwrap()).unwrap()
    }

    #[test]
    fn weighs_outputs_by_their_gradients() {
        let (x, y) = (leaf(&[1.0, 2.0]), leaf(&[3.0, 4.0]));
        let (product, square) = (&x * &y, &x * &x);
        let weights = [Some(Tensor::from_slice(&[10.0f32, 100.0])), Some(Tensor::from_slice(&[1.0f32, 1.0]))];
        let grads = grad(&[product, square], &[x.shallow_clone(), y], &weights, false).unwrap();
        assert_eq!(values(&grads[0]), [10.0 * 3.0 + 2.0, 100.0 * 4.0 + 4.0]);
        assert_eq!(values(&grads[1]), [10.0, 200.0]);
        assert!(!x.grad().defined(), "grad() must leave .grad alone");
    }

    #[test]
    fn agrees_with_backward_through_a_small_network() {
        tch::manual_seed(7);
        let input = Tensor::randn([5, 8], (Kind::Float, Device::Cpu));
        let weights: Vec<_> = [[8, 16], [16, 3]]
            .map(|shape| Tensor::randn(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true))
            .into();
        let loss =
            || input.matmul(&weights[0]).silu().matmul(&weights[1]).log_softmax(-1, Kind::Float).mean(Kind::Float);
        let grads = grad(&[loss()], &weights, &[None], false).unwrap();
        loss().backward();
        for (grad, weight) in grads.iter().zip(&weights) {
            assert_eq!(grad.as_ref().unwrap(), &weight.grad());
        }
    }

    #[test]
    fn unused_input_is_none_or_an_error() {
        let (x, unused) = (leaf(&[1.0]), leaf(&[1.0]));
        let inputs = [x.shallow_clone(), unused];
        let grads = grad(&[(&x * 3.0).sum(Kind::Float)], &inputs, &[None], true).unwrap();
        assert_eq!(values(&grads[0]), [3.0]);
        assert!(grads[1].is_none());
        let error = grad(&[(&x * 3.0).sum(Kind::Float)], &inputs, &[None], false).unwrap_err().to_string();
        assert!(error.starts_with("autograd of 1 outputs over 2 inputs failed: element 1"), "{error}");
    }

    #[test]
    fn wrong_gradients_are_errors() {
        let x = leaf(&[1.0, 2.0]);
        let wrong_shape = Some(Tensor::from_slice(&[1.0f32]));
        assert!(grad(&[&x * 2.0], &[x.shallow_clone()], &[wrong_shape], false).is_err());
        assert!(grad(&[&x * 2.0], &[x.shallow_clone()], &[], false).is_err());
        let no_graph = grad(&[Tensor::from_slice(&[1.0f32])], &[x], &[None], false).unwrap_err().to_string();
        assert!(no_graph.contains("does not require grad"), "{no_graph}");
    }
}
