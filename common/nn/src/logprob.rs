//! Log-probs and entropies of tokens from hidden states, without ever holding all logits.

use tch::{Device, Kind, Tensor};

use crate::function::linear;
use crate::fused_kernels::{Kernels, Targets};
use crate::fused_ops::added;

/// Bytes of logits that one chunk may take.
const CHUNK_BYTES: i64 = 64 << 20;
/// On a GPU. Every chunk reads the head's matrix twice and its gradient once, and writes the latter: with fewer rows, that
/// takes longer than the products.
const GPU_CHUNK_BYTES: i64 = 512 << 20;

/// Rows of hidden states whose logits fit a chunk.
#[must_use]
pub fn chunk_rows(vocab_size: i64) -> i64 {
    chunk_rows_on(Device::Cpu, vocab_size)
}

/// As [`chunk_rows`], for the trainer on any device.
#[must_use]
pub fn chunk_rows_on(device: Device, vocab_size: i64) -> i64 {
    let bytes = if device == Device::Cpu { CHUNK_BYTES } else { GPU_CHUNK_BYTES };
    (bytes / (4 * vocab_size)).max(1)
}

/// What a chunk of rows says of its target tokens, and what its backward pass needs.
#[derive(Debug)]
pub struct TargetLogprobs {
    /// Of the target tokens, `[M]`, fp32.
    pub logprobs: Tensor,
    /// Of the rows' distributions, in nats: `[M]`, fp32.
    pub entropies: Tensor,
    hidden: Tensor,
    head: Tensor,
    kept: Kept,
}

/// What is kept of the logits.
#[derive(Debug)]
enum Kept {
    /// Where we have kernels: themselves, fp32 `[M, V]`, whose gradient takes their place.
    Logits(Kernels, Targets),
    LogSoftmax(LogSoftmax),
}

/// The log-softmax of logits, `[M, V]`, fp32, over the temperature.
#[derive(Debug)]
struct LogSoftmax {
    all: Tensor,
    /// i64 `[M]`.
    targets: Tensor,
    temperature: f64,
}

impl TargetLogprobs {
    /// # Shapes
    /// - hidden: `[M, C]` after the final norm, head: `[V, C]`, targets: `[M]` i64. No gradient flows but by
    ///   [`TargetLogprobs::backward`].
    #[must_use]
    pub fn new(hidden: &Tensor, head: &Tensor, targets: &Tensor, temperature: f64) -> Self {
        let (hidden, head) = (hidden.detach(), head.detach());
        if let Some(kernels) = Kernels::of(hidden.device(), hidden.kind()) {
            let logits = match &kernels {
                Kernels::Cpu => linear(&hidden, &head, None, None), // [M, V]
                // Not rounded to bf16, as those that the tokens were sampled from were not.
                Kernels::Gpu(gpu) => gpu.product(&hidden, &head), // [M, V]
            };
            let targets = kernels.summarise_targets(logits, targets, temperature);
            let [logprobs, entropies] = [&targets.logprobs, &targets.entropies].map(Tensor::shallow_clone);
            return Self { logprobs, entropies, hidden, head, kept: Kept::Logits(kernels, targets) };
        }
        let all = log_softmax(&hidden, &head, temperature); // [M, V]
        let logprobs = all.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
        let entropies = -(all.exp() * &all).sum_dim_intlist(-1, false, Kind::Float);
        let kept = Kept::LogSoftmax(LogSoftmax { all, targets: targets.shallow_clone(), temperature });
        Self { logprobs, entropies, hidden, head, kept }
    }

    /// The gradients of the hidden states, `[M, C]`, and of the head, `[V, C]`, the latter added to `d_head`, which nobody
    /// else reads.
    ///
    /// # Shapes
    /// - gradients of log-probs and, where they take part, of entropies: `[M]`, fp32.
    pub fn backward(
        self,
        d_logprobs: &Tensor,
        d_entropies: Option<&Tensor>,
        d_head: Option<Tensor>,
    ) -> (Tensor, Tensor) {
        let (hidden, head) = (self.hidden.shallow_clone(), self.head.shallow_clone());
        let d_logits = self.logits_backward(d_logprobs, d_entropies); // [M, V]
        (linear(&d_logits, &head.tr(), None, None), added(d_head, &d_logits.tr(), &hidden))
    }

    /// As [`TargetLogprobs::backward`] where the head is frozen: the gradients of the hidden states alone, `[M, C]`.
    pub fn backward_frozen(self, d_logprobs: &Tensor, d_entropies: Option<&Tensor>) -> Tensor {
        let head = self.head.shallow_clone();
        linear(&self.logits_backward(d_logprobs, d_entropies), &head.tr(), None, None)
    }

    /// The gradients of the logits, `[M, V]`, in the type of the hidden states.
    fn logits_backward(self, d_logprobs: &Tensor, d_entropies: Option<&Tensor>) -> Tensor {
        match self.kept {
            Kept::Logits(kernels, targets) => kernels.logit_gradients(targets, d_logprobs, d_entropies),
            Kept::LogSoftmax(LogSoftmax { mut all, targets, temperature }) => {
                let d_logprobs = d_logprobs.unsqueeze(1);
                let weights = d_entropies.map_or_else(
                    || d_logprobs.shallow_clone(),
                    |d_entropies| &d_logprobs + d_entropies.unsqueeze(1) * (&all + self.entropies.unsqueeze(1)),
                ); // [M, V] or [M, 1]
                let d_logits = all.exp_().neg_() * weights;
                let d_logits = d_logits.scatter_add(1, &targets.unsqueeze(1), &d_logprobs) / temperature;
                d_logits.to_kind(self.hidden.kind())
            }
        }
    }
}

/// Log-softmax of a chunk's logits in fp32.
///
/// # Shapes
/// - hidden: `[M, C]`, head: `[V, C]`; returns `[M, V]`.
fn log_softmax(hidden: &Tensor, head: &Tensor, temperature: f64) -> Tensor {
    let logits = hidden.linear::<&Tensor>(head, None); // [M, V]
    let logits = if temperature == 1.0 { logits } else { logits / temperature };
    logits.log_softmax(-1, Kind::Float)
}

/// Log-prob of each row's target token, and the entropy of the row. No gradient flows.
///
/// # Shapes
/// - hidden: `[M, C]` after the final norm, head: `[V, C]`, targets: `[M]` i64; returns `[M]` fp32 twice.
pub fn token_statistics(hidden: &Tensor, head: &Tensor, targets: &Tensor, temperature: f64) -> (Tensor, Tensor) {
    tch::no_grad(|| {
        let rows = chunk_rows_on(head.device(), head.size()[0]);
        let num_rows = hidden.size()[0];
        let (mut logprobs, mut entropies) = (Vec::new(), Vec::new());
        for start in (0..num_rows).step_by(rows as usize) {
            let [hidden, targets] = [hidden, targets].map(|all| all.narrow(0, start, rows.min(num_rows - start)));
            let chunk = TargetLogprobs::new(&hidden, head, &targets, temperature);
            logprobs.push(chunk.logprobs);
            entropies.push(chunk.entropies);
        }
        let join = |parts: Vec<Tensor>| match parts.as_slice() {
            [] => Tensor::zeros([0], (Kind::Float, hidden.device())),
            parts => Tensor::cat(parts, 0),
        };
        (join(logprobs), join(entropies))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fused_kernels::testing;

    /// Log-probs, entropy and gradients in f64 by autograd, beside ours in `kind` on `device`.
    #[track_caller]
    fn check(device: Device, kind: Kind, temperature: f64, tolerance: f64) {
        tch::manual_seed(3);
        let random = |shape: [i64; 2]| (Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 2.0).to_kind(kind);
        let (hidden, head) = (random([7, 5]), random([101, 5]));
        let targets = Tensor::from_slice(&[0_i64, 100, 3, 3, 50, 7, 99]);
        let [d_logprobs, d_entropies] = [(); 2].map(|()| Tensor::randn([7], (Kind::Float, Device::Cpu)));

        let leaves = [&hidden, &head].map(|x| x.to_kind(Kind::Double).copy().set_requires_grad(true));
        let all = (leaves[0].matmul(&leaves[1].tr()) / temperature).log_softmax(-1, Kind::Double);
        let logprobs = all.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
        let entropies = -(all.exp() * &all).sum_dim_intlist(-1, false, Kind::Double);
        let loss = (&logprobs * &d_logprobs).sum(Kind::Double);
        let without = Tensor::run_backward(&[&loss], &leaves, true, false);
        let with = Tensor::run_backward(&[loss + (&entropies * &d_entropies).sum(Kind::Double)], &leaves, false, false);

        let close = |ours: &Tensor, theirs: &Tensor| {
            let ours = ours.to_device(Device::Cpu).to_kind(Kind::Double);
            let difference = (ours - theirs).abs().max().double_value(&[]);
            let size = theirs.abs().max().double_value(&[]).max(1.0);
            assert!(difference < tolerance * size, "{kind:?}: {difference} of {size}");
        };
        for (d_entropies, expected) in [(None, without), (Some(&d_entropies), with)] {
            let [hidden, head, targets, d_logprobs] =
                [&hidden, &head, &targets, &d_logprobs].map(|tensor| tensor.to_device(device));
            let d_entropies = d_entropies.map(|tensor| tensor.to_device(device));
            let ours = TargetLogprobs::new(&hidden, &head, &targets, temperature);
            close(&ours.logprobs, &logprobs);
            close(&ours.entropies, &entropies);
            let before = random([101, 5]);
            let sum = Some(before.to_device(device).copy());
            let (d_hidden, d_head) = ours.backward(&d_logprobs, d_entropies.as_ref(), sum);
            close(&d_hidden, &expected[0]);
            close(&d_head, &(&expected[1] + before.to_kind(Kind::Double)));
        }
    }

    #[test]
    fn log_probs_and_gradients_agree_with_autograd() {
        for temperature in [1.0, 0.7] {
            check(Device::Cpu, Kind::Float, temperature, 2e-5);
            check(Device::Cpu, Kind::Double, temperature, 1e-5); // log-softmax is taken in fp32
        }
    }

    #[test]
    fn log_probs_and_gradients_on_a_gpu_agree_with_autograd() {
        for temperature in [1.0, 0.7] {
            testing::with_gpu(Kind::Float, || check(testing::device(), Kind::Float, temperature, 2e-5));
            // Log-probs are in fp32; gradients are rounded.
            testing::with_gpu(Kind::BFloat16, || check(testing::device(), Kind::BFloat16, temperature, 1e-2));
        }
    }

    #[test]
    fn logits_on_a_gpu_are_not_rounded_to_bf16() {
        testing::with_gpu(Kind::BFloat16, || {
            let device = testing::device();
            // Logits 0 and 8 + 1/64, for which bf16 has no number.
            let hidden = Tensor::from_slice(&[8.0_f32, 0.015_625]).view([1, 2]).to_device(device);
            let head = Tensor::from_slice(&[0.0_f32, 0.0, 1.0, 1.0]).view([2, 2]).to_device(device);
            let [hidden, head] = [hidden, head].map(|matrix| matrix.to_kind(Kind::BFloat16));
            let logprobs = token_statistics(&hidden, &head, &Tensor::from_slice(&[0_i64]).to_device(device), 1.0).0;
            let expect = -(8.015_625_f64 + (-8.015_625_f64).exp().ln_1p());
            assert!((logprobs.double_value(&[0]) - expect).abs() < 1e-5, "{logprobs}");
        });
    }

    #[test]
    fn chunks_are_put_together() {
        tch::manual_seed(4);
        let num_rows = 2 * chunk_rows(400_000) + 1;
        let hidden = Tensor::randn([num_rows, 2], (Kind::Float, Device::Cpu));
        let head = Tensor::randn([400_000, 2], (Kind::Float, Device::Cpu));
        let targets = Tensor::arange(num_rows, (Kind::Int64, Device::Cpu));
        let expected = log_softmax(&hidden, &head, 1.0).gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
        let difference = (token_statistics(&hidden, &head, &targets, 1.0).0 - expected).abs().max().double_value(&[]);
        assert!(difference < 1e-4, "{difference}");
    }
}
