//! Log-probs and entropies of tokens from hidden states, without ever holding all logits.

use tch::{Device, Kind, Tensor};

use crate::function::linear;
use crate::kernels::cpu::training::{self, TargetSummary};
use crate::tensor_data::{f32_slice, f32_slice_mut};

/// Bytes of logits that one chunk may take.
const CHUNK_BYTES: i64 = 64 << 20;

/// Rows of hidden states whose logits fit a chunk.
#[must_use]
pub fn chunk_rows(vocab_size: i64) -> i64 {
    (CHUNK_BYTES / (4 * vocab_size)).max(1)
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
    targets: Tensor,
    temperature: f64,
    kept: Kept,
}

/// What is kept of the logits.
#[derive(Debug)]
enum Kept {
    /// fp32 on the CPU: themselves, `[M, V]`, which become their gradient.
    Logits(Tensor, Vec<TargetSummary>),
    /// Their log-softmax, `[M, V]`, fp32.
    LogSoftmax(Tensor),
}

impl TargetLogprobs {
    /// # Shapes
    /// - hidden: `[M, C]` after the final norm, head: `[V, C]`, targets: `[M]` i64. No gradient flows but by
    ///   [`TargetLogprobs::backward`].
    #[must_use]
    pub fn new(hidden: &Tensor, head: &Tensor, targets: &Tensor, temperature: f64) -> Self {
        let (hidden, head) = (hidden.detach(), head.detach());
        let (logprobs, entropies, kept) = if hidden.device() == Device::Cpu && hidden.kind() == Kind::Float {
            let logits = linear(&hidden, &head, None, None); // [M, V]
            let summaries = training::summarise_targets(f32_slice(&logits), &indices(targets), temperature as f32);
            let column =
                |value: fn(&TargetSummary) -> f32| Tensor::from_slice(&summaries.iter().map(value).collect::<Vec<_>>());
            (column(|row| row.logprob), column(|row| row.entropy), Kept::Logits(logits, summaries))
        } else {
            let all = log_softmax(&hidden, &head, temperature); // [M, V]
            let logprobs = all.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
            let entropies = -(all.exp() * &all).sum_dim_intlist(-1, false, Kind::Float);
            (logprobs, entropies, Kept::LogSoftmax(all))
        };
        Self { logprobs, entropies, hidden, head, targets: targets.shallow_clone(), temperature, kept }
    }

    /// The gradients of the hidden states, `[M, C]`, and of the head, `[V, C]`, the latter added to `d_head`.
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
        if hidden.device() == Device::Cpu && hidden.kind() == Kind::Float {
            let d_head = linear(&d_logits.tr(), &hidden.tr(), None, d_head.as_ref());
            return (linear(&d_logits, &head.tr(), None, None), d_head);
        }
        let d_chunk = d_logits.tr().matmul(&hidden);
        let d_head = d_head.map_or_else(|| d_chunk.shallow_clone(), |sum| sum + &d_chunk);
        (d_logits.matmul(&head), d_head)
    }

    /// As [`TargetLogprobs::backward`] where the head is frozen: the gradients of the hidden states alone, `[M, C]`.
    pub fn backward_frozen(self, d_logprobs: &Tensor, d_entropies: Option<&Tensor>) -> Tensor {
        let head = self.head.shallow_clone();
        let d_logits = self.logits_backward(d_logprobs, d_entropies); // [M, V]
        if head.device() == Device::Cpu && head.kind() == Kind::Float {
            return linear(&d_logits, &head.tr(), None, None);
        }
        d_logits.matmul(&head)
    }

    /// The gradients of the logits, `[M, V]`, in the type of the hidden states.
    fn logits_backward(self, d_logprobs: &Tensor, d_entropies: Option<&Tensor>) -> Tensor {
        match self.kept {
            Kept::Logits(mut logits, summaries) => {
                let d_entropies = d_entropies.map_or_else(|| d_logprobs.zeros_like(), Tensor::contiguous);
                training::target_logprobs_backward(
                    f32_slice_mut(&mut logits),
                    &indices(&self.targets),
                    &summaries,
                    (f32_slice(&d_logprobs.contiguous()), f32_slice(&d_entropies)),
                    self.temperature as f32,
                );
                logits
            }
            Kept::LogSoftmax(mut all) => {
                let d_logprobs = d_logprobs.unsqueeze(1);
                let weights = d_entropies.map_or_else(
                    || d_logprobs.shallow_clone(),
                    |d_entropies| &d_logprobs + d_entropies.unsqueeze(1) * (&all + self.entropies.unsqueeze(1)),
                ); // [M, V] or [M, 1]
                let d_logits = all.exp_().neg_() * weights;
                let d_logits = d_logits.scatter_add(1, &self.targets.unsqueeze(1), &d_logprobs) / self.temperature;
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

fn indices(targets: &Tensor) -> Vec<i64> {
    Vec::try_from(targets).expect("targets are a vector of integers")
}

/// Log-prob of each row's target token, and the entropy of the row. No gradient flows.
///
/// # Shapes
/// - hidden: `[M, C]` after the final norm, head: `[V, C]`, targets: `[M]` i64; returns `[M]` fp32 twice.
pub fn token_statistics(hidden: &Tensor, head: &Tensor, targets: &Tensor, temperature: f64) -> (Tensor, Tensor) {
    tch::no_grad(|| {
        let rows = chunk_rows(head.size()[0]);
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

    /// Log-probs, entropy and gradients in f64 by autograd, beside ours in `kind`.
    #[track_caller]
    fn check(kind: Kind, temperature: f64, tolerance: f64) {
        tch::manual_seed(3);
        let random = |shape: [i64; 2]| Tensor::randn(shape, (kind, Device::Cpu)) * 2.0;
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
            let difference = (ours.to_kind(Kind::Double) - theirs).abs().max().double_value(&[]);
            assert!(difference < tolerance, "{kind:?}: {difference}");
        };
        for (d_entropies, expected) in [(None, without), (Some(&d_entropies), with)] {
            let ours = TargetLogprobs::new(&hidden, &head, &targets, temperature);
            close(&ours.logprobs, &logprobs);
            close(&ours.entropies, &entropies);
            let before = random([101, 5]);
            let (d_hidden, d_head) = ours.backward(&d_logprobs, d_entropies, Some(before.copy()));
            close(&d_hidden, &expected[0]);
            close(&(d_head - before), &expected[1]);
        }
    }

    #[test]
    fn log_probs_and_gradients_agree_with_autograd() {
        for temperature in [1.0, 0.7] {
            check(Kind::Float, temperature, 2e-5);
            check(Kind::Double, temperature, 1e-5); // log-softmax is taken in fp32
        }
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
