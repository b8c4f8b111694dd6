//! The trainer's operations where we have kernels, each with a backward pass of its own: one pass over memory where libtorch
//! takes several, and in fp32 on the CPU oneDNN's products, which are faster than MKL's on processors that MKL does not tune
//! for. Each keeps its inputs, and of its results only what is small.

use tch::{Kind, Tensor};

use crate::activation::{Activation, Recipe};
use crate::function::{add_matmul, differentiable, linear as product, matmul};
use crate::fused_kernels::{Angles, Kernels, NormTape};
use crate::kernels::cpu::training::Turn;
use crate::transformer::Projection;

/// A projection's weight, `[out, in]`, in training.
#[derive(Debug)]
pub struct TrainedMatrix {
    weight: Tensor,
    /// Where the weight's gradient is added, instead of being handed on. Of the weight's shape and type.
    gradient: Option<Tensor>,
}

impl TrainedMatrix {
    /// A weight whose gradient is added to `gradient` in the backward pass. It needs none of its own.
    #[must_use]
    pub fn adding_to(gradient: Tensor, weight: &Tensor) -> Self {
        Self { weight: weight.detach(), gradient: Some(gradient) }
    }
}

impl From<Tensor> for TrainedMatrix {
    fn from(weight: Tensor) -> Self {
        Self { weight, gradient: None }
    }
}

impl Projection<TrainedMatrix> {
    /// By libtorch's own operation.
    pub(crate) fn of(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight.weight, self.bias.as_ref())
    }
}

/// Projections of the same `x`.
///
/// # Shapes
/// - x: `[N, in]`; returns each `[N, out]`.
pub(crate) fn linear<const P: usize>(x: &Activation, projections: [&Projection<TrainedMatrix>; P]) -> [Tensor; P] {
    let outputs =
        projections.map(|projection| product(&x.rows, &projection.weight.weight, projection.bias.as_ref(), None));
    let mut inputs = vec![&x.rows];
    inputs.extend(projections.iter().flat_map(|projection| self::params(projection)));
    let params = projections.map(Params::new);
    let (x_is_wanted, x) = (x.rows.requires_grad(), x.source());
    differentiable(&inputs, outputs, move |grads| {
        let x = params.iter().any(|params| params.weight_is_wanted).then(|| x.rows());
        let mut d_x = None;
        let mut d_params = Vec::new();
        for (d_out, params) in grads.into_iter().zip(params) {
            if let Some(d_out) = d_out.as_ref().filter(|_| x_is_wanted) {
                d_x = Some(added(d_x, d_out, &params.weight));
            }
            d_params.extend(params.grads(d_out.as_ref(), x.as_ref()));
        }
        std::iter::once(d_x).chain(d_params).collect()
    })
}

/// `sum + a b`, in the memory of the sum, which nobody else reads.
pub(crate) fn added(sum: Option<Tensor>, a: &Tensor, b: &Tensor) -> Tensor {
    match sum {
        Some(sum) => {
            add_matmul(&sum, a, b);
            sum
        }
        None => matmul(a, b),
    }
}

/// `residual + projection(x)`.
///
/// # Shapes
/// - residual: `[N, out]`, x: `[N, in]`; returns `[N, out]`.
pub(crate) fn add_linear(residual: &Tensor, x: &Activation, projection: &Projection<TrainedMatrix>) -> Tensor {
    let output = product(&x.rows, &projection.weight.weight, projection.bias.as_ref(), Some(residual));
    let mut inputs = vec![residual, &x.rows];
    inputs.extend(self::params(projection));
    let params = Params::new(projection);
    let (x_is_wanted, x) = (x.rows.requires_grad(), x.source());
    let [output] = differentiable(&inputs, [output], move |mut grads| {
        let d_out = grads.remove(0);
        let d_x = d_out.as_ref().filter(|_| x_is_wanted).map(|d_out| matmul(d_out, &params.weight));
        let d_params = params.grads(d_out.as_ref(), params.weight_is_wanted.then(|| x.rows()).as_ref());
        [d_out, d_x].into_iter().chain(d_params).collect()
    });
    output
}

/// As [`crate::transformer::Ops::rms_norm`], over groups of `weight.len()` elements. Same shape as `x`.
pub(crate) fn rms_norm(kernels: &Kernels, x: &Tensor, weight: &Tensor, eps: f64) -> Activation {
    let (output, tape) = kernels.rms_norm(x, None, weight, eps);
    let recipe = norm_recipe(kernels, &tape, weight, eps);
    let kept = (kernels.clone(), weight.detach(), weight.requires_grad());
    let [output] = differentiable(&[x, weight], [output], move |grads| {
        let (kernels, weight, weight_is_wanted) = kept;
        let [Some(d_out)] = only(grads) else { return vec![None, None] };
        let (d_x, d_weight) = kernels.rms_norm_backward(&tape, (&weight, weight_is_wanted), &d_out, None);
        vec![Some(d_x), d_weight]
    });
    Activation::again(output, recipe)
}

/// `x + delta` and the norm of it, in which gradients of both add up in one pass. Same shape as `x`, each.
pub(crate) fn add_norm(
    kernels: &Kernels,
    x: &Tensor,
    delta: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> [Activation; 2] {
    let (normed, tape) = kernels.rms_norm(x, delta, weight, eps);
    let recipe = norm_recipe(kernels, &tape, weight, eps);
    let outputs = [tape.sum.detach(), normed];
    let kept = (kernels.clone(), weight.detach(), weight.requires_grad());
    let inputs: Vec<&Tensor> = [Some(x), delta, Some(weight)].into_iter().flatten().collect();
    let num_terms = inputs.len() - 1;
    let [sum, normed] = differentiable(&inputs, outputs, move |grads| {
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
    });
    [sum.into(), Activation::again(normed, recipe)]
}

fn norm_recipe(kernels: &Kernels, tape: &NormTape, weight: &Tensor, eps: f64) -> Recipe {
    Recipe::Norm(kernels.clone(), tape.sum.shallow_clone(), (weight.detach(), eps))
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
pub(crate) fn silu_mul(kernels: &Kernels, gate: &Tensor, up: &Tensor) -> Activation {
    let kept = (kernels.clone(), gate.detach(), up.detach());
    let recipe = Recipe::Gated(kernels.clone(), kept.1.shallow_clone(), kept.2.shallow_clone());
    let output = kernels.silu_mul(&kept.1, &kept.2);
    let [output] = differentiable(&[gate, up], [output], move |grads| {
        let [d_out] = only(grads);
        let (kernels, gate, up) = kept;
        let grads = d_out.map(|d_out| kernels.silu_mul_backward(&gate, &up, d_out.contiguous()).map(Some));
        grads.unwrap_or_default().into()
    });
    Activation::again(output, recipe)
}

fn params(projection: &Projection<TrainedMatrix>) -> impl Iterator<Item = &Tensor> {
    std::iter::once(&projection.weight.weight).chain(&projection.bias)
}

/// A projection's weight, and what its parameters want of the backward pass. Frozen ones want nothing.
struct Params {
    weight: Tensor,
    gradient: Option<Tensor>,
    weight_is_wanted: bool,
    has_bias: bool,
    bias_is_wanted: bool,
}

impl Params {
    fn new(projection: &Projection<TrainedMatrix>) -> Self {
        let TrainedMatrix { weight, gradient } = &projection.weight;
        Self {
            weight: weight.detach(),
            gradient: gradient.as_ref().map(Tensor::shallow_clone),
            weight_is_wanted: gradient.is_some() || weight.requires_grad(),
            has_bias: projection.bias.is_some(),
            bias_is_wanted: projection.bias.as_ref().is_some_and(Tensor::requires_grad),
        }
    }

    /// Gradients of the weight, unless it was added where it belongs, and of the bias where there is one, for a projection
    /// of `x`, which is there if the weight's is wanted.
    fn grads(&self, d_out: Option<&Tensor>, x: Option<&Tensor>) -> Vec<Option<Tensor>> {
        let weight = d_out.zip(x).filter(|_| self.weight_is_wanted);
        let weight = weight.map(|(d_out, x)| added(self.gradient.as_ref().map(Tensor::shallow_clone), &d_out.tr(), x));
        let mut grads = vec![weight.filter(|_| self.gradient.is_none())];
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

    use tch::Device;

    use super::*;
    use crate::autograd::grad;
    use crate::fused_kernels::{testing, with_launcher};

    #[test]
    fn gradients_are_added_where_they_belong() {
        tch::manual_seed(5);
        for kind in [Kind::Float, Kind::Double] {
            let random = |size: &[i64]| Tensor::randn(size, (kind, Device::Cpu));
            let (x, residual) = (random(&[7, 5]).set_requires_grad(true), random(&[7, 3]));
            let weights = [random(&[4, 5]), random(&[6, 5]), random(&[3, 6])];
            // Parts of something larger, as those of a unit are.
            let sums = random(&[100]);
            let (mut start, mut sinks) = (0, Vec::new());
            for weight in &weights {
                sinks.push(sums.narrow(0, start, weight.numel() as i64).view_as(weight));
                start += weight.numel() as i64;
            }
            let run = |matrices: [TrainedMatrix; 3], inputs: &[Tensor]| {
                let [a, b, c] = matrices.map(|weight| Projection { weight, bias: None });
                let [first, second] = linear(&x.shallow_clone().into(), [&a, &b]);
                let output = add_linear(&residual, &second.into(), &c);
                grad(&[first.sum(kind) + (&output * &output).sum(kind)], inputs, &[None], false).unwrap()
            };
            let leaves = weights.each_ref().map(|weight| weight.detach().set_requires_grad(true));
            let mut inputs = vec![x.shallow_clone()];
            inputs.extend(leaves.iter().map(Tensor::shallow_clone));
            let handed_on = run(leaves.map(TrainedMatrix::from), &inputs);
            let before: Vec<Tensor> = sinks.iter().map(Tensor::copy).collect();
            let matrices = [0, 1, 2].map(|i| TrainedMatrix::adding_to(sinks[i].shallow_clone(), &weights[i]));
            let d_x = run(matrices, &inputs[..1]);
            let close = |a: &Tensor, b: &Tensor| assert!((a - b).abs().max().double_value(&[]) < 1e-4, "{a} {b}");
            close(d_x[0].as_ref().unwrap(), handed_on[0].as_ref().unwrap());
            for ((sink, before), expected) in sinks.iter().zip(&before).zip(&handed_on[1..]) {
                close(sink, &(before + expected.as_ref().unwrap()));
            }
        }
    }

    #[test]
    fn a_graph_that_is_dropped_leaves_nothing_behind() {
        let launcher = testing::emulated();
        with_launcher(Device::Cpu, Kind::Float, Rc::clone(&launcher), || {
            let kernels = Kernels::of(Device::Cpu, Kind::Float).unwrap();
            let leaf = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let weight = leaf(&[8]);
            let [sum, normed] = add_norm(&kernels, &leaf(&[3, 8]), Some(&leaf(&[3, 8])), &weight, 1e-6);
            let gated = silu_mul(&kernels, &sum.rows, &rms_norm(&kernels, &normed.rows, &weight, 1e-6).rows);
            let table = || Tensor::ones([4, 2], (Kind::Float, Device::Cpu));
            let positions = Some(Tensor::from_slice(&[0_i32, 3, 1]));
            let turned = rope(&kernels, &gated.rows, &Angles { cos: table(), sin: table(), positions, head_dim: 4 });
            // Ours, that of the thread, of `kernels`, of each function, and of what `normed` and `gated` are computed by.
            assert!(turned.requires_grad());
            assert_eq!(Rc::strong_count(&launcher), 3 + 4 + 2);
        });
        assert_eq!(Rc::strong_count(&launcher), 1);
    }
}
