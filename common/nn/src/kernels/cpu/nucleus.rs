//! Top-k, top-p and min-p without sorting: the tokens that may survive are found from the chunk statistics of a row,
//! and the cuts among them by selection.

use super::sampling::{ChunkStats, Sample, SamplingParams, Summary, pick};
use std::cmp::Ordering;

/// A token that may be kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) token: u32,
    pub(super) logit: f32,
    /// `exp((logit - largest) / temperature)`.
    pub(super) weight: f32,
}

impl Candidate {
    /// Most likely first, lower ids first among equals.
    pub(super) fn by_rank(a: &Self, b: &Self) -> Ordering {
        b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
    }
}

/// The restrictions of a request; at least one is there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    top_k: Option<usize>,
    top_p: Option<f64>,
    min_p: f32,
}

impl Limits {
    pub(super) fn of(params: &SamplingParams) -> Option<Self> {
        let limits = Self {
            top_k: (params.top_k > 0).then_some(params.top_k as usize),
            top_p: (params.top_p < 1.0).then_some(f64::from(params.top_p)),
            min_p: params.min_p,
        };
        (limits.top_k.is_some() || limits.top_p.is_some() || limits.min_p > 0.0).then_some(limits)
    }

    /// A logit below which no token can be kept.
    pub(super) fn floor(&self, summary: &Summary, chunks: &[ChunkStats], vocab: usize) -> f32 {
        /// Below 1, so that rounding here cannot exclude a token that the exact comparison keeps.
        const MARGIN: f64 = 0.999;
        let at_weight = |weight: f64| {
            let logit = f64::from(summary.largest) + f64::from(summary.temperature) * (weight * MARGIN).ln();
            (logit as f32).next_down()
        };
        let top_k = self.top_k.map_or(f32::NEG_INFINITY, |k| kth_peak(chunks, k));
        match self.top_p {
            // Tokens that weigh less than this weigh less than 1 - top_p of the whole even all together.
            Some(top_p) if self.top_k.is_none() => {
                at_weight(((1.0 - top_p) * summary.total / vocab as f64).max(f64::from(self.min_p)))
            }
            // The mass that top-p counts against is that of the tokens top-k kept: min-p must not thin them out yet.
            Some(_) => top_k,
            None => top_k.max(at_weight(f64::from(self.min_p))),
        }
    }
}

/// The `k`-th largest of the chunks' peaks: at least `k` logits are no smaller. -inf if there are fewer chunks.
pub(super) fn kth_peak(chunks: &[ChunkStats], k: usize) -> f32 {
    let mut peaks: Vec<f32> = chunks.iter().map(|c| c.largest).collect();
    if k > peaks.len() {
        return f32::NEG_INFINITY;
    }
    *peaks.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// Leaves the tokens that every limit keeps, in the order given, and returns their total weight. `row_total` is the
/// weight of the whole row; `ranked` is scratch.
pub(super) fn restrict(
    candidates: &mut Vec<Candidate>,
    ranked: &mut Vec<Candidate>,
    limits: &Limits,
    row_total: f64,
) -> f64 {
    let mut total = row_total;
    if let Some(top_k) = limits.top_k {
        if top_k < candidates.len() {
            ranked.clone_from(candidates);
            let kth = ranked.select_nth_unstable_by(top_k - 1, Candidate::by_rank).1.logit;
            candidates.retain(|c| c.logit >= kth);
        }
        total = weight(candidates);
    }
    if let Some(top_p) = limits.top_p {
        ranked.clone_from(candidates);
        if let Some(last) = nucleus_end(ranked, top_p * total) {
            candidates.retain(|c| Candidate::by_rank(c, &last).is_le());
        }
    }
    if limits.min_p > 0.0 {
        candidates.retain(|c| c.weight >= limits.min_p);
    }
    weight(candidates)
}

/// Draws one of the candidates, `total` being their weight.
pub(super) fn draw(candidates: &[Candidate], summary: &Summary, total: f64, uniform: f64) -> Sample {
    let chosen = candidates[pick(candidates.iter().map(|c| c.weight), uniform * total)];
    Sample { token: chosen.token, log_prob: (summary.log_weight(chosen.logit) - total.ln()) as f32 }
}

/// The lowest ranked token that is kept when a token is dropped once those ranked above it weigh `mass` or more.
/// Expected time is linear: each round looks at half of what is left.
fn nucleus_end(candidates: &mut [Candidate], mass: f64) -> Option<Candidate> {
    // Everything ranked above `open` is kept and weighs `above`; the answer is in `open`.
    let (mut open, mut above) = (candidates, 0.0);
    while open.len() > 1 {
        let middle = open.len() / 2;
        open.select_nth_unstable_by(middle, Candidate::by_rank);
        let (upper, lower) = open.split_at_mut(middle);
        let with_upper = above + weight(upper);
        if with_upper < mass {
            (open, above) = (lower, with_upper);
        } else {
            open = upper;
        }
    }
    open.first().copied()
}

fn weight(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.weight)).sum()
}
