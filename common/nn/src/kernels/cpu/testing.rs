//! What the tests of the kernels share.

use super::{Isa, LogitEdits, Pool, SamplingParams};
use std::collections::BTreeMap;

/// One and two threads on every instruction set of this machine.
pub(crate) fn pools() -> Vec<Pool> {
    let isas = Isa::available();
    isas.iter().flat_map(|isa| [1, 2].map(|threads| Pool::with_isa(threads, *isa).unwrap())).collect()
}

/// Numbers in -1..1, always the same for a seed.
pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len).map(|_| (uniform(&mut state) * 2.0 - 1.0) as f32).collect()
}

/// The next number in 0..1 of SplitMix64.
pub(crate) fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Equal within `tolerance`, relative to the larger of 1 and the expected value.
#[track_caller]
pub(crate) fn assert_close(actual: &[f32], expect: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expect.len());
    for (i, (a, e)) in actual.iter().zip(expect).enumerate() {
        assert!((f64::from(*a) - e).abs() <= tolerance * e.abs().max(1.0), "element {i} is {a}, not {e}");
    }
}

/// Equal in every bit, signs of zero included.
#[track_caller]
pub(crate) fn assert_same_bits(actual: &[f32], expect: &[f32], what: &str) {
    assert!(actual.iter().map(|x| x.to_bits()).eq(expect.iter().map(|x| x.to_bits())), "{what} differs");
}

pub(super) const PLAIN: SamplingParams = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

pub(super) const NO_EDITS: LogitEdits<'static> = LogitEdits {
    allowed: &[],
    bad: &[],
    suppress: &[],
    bias: &BTreeMap::new(),
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    counts: &[],
};

/// Probabilities of the whole vocabulary, the way transformers gets them: warp, sort, drop, renormalise.
pub(super) fn probabilities(logits: &[f64], params: &SamplingParams) -> Vec<f64> {
    let scaled: Vec<f64> = logits.iter().map(|x| x / f64::from(params.temperature)).collect();
    let softmax = |kept: &[bool]| -> Vec<f64> {
        let of_kept = scaled.iter().zip(kept).map(|(x, k)| if *k { *x } else { f64::NEG_INFINITY });
        let largest = of_kept.clone().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = of_kept.map(|x| (x - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| w / total).collect()
    };
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap().then(a.cmp(b)));
    let mut kept = vec![true; logits.len()];
    if params.top_k > 0 && (params.top_k as usize) < logits.len() {
        let kth = logits[order[params.top_k as usize - 1]];
        (0..logits.len()).for_each(|i| kept[i] &= logits[i] >= kth);
    }
    if params.top_p < 1.0 {
        let (probs, mut before) = (softmax(&kept), 0.0);
        for i in &order {
            kept[*i] &= before < f64::from(params.top_p);
            before += probs[*i];
        }
    }
    let probs = softmax(&kept);
    let largest = probs.iter().copied().fold(0.0, f64::max);
    (0..logits.len()).for_each(|i| kept[i] &= probs[i] >= f64::from(params.min_p) * largest);
    softmax(&kept)
}
