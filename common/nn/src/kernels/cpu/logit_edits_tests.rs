//! Tests of [`super`], and of what is drawn afterwards, against f64 and one token at a time.

use super::super::sampling::{SampleRequest, SamplingParams, sample_rows};
use super::super::testing::{NO_EDITS, PLAIN, pools, probabilities, random, uniform};
use super::super::{Drawn, Pool};
use super::*;
use std::collections::{HashMap, HashSet};

type Options<'a> = (SamplingParams, LogitEdits<'a>);

/// The edited logit of every token, in vLLM's order.
fn reference(logits: &[f32], edits: &LogitEdits<'_>) -> Vec<f64> {
    let allowed: HashSet<u32> = edits.allowed.iter().copied().collect();
    let counts: HashMap<u32, u32> = edits.counts.iter().copied().collect();
    let one = |(token, logit): (u32, &f32)| {
        let mut logit = f64::from(*logit);
        if !allowed.is_empty() && !allowed.contains(&token) {
            logit = f64::NEG_INFINITY;
        }
        if edits.bad.contains(&token) || edits.suppress.contains(&token) {
            logit = f64::NEG_INFINITY;
        }
        logit += f64::from(*edits.bias.get(&token).unwrap_or(&0.0));
        if let Some(count) = counts.get(&token) {
            let penalty = f64::from(edits.repetition_penalty);
            logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
            logit -= f64::from(edits.frequency_penalty) * f64::from(*count);
            logit -= f64::from(edits.presence_penalty) * f64::from((*count).min(1));
        }
        logit
    };
    (0..).zip(logits).map(one).collect()
}

/// Draws once for each of `uniforms`, in batches.
fn draw(
    pool: &Pool,
    logits: &[f32],
    (params, edits): Options<'_>,
    uniforms: &[f64],
    num_top: Option<usize>,
) -> Vec<Drawn> {
    let batches = uniforms.chunks(64).flat_map(|uniforms| {
        let mut rows = logits.repeat(uniforms.len());
        let request = |&uniform: &f64| SampleRequest { params, uniform, edits, num_top };
        sample_rows(pool, &mut rows, &uniforms.iter().map(request).collect::<Vec<_>>())
    });
    batches.map(Result::unwrap).collect()
}

/// Pearson's statistic of the draws, over the value that 99.99 % of fair ones stay below (Wilson and Hilferty's
/// approximation): above 1 they were not drawn from `probs`.
fn misfit(drawn: &[Drawn], probs: &[f64]) -> f64 {
    let mut counts = vec![0.0; probs.len()];
    drawn.iter().for_each(|drawn| counts[drawn.sample.token as usize] += 1.0);
    let expected = probs.iter().map(|p| p * drawn.len() as f64);
    // A token that must not be drawn, and was, makes the sum infinite.
    let terms = counts.iter().zip(expected).filter(|(count, expected)| **count > 0.0 || *expected > 0.0);
    let chi_square: f64 = terms.map(|(count, expected)| (count - expected).powi(2) / expected).sum();
    let freedom = (probs.iter().filter(|p| **p > 0.0).count() - 1) as f64;
    let spread = 2.0 / (9.0 * freedom);
    chi_square / (freedom * (1.0 - spread + 3.719 * spread.sqrt()).powi(3))
}

#[track_caller]
fn check_frequencies(name: &str, logits: &[f32], right: Options<'_>, wrong: Options<'_>) {
    let mut state = 7;
    let uniforms: Vec<f64> = (0..200_000).map(|_| uniform(&mut state)).collect();
    let drawn = draw(&Pool::new(1).unwrap(), logits, right, &uniforms, None);
    let misfit = |(params, edits)| misfit(&drawn, &probabilities(&reference(logits, &edits), &params));
    let (right, wrong) = (misfit(right), misfit(wrong));
    assert!(right < 1.0 && wrong > 1.0, "{name}: {right} against the right distribution, {wrong} against the wrong");
}

const COUNTS: &[(u32, u32)] = &[(0, 0), (2, 3), (3, 1), (5, 0), (7, 2), (9, 1)];

/// 200,000 draws with each option fit their exact distribution, and not that of the option beside it, which is wrong by
/// little.
#[test]
fn frequencies_pass_a_chi_square_test_under_every_option() {
    let logits: Vec<f32> = random(12, 3).iter().map(|x| x * 2.0).collect();
    assert!(
        COUNTS.iter().any(|(t, _)| logits[*t as usize] > 0.2) && COUNTS.iter().any(|(t, _)| logits[*t as usize] < -0.2)
    );
    let (bias, less) = (BTreeMap::from([(1, 1.5), (4, -0.7)]), BTreeMap::from([(1, 1.5), (4, -0.5)]));
    let counted = LogitEdits { counts: COUNTS, ..NO_EDITS };
    let only = |params| (params, NO_EDITS);
    let all = LogitEdits {
        bad: &[6],
        bias: &bias,
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: -0.2,
        ..counted
    };
    let some = LogitEdits { allowed: &[0, 1, 2, 3, 4, 7, 11], suppress: &[3], ..all };
    let warm = SamplingParams { temperature: 1.4, top_k: 9, top_p: 0.9, min_p: 0.02 };
    let cases = [
        ("nothing", only(PLAIN), only(SamplingParams { temperature: 1.04, ..PLAIN })),
        (
            "temperature",
            only(SamplingParams { temperature: 0.7, ..PLAIN }),
            only(SamplingParams { temperature: 0.73, ..PLAIN }),
        ),
        ("top_k", only(SamplingParams { top_k: 8, ..PLAIN }), only(SamplingParams { top_k: 7, ..PLAIN })),
        ("top_p", only(SamplingParams { top_p: 0.9, ..PLAIN }), only(SamplingParams { top_p: 0.97, ..PLAIN })),
        ("min_p", only(SamplingParams { min_p: 0.1, ..PLAIN }), only(SamplingParams { min_p: 0.02, ..PLAIN })),
        (
            "repetition_penalty",
            (PLAIN, LogitEdits { repetition_penalty: 1.3, ..counted }),
            (PLAIN, LogitEdits { repetition_penalty: 1.25, ..counted }),
        ),
        (
            "presence_penalty",
            (PLAIN, LogitEdits { presence_penalty: 0.5, ..counted }),
            (PLAIN, LogitEdits { presence_penalty: 0.45, ..counted }),
        ),
        (
            "frequency_penalty",
            (PLAIN, LogitEdits { frequency_penalty: 0.5, ..counted }),
            (PLAIN, LogitEdits { presence_penalty: 0.5, ..counted }),
        ),
        (
            "logit_bias",
            (PLAIN, LogitEdits { bias: &bias, ..NO_EDITS }),
            (PLAIN, LogitEdits { bias: &less, ..NO_EDITS }),
        ),
        (
            "allowed_token_ids",
            (PLAIN, LogitEdits { allowed: &[0, 3, 4, 11], ..NO_EDITS }),
            (PLAIN, LogitEdits { allowed: &[0, 3, 4], ..NO_EDITS }),
        ),
        (
            "bad_token_ids",
            (PLAIN, LogitEdits { bad: &[5, 1], ..NO_EDITS }),
            (PLAIN, LogitEdits { bad: &[5], ..NO_EDITS }),
        ),
        ("suppress", (PLAIN, LogitEdits { suppress: &[2], ..NO_EDITS }), (PLAIN, NO_EDITS)),
        ("all but allowed", (warm, all), (SamplingParams { temperature: 1.47, ..warm }, all)),
        ("all", (warm, some), (warm, LogitEdits { repetition_penalty: 1.25, ..some })),
    ];
    for (name, right, wrong) in cases {
        check_frequencies(name, &logits, right, wrong);
    }
}

/// Tokens, their log-probs, the raw ones and the most likely ones, for vocabularies up to that of Qwen2.5.
#[test]
fn log_probs_agree_with_f64_under_every_edit() {
    for pool in pools() {
        for vocab in [12_u32, 1500, 151_936] {
            let logits: Vec<f32> = random(vocab as usize, 8).iter().map(|x| x * 9.0).collect();
            let counts: Vec<(u32, u32)> = (0..vocab).step_by(3).map(|token| (token, token % 4)).collect();
            let allowed: Vec<u32> = (0..vocab).filter(|token| token % 5 != 2).collect();
            let bias = BTreeMap::from([(0, 4.0), (3, f32::MAX), (vocab - 1, -100.0)]);
            let edits = LogitEdits {
                allowed: &allowed,
                bad: &[3, 4],
                suppress: &[5],
                bias: &bias,
                repetition_penalty: 1.7,
                presence_penalty: -0.3,
                frequency_penalty: 0.6,
                counts: &counts,
            };
            let raw_log_probs: Vec<f64> = probabilities(&reference(&logits, &NO_EDITS), &PLAIN);
            let mut by_rank: Vec<u32> = (0..vocab).collect();
            by_rank.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
            for params in [PLAIN, SamplingParams { temperature: 0.8, top_k: 50, top_p: 0.95, min_p: 0.01 }] {
                let probs = probabilities(&reference(&logits, &edits), &params);
                for Drawn { sample, raw } in draw(&pool, &logits, (params, edits), &[0.0, 0.2, 0.5, 0.97], Some(20)) {
                    let close = |found: f32, probs: &[f64], token: u32| {
                        assert!(
                            (f64::from(found) - probs[token as usize].ln()).abs() < 1e-5,
                            "{found} of token {token}"
                        );
                    };
                    close(sample.log_prob, &probs, sample.token);
                    let raw = raw.unwrap();
                    close(raw.log_prob, &raw_log_probs, sample.token);
                    assert!(raw.top.iter().map(|top| top.token).eq(by_rank.iter().copied().take(20)));
                    raw.top.iter().for_each(|top| close(top.log_prob, &raw_log_probs, top.token));
                }
            }
        }
    }
}

/// A request must not be able to make a row that nothing can be drawn from: that would end the engine.
#[test]
fn extreme_edits_leave_something_to_draw() {
    let pool = Pool::new(1).unwrap();
    let counts = [(0, u32::MAX), (1, 0), (2, 7)];
    for bias in [f32::MAX, f32::MIN, f32::MIN_POSITIVE] {
        for repetition_penalty in [f32::MIN_POSITIVE, f32::MAX] {
            let bias = BTreeMap::from([(0, bias), (1, bias), (2, bias)]);
            let edits = LogitEdits {
                bias: &bias,
                repetition_penalty,
                presence_penalty: 2.0,
                frequency_penalty: -2.0,
                counts: &counts,
                ..NO_EDITS
            };
            for temperature in [0.0, 1e-5, 1.0, f32::MAX] {
                let params = SamplingParams { temperature, ..PLAIN };
                for Drawn { sample, .. } in draw(&pool, &[-1.0, 0.0, 3.0], (params, edits), &[0.0, 0.5, 0.99], None) {
                    assert!(sample.log_prob.is_finite() && sample.log_prob <= 0.0, "{sample:?}");
                }
            }
        }
    }
}

#[test]
fn edits_do_not_hide_a_diverged_model() {
    let bias = BTreeMap::from([(1, 1.0)]);
    for bad in [f32::NAN, f32::INFINITY] {
        let edits = LogitEdits { bias: &bias, repetition_penalty: 2.0, counts: &[(1, 1)], ..NO_EDITS };
        let request = SampleRequest { params: PLAIN, uniform: 0.5, edits, num_top: None };
        assert!(sample_rows(&Pool::new(1).unwrap(), &mut [0.0, bad], &[request])[0].is_err());
    }
}
