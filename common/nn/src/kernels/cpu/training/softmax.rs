//! Log-probs of target tokens from logits, and the gradient of the logits in their own memory.

use super::{Isa, Kernel, Rows, RowsMut, Simd, parallel_for};

/// What is kept of one row of logits.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TargetSummary {
    /// Of the target token.
    pub logprob: f32,
    /// Of the row's distribution, in nats.
    pub entropy: f32,
    /// Logarithm of the sum of exponentials of the logits over the temperature.
    pub log_sum: f32,
}

/// # Shapes
/// - logits: `[M, V]`, targets: `[M]`, each below V; returns `[M]`.
#[must_use]
pub fn summarise_targets(logits: &[f32], targets: &[i64], temperature: f32) -> Vec<TargetSummary> {
    let mut summaries = vec![TargetSummary::default(); targets.len()];
    let (logits, isa) = (rows(logits, targets), Isa::detect());
    let out = Summaries(summaries.as_mut_ptr());
    parallel_for(targets.len(), 1, |range| {
        for i in range {
            let row = logits.row(i);
            let [peak, mass, moment] = isa.run(Summarise { logits: row, sharpness: 1.0 / temperature });
            let logarithm = mass.ln();
            let logprob = (row[targets[i] as usize] - peak) / temperature - logarithm;
            let summary =
                TargetSummary { logprob, entropy: logarithm - moment / mass, log_sum: peak / temperature + logarithm };
            // SAFETY: each summary is written by one thread, and the vector is as long as `targets`.
            unsafe { *out.get().add(i) = summary };
        }
    });
    summaries
}

/// Writes the gradient of the logits over them:
/// `(d_logprob * (onehot(target) - softmax) - d_entropy * softmax * (log softmax + entropy)) / temperature`.
///
/// # Shapes
/// - logits: `[M, V]`, targets, summaries and gradients of log-probs and entropies: `[M]`.
pub fn target_logprobs_backward(
    logits: &mut [f32],
    targets: &[i64],
    summaries: &[TargetSummary],
    (d_logprobs, d_entropies): (&[f32], &[f32]),
    temperature: f32,
) {
    let num_rows = targets.len();
    assert!([summaries.len(), d_logprobs.len(), d_entropies.len()] == [num_rows; 3], "every row needs its gradients");
    if num_rows == 0 {
        return;
    }
    let (width, isa) = (rows(logits, targets).width(), Isa::detect());
    let logits = RowsMut::new(logits, width).share();
    parallel_for(num_rows, 1, |range| {
        for i in range {
            // SAFETY: each row is written by one thread.
            let row = unsafe { logits.row(i) };
            let (d_logprob, d_entropy) = (d_logprobs[i] / temperature, d_entropies[i] / temperature);
            isa.run(Weigh {
                logits: row,
                sharpness: 1.0 / temperature,
                offset: summaries[i].log_sum,
                factor: -d_logprob - d_entropy * summaries[i].entropy,
                slope: -d_entropy,
            });
            row[targets[i] as usize] += d_logprob;
        }
    });
}

fn rows<'a>(logits: &'a [f32], targets: &[i64]) -> Rows<'a> {
    let width = logits.len() / targets.len().max(1);
    assert!(logits.len() == targets.len() * width, "every row of logits needs its target");
    Rows::new(logits, width.max(1))
}

struct Summaries(*mut TargetSummary);

// SAFETY: whoever uses the pointer writes each place from one thread.
unsafe impl Sync for Summaries {}

impl Summaries {
    fn get(&self) -> *mut TargetSummary {
        self.0
    }
}

/// Peak, sum of `e = exp((logit - peak) * sharpness)`, and sum of `e * (logit - peak) * sharpness`.
struct Summarise<'a> {
    logits: &'a [f32],
    sharpness: f32,
}

impl Kernel for Summarise<'_> {
    type Output = [f32; 3];

    #[inline(always)]
    fn run<S: Simd>(self) -> [f32; 3] {
        let mut peaks = [S::splat(f32::NEG_INFINITY); 4];
        for lines in self.logits.chunks(4 * S::LANES) {
            for (peak, line) in peaks.iter_mut().zip(lines.chunks(S::LANES)) {
                *peak = peak.max(S::load(line, f32::NEG_INFINITY));
            }
        }
        let [a, b, c, d] = peaks;
        let peak = a.max(b).max(c.max(d)).largest();
        let (offset, sharpness) = (S::splat(peak), S::splat(self.sharpness));
        let (mut mass, mut moment) = ([S::splat(0.0); 4], [S::splat(0.0); 4]);
        for lines in self.logits.chunks(4 * S::LANES) {
            for ((mass, moment), line) in mass.iter_mut().zip(&mut moment).zip(lines.chunks(S::LANES)) {
                // A tail is filled with what weighs nothing, finite so that the moment is no NaN.
                let x = S::load(line, -1e30).sub(offset).mul(sharpness);
                let weight = x.exp();
                *mass = mass.add(weight);
                *moment = weight.mul_add(x, *moment);
            }
        }
        let total = |[a, b, c, d]: [S; 4]| a.add(b).add(c.add(d)).sum();
        [peak, total(mass), total(moment)]
    }
}

/// `logits = (factor + slope * x) * exp(x)` with `x = logits * sharpness - offset`.
struct Weigh<'a> {
    logits: &'a mut [f32],
    sharpness: f32,
    offset: f32,
    factor: f32,
    slope: f32,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let (sharpness, offset) = (S::splat(self.sharpness), S::splat(-self.offset));
        let (factor, slope) = (S::splat(self.factor), S::splat(self.slope));
        for line in self.logits.chunks_mut(S::LANES) {
            let x = S::load(line, 0.0).mul_add(sharpness, offset);
            x.mul_add(slope, factor).mul(x.exp()).store(line);
        }
    }
}
