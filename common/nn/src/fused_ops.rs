//! The trainer's operations in fp32 on the CPU, each with a backward pass of its own: oneDNN's products, which are faster
//! than MKL's on processors that MKL does not tune for, and one pass over memory where libtorch takes several. Each keeps
//! its inputs, and of its results only what is small.

use tch::{Kind, Tensor};

use crate::function::{differentiable, linear as product};
use crate::kernels::cpu::training::{self, Turn};
use crate::tensor_data::{f32_slice, f32_slice_mut};
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
                d_x = d_out.as_ref().map(|d_out| product(d_out, &weight.tr(), None, d_x.as_ref())).or(d_x);
            }
            d_params.extend(params.grads(d_out.as_ref(), &x));
        }
        std::iter::once(d_x).chain(d_params).collect()
    })
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
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let mut output = x.empty_like();
    let mut scales = Tensor::empty([(x.numel() / weight.numel()) as i64], (Kind::Float, x.device()));
    let (kept_x, kept_weight) = (x.detach().contiguous(), weight.detach());
    training::rms_norm(
        f32_slice(&kept_x),
        f32_slice(&kept_weight),
        eps as f32,
        f32_slice_mut(&mut scales),
        f32_slice_mut(&mut output),
    );
    let [output] = differentiable(&[x, weight], [output], move |grads| {
        let [d_out] = only(grads);
        let Some(d_out) = d_out else { return vec![None, None] };
        let d_out = d_out.contiguous();
        let mut d_x = kept_x.empty_like();
        let (x, weight, scales) = (f32_slice(&kept_x), f32_slice(&kept_weight), f32_slice(&scales));
        let d_weight = training::rms_norm_backward(x, weight, scales, f32_slice(&d_out), f32_slice_mut(&mut d_x));
        vec![Some(d_x), Some(Tensor::from_slice(&d_weight))]
    });
    output
}

/// As [`crate::transformer::Ops::rope`], in the memory of `x`, which nobody else reads, as nobody else reads the gradient
/// that comes back.
///
/// # Shapes
/// - x: `[N, heads * D]`, cos and sin: `[N, 1, D]`; returns `[N, heads * D]`.
pub(crate) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let head_dim = cos.size().last().map_or(1, |&head_dim| head_dim as usize);
    let mut output = x.detach();
    training::rope_in_place(f32_slice_mut(&mut output), f32_slice(cos), f32_slice(sin), head_dim, Turn::Forth);
    let (cos, sin) = (cos.detach(), sin.detach());
    let [output] = differentiable(&[x], [output], move |grads| {
        let [d_out] = only(grads);
        let d_x = d_out.map(|d_out| {
            let mut d_x = d_out.contiguous();
            training::rope_in_place(f32_slice_mut(&mut d_x), f32_slice(&cos), f32_slice(&sin), head_dim, Turn::Back);
            d_x
        });
        vec![d_x]
    });
    output
}

/// `silu(gate) * up`, `[N, F]`. Nobody else reads the gradient that comes back: it becomes that of `up`.
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Tensor {
    let mut output = gate.empty_like();
    let (kept_gate, kept_up) = (gate.detach(), up.detach());
    training::silu_mul(f32_slice(&kept_gate), f32_slice(&kept_up), f32_slice_mut(&mut output));
    let [output] = differentiable(&[gate, up], [output], move |grads| {
        let [d_out] = only(grads);
        let Some(d_out) = d_out else { return vec![None, None] };
        let (mut d_up, mut d_gate) = (d_out.contiguous(), kept_gate.empty_like());
        let (gate, up) = (f32_slice(&kept_gate), f32_slice(&kept_up));
        training::silu_mul_backward(gate, up, f32_slice_mut(&mut d_up), f32_slice_mut(&mut d_gate));
        vec![Some(d_gate), Some(d_up)]
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
