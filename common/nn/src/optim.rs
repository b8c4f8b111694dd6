//! AdamW on flat memory, in one pass (`_fused_adamw_` of libtorch, on CPU and CUDA).
//!
//! Loshchilov & Hutter, "Decoupled Weight Decay Regularization": weight decay shrinks the parameter and stays out of the
//! moments.

use crate::fused_kernels::{GpuKernels, address, fp32};
use crate::kernels::cpu::training;
use crate::kernels::cuda::{AdamWFactors, AdamWUpdate, SumOfSquares};
use crate::shim::{self, AhaAdamW, aha_fused_adamw};
use crate::tensor_data::f32_slice;
use tch::{Device, Kind, Tensor};

/// The constants of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the second moment, after bias correction.
    pub eps: f64,
    /// Share of the parameter that is taken away per unit of learning rate.
    pub weight_decay: f64,
}

/// An update that would write outside its tensors, or that libtorch refused.
#[derive(Debug, thiserror::Error)]
#[error("adamw step {step}: {reason}")]
pub struct AdamWError {
    step: u64,
    reason: String,
}

/// Updates `param` and its moments in place.
///
/// # Shapes
/// `param`, `grad`, `exp_avg`, `exp_avg_sq`: `[N]` fp32, contiguous, on one device.
///
/// `step` counts updates from 1 and includes this one; it sets the bias correction.
///
/// # Errors
/// Names the tensor whose type, length, device or layout does not fit.
pub fn fused_adamw(
    param: &mut Tensor,
    grad: &Tensor,
    (exp_avg, exp_avg_sq): (&mut Tensor, &mut Tensor),
    step: u64,
    options: &AdamW,
) -> Result<(), AdamWError> {
    let fail = |reason: String| AdamWError { step, reason };
    if step == 0 {
        return Err(fail("steps count from 1".to_owned()));
    }
    check_flat(param, [("param", &*param), ("grad", grad), ("exp_avg", &*exp_avg), ("exp_avg_sq", &*exp_avg_sq)])
        .map_err(fail)?;
    let options = AhaAdamW {
        learning_rate: options.lr,
        beta1: options.beta1,
        beta2: options.beta2,
        epsilon: options.eps,
        weight_decay: options.weight_decay,
    };
    // SAFETY: the tensors are alive and fit each other, as checked above; the three that are written are borrowed
    // mutably; `options` outlives the call.
    let message = unsafe {
        aha_fused_adamw(
            param.as_ptr(),
            grad.as_ptr(),
            exp_avg.as_ptr(),
            exp_avg_sq.as_ptr(),
            step as f64,
            &raw const options,
        )
    };
    // SAFETY: the shim returned `message` just now.
    unsafe { shim::check(message) }.map_err(fail)
}

/// Some elements of a shard, which one pass updates: `[N]` each, contiguous, on one device.
#[derive(Debug)]
pub struct ShardPart<'a> {
    /// fp32, as are the next three.
    pub weights: &'a Tensor,
    pub grad: &'a Tensor,
    pub exp_avg: &'a Tensor,
    pub exp_avg_sq: &'a Tensor,
    /// bf16: what the weights become, rounded.
    pub copy: Option<&'a Tensor>,
    /// Whether weight decay applies to them.
    pub decays: bool,
}

/// Whether [`gpu_adamw`] serves this device.
pub fn has_gpu_adamw(device: Device) -> bool {
    GpuKernels::of(device).is_some()
}

/// Scales the gradient, which stays as it was, decays and updates the weights and writes their copy, in one pass of the
/// kernel of this thread's GPU.
///
/// # Errors
/// As [`fused_adamw`], and if there is no such kernel.
pub fn gpu_adamw(part: &ShardPart<'_>, scale: f64, step: u64, options: &AdamW) -> Result<(), AdamWError> {
    let fail = |reason: String| AdamWError { step, reason };
    let ShardPart { weights, grad, exp_avg, exp_avg_sq, copy, decays } = *part;
    let gpu = GpuKernels::of(weights.device()).filter(|_| step > 0);
    let gpu =
        gpu.ok_or_else(|| fail(format!("no kernel is loaded for {:?}, or steps count from 0", weights.device())))?;
    check_flat(weights, [("weights", weights), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)])
        .map_err(fail)?;
    if let Some(copy) = copy.filter(|copy| copy.size() != weights.size() || copy.device() != weights.device()) {
        return Err(fail(format!("the copy is {copy:?} beside weights {weights:?}")));
    }
    let steps = i32::try_from(step).unwrap_or(i32::MAX);
    let AdamW { lr, beta1, beta2, eps, weight_decay } = *options;
    let factors = AdamWFactors {
        scale: scale as f32,
        decay: if decays { 1.0 - lr * weight_decay } else { 1.0 } as f32,
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        step_size: (lr / (1.0 - beta1.powi(steps))) as f32,
        root_scale: (1.0 - beta2.powi(steps)).sqrt().recip() as f32,
        epsilon: eps as f32,
    };
    let update = AdamWUpdate {
        element: gpu.element,
        num_elements: weights.numel(),
        weights: fp32(weights),
        grad: fp32(grad),
        exp_avg: fp32(exp_avg),
        exp_avg_sq: fp32(exp_avg_sq),
        copy: copy.map(|copy| address(copy, Kind::BFloat16)),
        factors,
    };
    gpu.launch(&update.launch());
    Ok(())
}

/// The error names the first tensor that is not fp32, flat and contiguous beside `param`.
fn check_flat(param: &Tensor, tensors: [(&str, &Tensor); 4]) -> Result<(), String> {
    let fits = |tensor: &Tensor| {
        tensor.defined()
            && tensor.kind() == Kind::Float
            && tensor.size() == [param.numel() as i64]
            && tensor.device() == param.device()
            && tensor.is_contiguous()
    };
    match tensors.into_iter().find(|(_, tensor)| !fits(tensor)) {
        Some((name, tensor)) => {
            Err(format!("{name} is {tensor:?}, not fp32, flat and contiguous beside param {param:?}"))
        }
        None => Ok(()),
    }
}

/// Sum of the squares of an fp32 tensor, in f64: a scalar on its device. Its order does not depend on the number of threads
/// of a CPU, nor on the GPU.
pub fn sum_of_squares(values: &Tensor) -> Tensor {
    let (device, kind) = (values.device(), values.kind());
    match GpuKernels::of(device) {
        Some(gpu) if kind == Kind::Float => {
            let (values, num_elements) = (values.contiguous(), values.numel());
            let sums = Tensor::empty([SumOfSquares::num_parts(num_elements) as i64], (Kind::Double, device));
            let (values, parts) = (fp32(&values), address(&sums, Kind::Double));
            gpu.launch(&SumOfSquares { element: gpu.element, num_elements, values, sums: parts }.launch());
            sums.sum(Kind::Double)
        }
        None if (device, kind) == (Device::Cpu, Kind::Float) => {
            Tensor::from(training::sum_of_squares(f32_slice(values)))
        }
        _ => values.to_kind(Kind::Double).square().sum(Kind::Double),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fused_kernels::testing;

    const OPTIONS: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    const LEN: i64 = 1037; // no multiple of a vector

    fn random(seed: i64) -> Tensor {
        tch::manual_seed(seed);
        Tensor::randn([LEN], (Kind::Float, Device::Cpu))
    }

    fn zeros() -> Tensor {
        Tensor::zeros([LEN], (Kind::Float, Device::Cpu))
    }

    /// Parameters and moments after `steps` updates with seeded gradients.
    fn run(steps: u64) -> [Tensor; 3] {
        let (mut param, mut exp_avg, mut exp_avg_sq) = (random(0), zeros(), zeros());
        for step in 1..=steps {
            fused_adamw(&mut param, &random(step as i64), (&mut exp_avg, &mut exp_avg_sq), step, &OPTIONS).unwrap();
        }
        [param, exp_avg, exp_avg_sq]
    }

    #[test]
    fn follows_the_formula() {
        let AdamW { lr, beta1, beta2, eps, weight_decay } = OPTIONS;
        let [mut param, mut exp_avg, mut exp_avg_sq] = [random(0), zeros(), zeros()].map(|t| t.to_kind(Kind::Double));
        for step in 1..=5 {
            let grad = random(step).to_kind(Kind::Double);
            exp_avg = exp_avg * beta1 + &grad * (1.0 - beta1);
            exp_avg_sq = exp_avg_sq * beta2 + &grad * &grad * (1.0 - beta2);
            let mean = &exp_avg / (1.0 - beta1.powi(step as i32));
            let root = (&exp_avg_sq / (1.0 - beta2.powi(step as i32))).sqrt() + eps;
            param = param * (1.0 - lr * weight_decay) - mean / root * lr;
        }
        let expect = [param, exp_avg, exp_avg_sq];
        for (got, expect) in run(5).iter().zip(&expect) {
            let difference = (got.to_kind(Kind::Double) - expect).abs().max().double_value(&[]);
            assert!(difference < 2e-6, "{difference}");
        }
    }

    #[test]
    fn one_pass_does_what_several_did() {
        let device = testing::device();
        testing::with_gpu(Kind::BFloat16, || {
            let [mut param, grad, mut exp_avg] = [0, 1, 2].map(random);
            let mut exp_avg_sq = random(3).square();
            let ours = [&param, &grad, &exp_avg, &exp_avg_sq].map(|tensor| tensor.copy().to_device(device));
            let copy = Tensor::zeros([LEN], (Kind::BFloat16, device));
            let norm = sum_of_squares(&ours[1]).double_value(&[]);
            assert!((norm - training::sum_of_squares(f32_slice(&grad))).abs() < 1e-10 * norm, "{norm}");
            let (decayed, step, scale) = (600, 3, 0.6);
            for (range, decays) in [(0..decayed, true), (decayed..LEN, false)] {
                let part = |tensor: &Tensor| tensor.narrow(0, range.start, range.end - range.start);
                let [weights, grad, exp_avg, exp_avg_sq] = ours.each_ref().map(part);
                let (exp_avg, exp_avg_sq, copy) = (&exp_avg, &exp_avg_sq, Some(&part(&copy)));
                let part = ShardPart { weights: &weights, grad: &grad, exp_avg, exp_avg_sq, copy, decays };
                gpu_adamw(&part, scale, step, &OPTIONS).unwrap();
            }
            let mut part = param.narrow(0, 0, decayed);
            part *= 1.0 - OPTIONS.lr * OPTIONS.weight_decay;
            let options = AdamW { weight_decay: 0.0, ..OPTIONS };
            let moments = (&mut exp_avg, &mut exp_avg_sq);
            fused_adamw(&mut param, &(&grad * scale), moments, step, &options).unwrap();
            for (theirs, ours) in [&param, &grad, &exp_avg, &exp_avg_sq].into_iter().zip(&ours) {
                let difference = (theirs - ours.to_device(Device::Cpu)).abs().max().double_value(&[]);
                assert!(difference < 2e-6, "{difference}");
            }
            assert!(copy.equal(&ours[0].to_kind(Kind::BFloat16)));
        });
    }

    #[test]
    fn two_runs_are_equal_to_the_last_bit() {
        let bits =
            || run(4).map(|t| Vec::<f32>::try_from(t).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>());
        assert_eq!(bits(), bits());
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let [mut param, mut exp_avg, mut exp_avg_sq] = [random(0), zeros(), zeros()];
        let short = Tensor::zeros([LEN - 1], (Kind::Float, Device::Cpu));
        let error = fused_adamw(&mut param, &short, (&mut exp_avg, &mut exp_avg_sq), 1, &OPTIONS).unwrap_err();
        assert!(error.to_string().starts_with("adamw step 1: grad is"), "{error}");
        let half = random(1).to_kind(Kind::BFloat16);
        assert!(fused_adamw(&mut param, &half, (&mut exp_avg, &mut exp_avg_sq), 1, &OPTIONS).is_err());
        assert!(fused_adamw(&mut param, &random(1), (&mut exp_avg, &mut exp_avg_sq), 0, &OPTIONS).is_err());
    }
}
