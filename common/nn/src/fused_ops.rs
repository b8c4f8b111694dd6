//! The trainer's operations where we have kernels, each with a backward pass of its own: one pass over memory where libtorch
//! takes several, and in fp32 on the CPU oneDNN's products, which are faster than MKL's on processors that MKL does not tune
//! for. Each keeps its inputs, and of its results only what is small.

use tch::{Device, Kind, Tensor};

use crate::function::{differentiable, linear as product};
use crate::fused_kernels::{Angles, Kernels};
use crate::kernels::cpu::training::Turn;
use crate::transformer::Projection;

/// Projections of the same `x`.
///
/// # Shapes
/// - x: `[N, in]`; returns each `[N, out]`.
pub(crate) fn linear<const P: usize>(x: &Tensor, projections: [&Projection<Tensor>; P]) -> [Tensor; P] {
    let outputs = projections.map(|projection| product(x, &projection.weight, projection.bias.as_ref(), None));
    let mut inputs = vec![x];
    inputs.extend(projections.iter().flat_map(|projection| self::params(projection)));
    let params = projections.map(Params::new);
    let weights = projections.map(|projection| projection.weight.detach());
    let (x_is_wanted, x) = (x.requires_grad(), x.detach());
    differentiable(&inputs, outputs, move |grads| {
        let mut d_x = None;
        let mut d_params = Vec::new();
        for ((d_out, weight), params) in grads.into_iter().zip(&weights).zip(params) {
            if x_is_wanted {
                d_x = match d_out.as_ref() {
                    Some(d_out) => Some(add_product(d_x, d_out, &weight.tr())),
                    None => d_x,
                };
            }
            d_params.extend(params.grads(d_out.as_ref(), &x));
        }
        std::iter::once(d_x).chain(d_params).collect()
    })
}

/// `sum + x W^T`, in the memory of the sum where that is faster.
///
/// # Shapes
/// - sum: `[N, out]`, which nobody else reads, x: `[N, in]`, weight: `[out, in]`; returns `[N, out]`.
pub(crate) fn add_product(sum: Option<Tensor>, x: &Tensor, weight: &Tensor) -> Tensor {
    match sum {
        Some(mut sum) if (x.device(), x.kind()) != (Device::Cpu, Kind::Float) => sum.addmm_(x, &weight.tr()),
        sum => product(x, weight, None, sum.as_ref()),
    }
}

/// `residual + projection(x)`.
///
/// # Shapes
/// - residual: `[N, out]`, x: `[N, in]`; returns `[N, out]`.
pub(crate) fn add_linear(residual: &Tensor, x: &Tensor, projection: &Projection<Tensor>) -> Tensor {
    let output = product(x, &projection.weight, projection.bias.as_ref(), Some(residual));
    let mut inputs = vec![residual, x];
    inputs.extend(self::params(projection));
    let params = Params::new(projection);
    let (weight, x_is_wanted, x) = (projection.weight.detach(), x.requires_grad(), x.detach());
    let [output] = differentiable(&inputs, [output], move |mut grads| {
        let d_out = grads.remove(0);
        let d_x = d_out.as_ref().filter(|_| x_is_wanted).map(|d_out| product(d_out, &weight.tr(), None, None));
        let d_params = params.grads(d_out.as_ref(), &x);
        [d_out, d_x].into_iter().chain(d_params).collect()
    });
    output
}

/// As [`crate::transformer::Ops::rms_norm`], over groups of `weight.len()` elements. Same shape as `x`.
pub(crate) fn rms_norm(kernels: &Kernels, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let (output, tape) = kernels.rms_norm(x, None, weight, eps);
    let kept = (kernels.clone(), weight.detach(), weight.requires_grad());
    let [output] = differentiable(&[x, weight], [output], move |grads| {
        let (kernels, weight, weight_is_wanted) = kept;
        let [Some(d_out)] = only(grads) else { return vec![None, None] };
        let (d_x, d_weight) = kernels.rms_norm_backward(&tape, (&weight, weight_is_wanted), &d_out, None);
        vec![Some(d_x), d_weight]
    });
    output
}

/// `x + delta` and the norm of it, in which gradients of both add up in one pass. Same shape as `x`, each.
pub(crate) fn add_norm(
    kernels: &Kernels,
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> [Tensor; 2] {
    let (normed, tape) = kernels.rms_norm(x, delta, weight, eps);
    let outputs = [tape.sum.detach(), normed];
    let kept = (kernels.clone(), weight.detach(), weight.requires_grad());
    let inputs: Vec<&Tensor> = [Some(x), delta, Some(weight)].into_iter().flatten().collect();
    let num_terms = inputs.len() - 1;
    differentiable(&inputs, outputs, move |grads| {
        let (kernels, weight, weight_is_wanted) = kept;
        let [d_sum, d_out] = only(grads);
        let (d_x, d_weight) = match d_out {
            Some(d_out) => {
                let (d_x, d_weight) =
                    kernels.rms_norm_backward(&tape, (&weight, weight_is_wanted), &d_out, d_sum.as_ref());
                (Some(d_x), d_weight)
            }
            None => (d_sum, None),
        };
        let terms = (0..num_terms).map(|_| d_x.as_ref().map(Tensor::shallow_clone));
        terms.chain([d_weight]).collect()
    })
}

/// As [`crate::transformer::Ops::rope`], in the memory of `x`, which nobody else reads, as nobody else reads the gradient
/// that comes back. Same shape as `x`.
pub(crate) fn rope(kernels: &Kernels, x: &Tensor, angles: &Angles) -> Tensor {
    let mut output = x.detach();
    kernels.rope_in_place(&mut output, angles, Turn::Forth);
    let kept = (kernels.clone(), angles.shallow_clone());
    let [output] = differentiable(&[x], [output], move |grads| {
        let [d_out] = only(grads);
        let d_x = d_out.map(|d_out| {
            let (kernels, angles) = kept;
            let mut d_x = d_out.contiguous();
            kernels.rope_in_place(&mut d_x, &angles, Turn::Back);
            d_x
        });
        vec![d_x]
    });
    output
}

/// `silu(gate) * up`, `[N, F]`. Nobody else reads the gradient that comes back: it becomes that of `up`.
pub(crate) fn silu_mul(kernels: &Kernels, gate: &Tensor, up: &Tensor) -> Tensor {
    let kept = (kernels.clone(), gate.detach(), up.detach());
    let output = kernels.silu_mul(&kept.1, &kept.2);
    let [output] = differentiable(&[gate, up], [output], move |grads| {
        let [d_out] = only(grads);
        let (kernels, gate, up) = kept;
        let grads = d_out.map(|d_out| kernels.silu_mul_backward(&gate, &up, d_out.contiguous()).map(Some));
        grads.unwrap_or_default().into()
    });
    output
}

fn params(projection: &Projection<Tensor>) -> impl Iterator<Item = &Tensor> {
    std::iter::once(&projection.weight).chain(&projection.bias)
}

/// What a projection's parameters want of the backward pass. Frozen ones want nothing.
#[derive(Clone, Copy)]
struct Params {
    weight_is_wanted: bool,
    has_bias: bool,
    bias_is_wanted: bool,
}

impl Params {
    fn new(projection: &Projection<Tensor>) -> Self {
        Self {
            weight_is_wanted: projection.weight.requires_grad(),
            has_bias: projection.bias.is_some(),
            bias_is_wanted: projection.bias.as_ref().is_some_and(Tensor::requires_grad),
        }
    }

    /// Gradients of the weight and, where there is one, the bias of a projection of `x`.
    fn grads(self, d_out: Option<&Tensor>, x: &Tensor) -> Vec<Option<Tensor>> {
        let weight = d_out.filter(|_| self.weight_is_wanted);
        let mut grads = vec![weight.map(|d_out| product(&d_out.tr(), &x.tr(), None, None))];
        if self.has_bias {
            let bias = d_out.filter(|_| self.bias_is_wanted);
            grads.push(bias.map(|d_out| d_out.sum_dim_intlist(0, false, Kind::Float)));
        }
        grads
    }
}

fn only<const N: usize>(grads: Vec<Option<Tensor>>) -> [Option<Tensor>; N] {
    grads.try_into().expect("a gradient for every output")
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::fused_kernels::{testing, with_launcher};

    #[test]
    fn a_graph_that_is_dropped_leaves_nothing_behind() {
        let launcher = testing::emulated();
        with_launcher(Device::Cpu, Kind::Float, Rc::clone(&launcher), || {
            let kernels = Kernels::of(Device::Cpu, Kind::Float).unwrap();
            let leaf = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let weight = leaf(&[8]);
            let [sum, normed] = add_norm(&kernels, &leaf(&[3, 8]), Some(&leaf(&[3, 8])), &weight, 1e-6);
            let gated = silu_mul(&kernels, &sum, &rms_norm(&kernels, &normed, &weight, 1e-6));
            let table = || Tensor::ones([4, 2], (Kind::Float, Device::Cpu));
            let positions = Some(Tensor::from_slice(&[0_i32, 3, 1]));
            let turned = rope(&kernels, &gated, &Angles { cos: table(), sin: table(), positions, head_dim: 4 });
            // Ours, that of the thread, of `kernels`, and of each function.
            assert!(turned.requires_grad());
            assert_eq!(Rc::strong_count(&launcher), 3 + 4);
        });
        assert_eq!(Rc::strong_count(&launcher), 1);
    }
}
