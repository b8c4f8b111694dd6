//! Launches of `sampling.cu`.

use super::launch::{Args, Argument};
use super::{DevicePtr, Launch, LogitKind, Program};
use crate::kernels::cpu::SamplingParams;

/// Chooses a token a row, by the rules of [`crate::kernels::cpu::sample_row`].
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub kind: LogitKind,
    pub num_rows: usize,
    /// `V`, at most 524288.
    pub vocab_size: usize,
    /// `[rows, V]`; -inf marks a token that must not be chosen.
    pub logits: DevicePtr,
    /// [`DeviceSamplingParams`] `[rows]`.
    pub params: DevicePtr,
    /// fp32 `[rows]`, in 0..1.
    pub uniforms: DevicePtr,
    /// i32 `[rows]`: rows where it is 0 are not in use and left alone. None: all are in use.
    pub context_lens: Option<DevicePtr>,
    /// i32 `[rows]`; after [`SampleStatus::BadLogit`], where the bad one stands.
    pub tokens: DevicePtr,
    /// fp32 `[rows]`, in the distribution drawn from; -inf without a token.
    pub log_probs: DevicePtr,
    /// [`SampleStatus`] as i32 `[rows]`.
    pub statuses: DevicePtr,
}

/// Sets the logits of stop tokens to -inf in rows that must not stop yet.
#[derive(Debug, Clone, Copy)]
pub struct Suppress {
    pub kind: LogitKind,
    pub num_rows: usize,
    pub vocab_size: usize,
    /// `[rows, V]`.
    pub logits: DevicePtr,
    /// i32 `[rows]`, 0 for a row that is not in use.
    pub context_lens: DevicePtr,
    /// i32 `[rows]`: rows with fewer than `min_tokens` must not stop.
    pub num_generated: DevicePtr,
    /// i32 `[rows]`.
    pub min_tokens: DevicePtr,
    /// i32 `[rows, max_stops]`, negative past a row's last.
    pub stop_tokens: DevicePtr,
    pub max_stops: usize,
}

/// [`SamplingParams`] as the kernel reads them.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct DeviceSamplingParams {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
}

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleStatus {
    Sampled = 0,
    /// A NaN, or +inf: the model has diverged, or a kernel is wrong.
    BadLogit = 1,
    /// Every token was masked.
    NothingAllowed = 2,
}

/// Of the kernel, for any vocabulary.
const NUM_THREADS: u32 = 512;

/// Which the caller has validated.
impl From<SamplingParams> for DeviceSamplingParams {
    fn from(params: SamplingParams) -> Self {
        let SamplingParams { temperature, top_k, top_p, min_p } = params;
        Self { temperature, top_k, top_p, min_p }
    }
}

impl DeviceSamplingParams {
    /// The bits, as they lie in memory.
    #[must_use]
    pub fn words(self) -> [i32; 4] {
        [self.temperature.to_bits(), self.top_k, self.top_p.to_bits(), self.min_p.to_bits()].map(|word| word as i32)
    }
}

impl Sample {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let Self { logits, params, uniforms, tokens, log_probs, statuses, .. } = *self;
        let context_lens = self.context_lens.unwrap_or_default();
        let vocab = self.vocab_size as i32;
        let args =
            SampleArgs { logits, params, uniforms, context_lens, tokens, log_probs, statuses, vocab, padding: 0 };
        Launch {
            program: Program::Sampling(self.kind),
            kernel: "sample",
            grid: [self.num_rows as u32, 1, 1],
            num_threads: NUM_THREADS,
            args: Args::default().with(args),
        }
    }
}

impl Suppress {
    #[must_use]
    pub fn launch(&self) -> Launch {
        let args = Args::default().with(self.logits).with(self.context_lens).with(self.num_generated);
        let args = args.with(self.min_tokens).with(self.stop_tokens).with(self.max_stops as i32);
        Launch {
            program: Program::Sampling(self.kind),
            kernel: "suppress",
            grid: [self.num_rows as u32, 1, 1],
            num_threads: 32,
            args: args.with(self.vocab_size as i32),
        }
    }
}

/// `Sample` of the source.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct SampleArgs {
    logits: DevicePtr,
    params: DevicePtr,
    uniforms: DevicePtr,
    context_lens: DevicePtr,
    tokens: DevicePtr,
    log_probs: DevicePtr,
    statuses: DevicePtr,
    vocab: i32,
    padding: i32,
}

impl Argument for SampleArgs {}

#[cfg(test)]
#[path = "sampling_tests.rs"]
mod tests;
