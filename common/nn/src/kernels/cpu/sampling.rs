//! From a row of logits to a token and its log-probability.
//!
//! One pass over the row collects, per chunk, the largest logit and the mass relative to it. From these few numbers
//! follow the normaliser, the chunk that holds the drawn quantile, and which chunks can hold a token that top-k, top-p
//! or min-p keep; nothing the size of the vocabulary is stored or sorted.

use super::Pool;
use super::logit_edits::LogitEdits;
use super::nucleus::{self, Candidate, Limits};
use super::simd::{Kernel, Simd};
use std::cell::RefCell;

/// Logits per chunk: small enough that an fp32 sum over it is exact to a few units in the last place.
const CHUNK: usize = 512;
/// Below this temperature the distribution is its mode; vLLM draws the line at the same place.
const TEMPERATURE_MIN: f32 = 1e-5;
/// Rough speed by which rows are divided among threads.
const LOGITS_PER_NANO: usize = 2;

/// How to choose the next token. The default is the distribution of the model itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; below 1e-5 the most likely token is taken.
    pub temperature: f32,
    /// Keep this many most likely tokens, and those as likely as the last of them; 0 keeps all.
    pub top_k: u32,
    /// Keep the most likely tokens until they have this mass together; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this many times as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
}

/// One row of [`sample_rows`].
#[derive(Debug, Clone, Copy)]
pub struct SampleRequest<'a> {
    pub params: SamplingParams,
    /// In 0..1; makes no difference when the most likely token is taken.
    pub uniform: f64,
    pub edits: LogitEdits<'a>,
    /// Asks for [`RawLogProbs`] with so many tokens.
    pub num_top: Option<usize>,
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    pub token: u32,
    /// Natural logarithm of its probability in the distribution it was drawn from: after temperature and restriction,
    /// or that of the model itself when the most likely token is taken.
    pub log_prob: f32,
}

/// Log-probabilities in the distribution of the model itself, before edits, temperature and restriction.
#[derive(Debug, Clone, PartialEq)]
pub struct RawLogProbs {
    /// Of the chosen token.
    pub log_prob: f32,
    /// The most likely tokens, most likely first.
    pub top: Vec<Sample>,
}

/// A chosen token, with what else was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    pub sample: Sample,
    pub raw: Option<RawLogProbs>,
}

/// Why no token could be chosen.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model has diverged, or a kernel is wrong.
    #[error("the logit of token {token} is {value}, expected a number below infinity")]
    BadLogit { token: u32, value: f32 },
    /// Every token was masked.
    #[error("every logit is -inf, leave at least one token unmasked")]
    NothingAllowed,
    #[error("{name} is {value}, expected {expected}")]
    BadParameter { name: &'static str, value: f64, expected: &'static str },
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

impl SamplingParams {
    /// Whether every field is in its range.
    pub fn validate(&self) -> Result<(), SampleError> {
        let check = |ok: bool, name, value: f32, expected| {
            if ok { Ok(()) } else { Err(SampleError::BadParameter { name, value: f64::from(value), expected }) }
        };
        let Self { temperature, top_p, min_p, .. } = *self;
        check(temperature.is_finite() && temperature >= 0.0, "temperature", temperature, "a number of at least 0")?;
        check(top_p > 0.0 && top_p <= 1.0, "top_p", top_p, "a number above 0 and at most 1")?;
        check((0.0..=1.0).contains(&min_p), "min_p", min_p, "a number from 0 to 1")
    }
}

/// Chooses a token: temperature, then top-k, then top-p, then min-p, each on what the one before left, as the logits
/// warpers of transformers do; then the inverse of the cumulative distribution, in order of token id, at `uniform`.
///
/// Among equal logits, top-k keeps all that tie with the last one kept, as transformers does; top-p prefers the lower
/// token id (transformers leaves that to its sort), and so does the choice of the most likely token.
///
/// # Shapes
/// - logits: `[V]`; -inf marks a token that must not be chosen.
pub fn sample_row(pool: &Pool, logits: &[f32], params: &SamplingParams, uniform: f64) -> Result<Sample, SampleError> {
    params.validate()?;
    if !(0.0..1.0).contains(&uniform) {
        let expected = "a number from 0 to below 1";
        return Err(SampleError::BadParameter { name: "uniform", value: uniform, expected });
    }
    with_workspace(|work| {
        let greedy = params.temperature < TEMPERATURE_MIN;
        let summary = work.summarise(pool, logits, if greedy { 1.0 } else { params.temperature })?;
        if greedy {
            let token = work.first_largest(logits, summary.largest);
            return Ok(Sample { token, log_prob: summary.log_prob(summary.largest) });
        }
        match Limits::of(params) {
            None => Ok(work.draw(pool, logits, &summary, uniform)),
            Some(limits) => {
                let floor = limits.floor(&summary, &work.chunks, logits.len());
                work.collect(logits, floor);
                work.weigh(pool, &summary);
                let total = nucleus::restrict(&mut work.candidates, &mut work.ranked, &limits, summary.total);
                Ok(nucleus::draw(&work.candidates, &summary, total, uniform))
            }
        }
    })
}

/// Edits every row and chooses by [`sample_row`], on all threads.
///
/// # Shapes
/// - logits: `[rows, V]`, edited in place, requests: `[rows]`, the result: `[rows]`.
pub fn sample_rows(pool: &Pool, logits: &mut [f32], requests: &[SampleRequest<'_>]) -> Vec<Result<Drawn, SampleError>> {
    if requests.is_empty() {
        return Vec::new();
    }
    let vocab = logits.len() / requests.len();
    assert_eq!(logits.len(), vocab * requests.len(), "{} rows need equally many logits each", requests.len());
    let rows = logits.chunks_exact_mut(vocab).zip(requests);
    let mut rows: Vec<_> = rows.map(|(logits, request)| (logits, request, Err(SampleError::NothingAllowed))).collect();
    pool.for_each_mut(&mut rows, vocab / LOGITS_PER_NANO, |_, (logits, request, drawn)| {
        *drawn = request.draw(pool, logits);
    });
    rows.into_iter().map(|(_, _, drawn)| drawn).collect()
}

impl SampleRequest<'_> {
    fn draw(&self, pool: &Pool, logits: &mut [f32]) -> Result<Drawn, SampleError> {
        let Self { params, uniform, edits, num_top } = self;
        let Some(num_top) = *num_top else {
            edits.apply(logits);
            return Ok(Drawn { sample: sample_row(pool, logits, params, *uniform)?, raw: None });
        };
        let (summary, top) = top_log_probs(pool, logits, num_top)?;
        let before: Vec<(u32, f32)> = edits.changed().map(|token| (token, logits[token as usize])).collect();
        edits.apply(logits);
        let sample = sample_row(pool, logits, params, *uniform)?;
        let changed = before.iter().find(|(token, _)| *token == sample.token);
        let logit = changed.map_or(logits[sample.token as usize], |(_, logit)| *logit);
        Ok(Drawn { sample, raw: Some(RawLogProbs { log_prob: summary.log_prob(logit), top }) })
    }
}

/// Log-probability of `token` in the distribution of the model itself.
///
/// # Shapes
/// - logits: `[V]`.
pub fn log_softmax_at(pool: &Pool, logits: &[f32], token: u32) -> Result<f32, SampleError> {
    let summary = with_workspace(|work| work.summarise(pool, logits, 1.0))?;
    Ok(summary.log_prob(logits[token as usize]))
}

/// The `num_tokens` most likely tokens of the model itself with their log-probabilities, most likely first, lower ids
/// first among equals. Masked tokens are left out.
///
/// # Shapes
/// - logits: `[V]`; the list holds at most `num_tokens`.
fn top_log_probs(pool: &Pool, logits: &[f32], num_tokens: usize) -> Result<(Summary, Vec<Sample>), SampleError> {
    with_workspace(|work| {
        let summary = work.summarise(pool, logits, 1.0)?;
        if num_tokens == 0 {
            return Ok((summary, Vec::new()));
        }
        work.collect(logits, nucleus::kth_peak(&work.chunks, num_tokens));
        work.candidates.sort_unstable_by(Candidate::by_rank);
        let top = work.candidates.iter().take(num_tokens);
        Ok((summary, top.map(|c| Sample { token: c.token, log_prob: summary.log_prob(c.logit) }).collect()))
    })
}

/// One chunk of a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChunkStats {
    pub(super) largest: f32,
    /// Sum of `exp((logit - largest) / temperature)`.
    mass: f32,
}

/// One row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Summary {
    pub(super) largest: f32,
    pub(super) temperature: f32,
    /// Sum of `exp((logit - largest) / temperature)`.
    pub(super) total: f64,
}

impl Summary {
    /// In the unrestricted distribution.
    fn log_prob(&self, logit: f32) -> f32 {
        (self.log_weight(logit) - self.total.ln()) as f32
    }

    pub(super) fn log_weight(&self, logit: f32) -> f64 {
        (f64::from(logit) - f64::from(self.largest)) / f64::from(self.temperature)
    }
}

/// What a row needs, kept by each thread between rows.
#[derive(Default)]
struct Workspace {
    chunks: Vec<ChunkStats>,
    candidates: Vec<Candidate>,
    ranked: Vec<Candidate>,
}

fn with_workspace<R>(operation: impl FnOnce(&mut Workspace) -> R) -> R {
    thread_local! {
        static WORKSPACE: RefCell<Workspace> = RefCell::default();
    }
    // No kernel runs another task while it holds the workspace, so the borrow is never contested.
    WORKSPACE.with(|work| operation(&mut work.borrow_mut()))
}

impl Workspace {
    /// The pass over the row.
    fn summarise(&mut self, pool: &Pool, logits: &[f32], temperature: f32) -> Result<Summary, SampleError> {
        self.chunks.clear();
        pool.isa().run(Summarise { logits, sharpness: 1.0 / temperature, chunks: &mut self.chunks });
        if self.chunks.iter().any(|c| c.mass.is_nan()) {
            let bad = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY);
            let token = bad.unwrap_or_default();
            return Err(SampleError::BadLogit { token: token as u32, value: logits[token] });
        }
        let largest = self.chunks.iter().fold(f32::NEG_INFINITY, |largest, c| largest.max(c.largest));
        if largest == f32::NEG_INFINITY {
            return Err(SampleError::NothingAllowed);
        }
        let mut summary = Summary { largest, temperature, total: 0.0 };
        summary.total = self.chunks.iter().map(|c| c.mass_in(&summary)).sum();
        Ok(summary)
    }

    fn first_largest(&self, logits: &[f32], largest: f32) -> u32 {
        let chunk = self.chunks.iter().position(|c| c.largest == largest).unwrap_or_default();
        let within = logits[chunk * CHUNK..].iter().position(|x| *x == largest).unwrap_or_default();
        (chunk * CHUNK + within) as u32
    }

    /// Draws from the unrestricted distribution.
    fn draw(&self, pool: &Pool, logits: &[f32], summary: &Summary, uniform: f64) -> Sample {
        let target = uniform * summary.total;
        let mut before = 0.0;
        // Rounding can leave the target at the very end; then it is the last token with any mass.
        let mut chosen = (0, 0.0, 1.0);
        for (i, chunk) in self.chunks.iter().enumerate() {
            let mass = chunk.mass_in(summary);
            if mass > 0.0 {
                chosen = (i, before, mass);
            }
            before += mass;
            if before > target {
                break;
            }
        }
        let (chunk, before, mass) = chosen;
        let ChunkStats { largest, mass: own_mass } = self.chunks[chunk];
        let logits = &logits[chunk * CHUNK..logits.len().min((chunk + 1) * CHUNK)];
        let mut weights = [0.0; CHUNK];
        let weights = &mut weights[..logits.len()];
        let sharpness = 1.0 / summary.temperature;
        // Relative to the chunk's own largest logit: relative to the row's, all of its weights may vanish in fp32.
        pool.isa().run(Weigh { logits, offset: largest, sharpness, weights });
        let within = pick(weights.iter().copied(), (target - before) * f64::from(own_mass) / mass);
        Sample { token: (chunk * CHUNK + within) as u32, log_prob: summary.log_prob(logits[within]) }
    }

    /// Candidates with a logit of at least `floor`, in order of token id.
    fn collect(&mut self, logits: &[f32], floor: f32) {
        self.candidates.clear();
        for (i, chunk) in self.chunks.iter().enumerate() {
            if chunk.largest < floor || chunk.largest == f32::NEG_INFINITY {
                continue;
            }
            let start = i * CHUNK;
            for (j, logit) in logits[start..logits.len().min(start + CHUNK)].iter().enumerate() {
                if *logit >= floor && *logit > f32::NEG_INFINITY {
                    self.candidates.push(Candidate { token: (start + j) as u32, logit: *logit, weight: 0.0 });
                }
            }
        }
    }

    /// Fills in the weights of the candidates.
    fn weigh(&mut self, pool: &Pool, summary: &Summary) {
        let (mut logits, mut weights) = ([0.0; CHUNK], [0.0; CHUNK]);
        for candidates in self.candidates.chunks_mut(CHUNK) {
            for (logit, candidate) in logits.iter_mut().zip(candidates.iter()) {
                *logit = candidate.logit;
            }
            let (logits, weights) = (&logits[..candidates.len()], &mut weights[..candidates.len()]);
            let sharpness = 1.0 / summary.temperature;
            pool.isa().run(Weigh { logits, offset: summary.largest, sharpness, weights });
            for (candidate, weight) in candidates.iter_mut().zip(weights) {
                candidate.weight = *weight;
            }
        }
    }
}

impl ChunkStats {
    /// Its mass relative to the largest logit of the row.
    fn mass_in(&self, summary: &Summary) -> f64 {
        f64::from(self.mass) * summary.log_weight(self.largest).exp()
    }
}

/// The first index at which the running sum passes `target`, or the last one with any weight.
pub(super) fn pick(weights: impl Iterator<Item = f32>, target: f64) -> usize {
    let (mut sum, mut chosen) = (0.0, 0);
    for (i, weight) in weights.enumerate() {
        if weight > 0.0 {
            chosen = i;
            sum += f64::from(weight);
            if sum > target {
                break;
            }
        }
    }
    chosen
}

struct Summarise<'a> {
    logits: &'a [f32],
    /// One over the temperature.
    sharpness: f32,
    chunks: &'a mut Vec<ChunkStats>,
}

impl Kernel for Summarise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let sharpness = S::splat(self.sharpness);
        for chunk in self.logits.chunks(CHUNK) {
            let mut peak = S::splat(f32::NEG_INFINITY);
            for line in chunk.chunks(S::LANES) {
                peak = peak.max(S::load(line, f32::NEG_INFINITY));
            }
            let largest = peak.largest();
            // In a chunk without any token -inf - -inf would be NaN, which is kept for bad logits.
            let offset = S::splat(if largest == f32::NEG_INFINITY { 0.0 } else { largest });
            let mut mass = [S::splat(0.0); 2];
            for lines in chunk.chunks(2 * S::LANES) {
                for (mass, line) in mass.iter_mut().zip(lines.chunks(S::LANES)) {
                    *mass = mass.add(S::load(line, f32::NEG_INFINITY).sub(offset).mul(sharpness).exp());
                }
            }
            self.chunks.push(ChunkStats { largest, mass: mass[0].add(mass[1]).sum() });
        }
    }
}

/// `weights = exp((logits - offset) * sharpness)`.
struct Weigh<'a> {
    logits: &'a [f32],
    offset: f32,
    sharpness: f32,
    weights: &'a mut [f32],
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let (offset, sharpness) = (S::splat(self.offset), S::splat(self.sharpness));
        for (line, weights) in self.logits.chunks(S::LANES).zip(self.weights.chunks_mut(S::LANES)) {
            S::load(line, f32::NEG_INFINITY).sub(offset).mul(sharpness).exp().store(weights);
        }
    }
}

#[cfg(test)]
#[path = "sampling_tests.rs"]
pub(super) mod tests;
