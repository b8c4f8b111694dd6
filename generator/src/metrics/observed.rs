//! What is observed of samples and of weight pushes from beside the engine.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aha_core::rollout::FinishReason;

use super::histogram::Histogram;

const FIRST_TOKEN_BOUNDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// The first of the bounds between tokens: small models take less than vLLM's first, the one after them.
pub(super) const FINER_INTER_TOKEN_BOUNDS: usize = 3;
const INTER_TOKEN_BOUNDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
];
const REQUEST_BOUNDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// From a swap of pointers up to one that copies.
const SWAP_BOUNDS: &[f64] =
    &[0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];

/// Since the start. A sample is what vLLM calls a request.
#[derive(Debug)]
pub(crate) struct Observed {
    pub(super) first_token: Histogram,
    pub(super) inter_token: Histogram,
    pub(super) time_per_token: Histogram,
    pub(super) request: Histogram,
    pub(super) decode: Histogram,
    pub(super) prompt: Histogram,
    pub(super) generation: Histogram,
    pub(super) receive: Histogram,
    pub(super) swap: Histogram,
    prompt_tokens: AtomicU64,
    stop: AtomicU64,
    length: AtomicU64,
    aborted: AtomicU64,
}

/// A sample that has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) reason: FinishReason,
    /// Since its request.
    pub(crate) after: Duration,
    /// From its first to its last token.
    pub(crate) decode: Duration,
    pub(crate) prompt_tokens: usize,
    pub(crate) generation_tokens: usize,
}

impl Observed {
    pub(crate) fn new(max_model_len: usize) -> Self {
        Self {
            first_token: Histogram::of_durations(FIRST_TOKEN_BOUNDS),
            inter_token: Histogram::of_durations(INTER_TOKEN_BOUNDS),
            time_per_token: Histogram::of_durations(INTER_TOKEN_BOUNDS),
            request: Histogram::of_durations(REQUEST_BOUNDS),
            decode: Histogram::of_durations(REQUEST_BOUNDS),
            prompt: Histogram::of_numbers(max_model_len),
            generation: Histogram::of_numbers(max_model_len),
            receive: Histogram::of_durations(REQUEST_BOUNDS),
            swap: Histogram::of_durations(SWAP_BOUNDS),
            prompt_tokens: AtomicU64::new(0),
            stop: AtomicU64::new(0),
            length: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
        }
    }

    /// The first token of a sample came this long after its request.
    pub(crate) fn first_token(&self, after: Duration, prompt_tokens: usize) {
        self.first_token.observe(after);
        self.prompt_tokens.fetch_add(prompt_tokens as u64, Ordering::Relaxed);
    }

    /// Another token came this long after the one before.
    pub(crate) fn next_token(&self, after: Duration) {
        self.inter_token.observe(after);
    }

    pub(crate) fn finished(&self, ended: &Ended) {
        self.ended(ended.reason, 1);
        if ended.reason == FinishReason::Aborted {
            return;
        }
        self.request.observe(ended.after);
        self.decode.observe(ended.decode);
        self.prompt.observe_number(ended.prompt_tokens);
        self.generation.observe_number(ended.generation_tokens);
        if let Some(gaps) = ended.generation_tokens.checked_sub(1).filter(|gaps| *gaps > 0) {
            self.time_per_token.observe(ended.decode.div_f64(gaps as f64));
        }
    }

    /// So many samples will not end: their client, the engine, or the time they had is gone.
    pub(crate) fn given_up(&self, num_samples: usize) {
        self.ended(FinishReason::Aborted, num_samples);
    }

    /// Pushed weights are in place.
    pub(crate) fn pushed(&self, receive: Duration, swap: Duration) {
        self.receive.observe(receive);
        self.swap.observe(swap);
    }

    pub(super) fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens.load(Ordering::Relaxed)
    }

    pub(super) fn num_ended(&self) -> Vec<(&'static str, u64)> {
        let counts = [("stop", &self.stop), ("length", &self.length), ("abort", &self.aborted)];
        counts.map(|(reason, count)| (reason, count.load(Ordering::Relaxed))).to_vec()
    }

    fn ended(&self, reason: FinishReason, num_samples: usize) {
        let count = match reason {
            FinishReason::Stop => &self.stop,
            FinishReason::Length => &self.length,
            FinishReason::Aborted => &self.aborted,
        };
        count.fetch_add(num_samples as u64, Ordering::Relaxed);
    }
}
