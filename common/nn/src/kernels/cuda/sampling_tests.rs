//! Tests of [`super`] on the CPU or a GPU, against sorting in f64.

use aha_core::random::sampling_uniform;

use super::super::testing::{Memory, bf16_bits, on_gpu, rounded};
use super::*;
use crate::kernels::cpu::testing::random;
use crate::kernels::cpu::{Pool, SampleError};
use crate::kernels::cpu::{reference_probabilities, sample_row};

const PLAIN: SamplingParams = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
const BELOW_ONE: f32 = 1.0 - f32::EPSILON / 2.0;

/// What a row came to.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    token: usize,
    log_prob: f32,
    status: i32,
}

/// One draw a row of `logits`, `[rows, V]`.
fn sample(kind: LogitKind, logits: &[f32], params: &[SamplingParams], uniforms: &[f32]) -> Vec<Outcome> {
    let num_rows = params.len();
    let mut memory = Memory::default();
    let params: Vec<DeviceSamplingParams> = params.iter().copied().map(DeviceSamplingParams::from).collect();
    let sample = Sample {
        kind,
        num_rows,
        vocab_size: logits.len() / num_rows,
        logits: match kind {
            LogitKind::Bf16 => memory.put_bf16(logits),
            LogitKind::Fp32 => memory.put(logits),
        },
        params: memory.put(&params),
        uniforms: memory.put(uniforms),
        context_lens: None,
        tokens: memory.put(&vec![-7; num_rows]),
        log_probs: memory.put(&vec![f32::NAN; num_rows]),
        statuses: memory.put(&vec![-7; num_rows]),
    };
    memory.run(&[sample.launch()]);
    let tokens = memory.read::<i32>(sample.tokens);
    let (log_probs, statuses) = (memory.read::<f32>(sample.log_probs), memory.read::<i32>(sample.statuses));
    let outcomes = tokens.iter().zip(log_probs).zip(statuses);
    outcomes.map(|((token, log_prob), status)| Outcome { token: *token as usize, log_prob, status }).collect()
}

/// Draws at many quantiles; tokens and log-probs must be those of the reference.
#[track_caller]
fn check(kind: LogitKind, logits: &[f32], params: &[SamplingParams]) {
    const UNIFORMS: [f32; 4] = [0.0, 0.3, 0.77, BELOW_ONE];
    let rows = params.iter().flat_map(|params| UNIFORMS.map(|uniform| (*params, uniform)));
    let (params, uniforms): (Vec<SamplingParams>, Vec<f32>) = rows.unzip();
    let outcomes = sample(kind, &logits.repeat(params.len()), &params, &uniforms);
    let logits = if kind == LogitKind::Bf16 { rounded(logits) } else { logits.to_vec() };
    let mut probs = Vec::new();
    for (i, Outcome { token, log_prob, status }) in outcomes.into_iter().enumerate() {
        let (params, u) = (&params[i], f64::from(uniforms[i]));
        if i % UNIFORMS.len() == 0 {
            probs = reference_probabilities(&logits, params);
        }
        assert_eq!(status, 0);
        let (below, prob) = (probs[..token].iter().sum::<f64>(), probs[token]);
        assert!(prob > 0.0, "token {token} is excluded by {params:?}");
        assert!(below - 1e-6 <= u && u <= below + prob + 1e-6, "token {token} is not at {u} with {params:?}");
        let error = (f64::from(log_prob) - prob.ln()).abs();
        assert!(error < 1e-5, "log-prob {log_prob} of {token}, not {}, with {params:?}", prob.ln());
    }
}

fn scaled(len: usize, seed: u64, scale: f32) -> Vec<f32> {
    random(len, seed).iter().map(|x| x * scale).collect()
}

#[test]
fn draws_agree_with_a_sorted_reference() {
    for (vocab, scale) in [(1, 1.0), (5, 2.0), (511, 5.0), (1025, 0.1), (4001, 12.0), (1800, 0.01)] {
        let logits = scaled(vocab, vocab as u64, scale);
        let params = [0.3, 1.7].map(|temperature| {
            let plain = SamplingParams { temperature, ..PLAIN };
            [
                plain,
                SamplingParams { top_k: 20, ..plain },
                SamplingParams { top_p: 0.9, ..plain },
                SamplingParams { min_p: 0.05, ..plain },
                SamplingParams { top_k: 7, top_p: 0.6, min_p: 0.2, ..plain },
                SamplingParams { top_p: 0.3, min_p: 0.5, ..plain },
                SamplingParams { top_k: u32::MAX, top_p: 1e-6, ..plain },
            ]
        });
        for kind in [LogitKind::Fp32, LogitKind::Bf16] {
            check(kind, &logits, &params.concat());
        }
    }
}

/// The kernel and the CPU's agree on tokens, not only on the distribution.
#[test]
fn tokens_are_those_of_the_cpu() {
    let pool = Pool::new(1).unwrap();
    // That of Qwen2.5 takes the emulation too long.
    let (vocab, num_rows) = (if on_gpu() { 151_936 } else { 2501 }, 60);
    let logits = scaled(num_rows * vocab, 4, 9.0);
    let params: Vec<SamplingParams> = (0..num_rows)
        .map(|i| SamplingParams {
            temperature: [1.0, 0.0, 0.6][i % 3],
            top_k: [0, 40][i % 2],
            top_p: [1.0, 0.8][i / 30],
            min_p: [0.0, 0.02][i / 4 % 2],
        })
        .collect();
    let uniforms: Vec<f32> = (0..num_rows).map(|i| sampling_uniform(5, 1, i as u32)).collect();
    for (i, outcome) in sample(LogitKind::Fp32, &logits, &params, &uniforms).into_iter().enumerate() {
        let row = &logits[i * vocab..][..vocab];
        let expect = sample_row(&pool, row, &params[i], f64::from(uniforms[i])).unwrap();
        assert_eq!((outcome.token, outcome.status), (expect.token as usize, 0), "row {i}, {:?}", params[i]);
        assert!((outcome.log_prob - expect.log_prob).abs() < 2e-6 * expect.log_prob.abs().max(1.0));
    }
}

#[test]
fn ties_are_kept_by_top_k_and_ordered_by_top_p() {
    // Both zeros are the same number, far apart in chunks and bits.
    let mut far = vec![-20.0; 1200];
    (far[3], far[600], far[1100]) = (0.0, -0.0, 0.0);
    for kind in [LogitKind::Fp32, LogitKind::Bf16] {
        check(kind, &[1.0, 3.0, 2.0, 2.0, 0.0, 2.0], &[SamplingParams { top_k: 2, ..PLAIN }]);
        check(kind, &far, &[SamplingParams { top_k: 1, ..PLAIN }, SamplingParams { top_p: 0.5, ..PLAIN }]);
        check(kind, &far, &[SamplingParams { top_k: 2, top_p: 0.5, ..PLAIN }, SamplingParams { top_p: 0.9, ..PLAIN }]);
        // Of equal tokens the first ones are kept: 901 of 1500, in three chunks.
        let params = SamplingParams { top_p: 0.6003, ..PLAIN };
        check(kind, &[5.0; 1500], &[params]);
        assert_eq!(sample(kind, &[5.0; 1500], &[params], &[BELOW_ONE])[0].token, 900);
    }
}

#[test]
fn the_most_likely_token_is_the_lowest_of_equals() {
    let mut logits = scaled(2000, 1, 1.0);
    (logits[700], logits[703], logits[1900]) = (4.0, 4.0, 4.0);
    for kind in [LogitKind::Fp32, LogitKind::Bf16] {
        let params = [0.0, 9e-6].map(|temperature| SamplingParams { temperature, top_k: 3, ..PLAIN });
        for outcome in sample(kind, &logits.repeat(2), &params, &[0.9, 0.9]) {
            let stored = if kind == LogitKind::Bf16 { rounded(&logits) } else { logits.clone() };
            assert_eq!((outcome.token, outcome.status), (700, 0));
            let expect = reference_probabilities(&stored, &PLAIN)[700].ln();
            assert!((f64::from(outcome.log_prob) - expect).abs() < 1e-5);
        }
    }
}

#[test]
fn frequencies_pass_a_chi_square_test() {
    let (vocab, num_draws) = (12, 1500_usize);
    let logits = scaled(vocab, 3, 2.0);
    for params in [PLAIN, SamplingParams { temperature: 0.7, top_k: 8, top_p: 0.95, ..PLAIN }] {
        let probs = reference_probabilities(&logits, &params);
        let uniforms: Vec<f32> = (0..num_draws).map(|i| sampling_uniform(9, 2, i as u32)).collect();
        let mut counts = vec![0.0; vocab];
        for outcome in sample(LogitKind::Fp32, &logits.repeat(num_draws), &vec![params; num_draws], &uniforms) {
            counts[outcome.token] += 1.0;
        }
        let expected = probs.iter().map(|p| p * num_draws as f64);
        let terms = counts.iter().zip(expected).filter(|(_, e)| *e > 0.0);
        let chi_square: f64 = terms.map(|(c, e)| (c - e) * (c - e) / e).sum();
        // 99.99 % of draws stay below 37.4 at 11 degrees of freedom.
        assert!(chi_square < 37.4, "{chi_square} with {params:?}");
        assert!(counts.iter().zip(&probs).all(|(c, p)| *c == 0.0 || *p > 0.0));
    }
}

#[test]
fn masked_tokens_are_never_drawn() {
    let all = [PLAIN, SamplingParams { top_p: 0.5, ..PLAIN }, SamplingParams { top_k: 5, ..PLAIN }];
    for kind in [LogitKind::Fp32, LogitKind::Bf16] {
        let mut logits = vec![f32::NEG_INFINITY; 3000];
        logits[1234] = -50.0;
        check(kind, &logits, &all);
        let params = [all, all.map(|params| SamplingParams { min_p: 0.1, ..params })].concat();
        for outcome in sample(kind, &logits.repeat(6), &params, &[BELOW_ONE; 6]) {
            assert_eq!((outcome.token, outcome.log_prob, outcome.status), (1234, 0.0, 0));
        }
        logits[5] = -51.0;
        check(kind, &logits, &all);
        // So far below the others that its weight vanishes beside theirs: the first quantile still finds a token of it
        // or of those that follow, never a masked one.
        logits[5] = -400.0;
        let outcome = sample(kind, &logits, &[PLAIN], &[0.0])[0];
        assert!([5, 1234].contains(&outcome.token) && outcome.status == 0, "{outcome:?}");
    }
}

#[test]
fn bad_logits_are_flagged_where_they_stand() {
    for kind in [LogitKind::Fp32, LogitKind::Bf16] {
        for fill in [0.5, f32::NEG_INFINITY] {
            let cases = [f32::NAN, f32::INFINITY].map(|value| [0, 3, 600, 999].map(|token| (value, token)));
            let (mut logits, mut params) = (Vec::new(), Vec::new());
            for (value, token) in cases.concat() {
                for one in [PLAIN, SamplingParams { temperature: 0.0, ..PLAIN }, SamplingParams { top_k: 2, ..PLAIN }] {
                    let mut row = vec![fill; 1000];
                    (row[token], row[999]) = (value, if token == 999 { value } else { f32::NAN });
                    logits.extend(row);
                    params.push(one);
                }
            }
            let outcomes = sample(kind, &logits, &params, &vec![0.5; params.len()]);
            for (outcome, (_, token)) in outcomes.chunks(3).zip(cases.concat()) {
                for outcome in outcome {
                    assert_eq!((outcome.token, outcome.status), (token, SampleStatus::BadLogit as i32));
                    assert_eq!(outcome.log_prob, f32::NEG_INFINITY);
                }
            }
        }
        let outcome = sample(kind, &[f32::NEG_INFINITY; 700], &[PLAIN], &[0.5])[0];
        assert_eq!(outcome.status, SampleStatus::NothingAllowed as i32);
    }
    let pool = Pool::new(1).unwrap();
    let masked = sample_row(&pool, &[f32::NEG_INFINITY; 700], &PLAIN, 0.5);
    assert_eq!(masked, Err(SampleError::NothingAllowed), "as on the CPU");
}

#[test]
fn rows_that_are_not_in_use_are_left_alone() {
    let mut memory = Memory::default();
    let params = [PLAIN, PLAIN].map(DeviceSamplingParams::from);
    let sample = Sample {
        kind: LogitKind::Fp32,
        num_rows: 2,
        vocab_size: 3,
        logits: memory.put(&[f32::NAN, 0.0, 0.0, 9.0, 0.0, 0.0]),
        params: memory.put(&params),
        uniforms: memory.put(&[0.5_f32, 0.5]),
        context_lens: Some(memory.put(&[0, 1])),
        tokens: memory.put(&[-7, -7]),
        log_probs: memory.put(&[1.0_f32, 1.0]),
        statuses: memory.put(&[-7, -7]),
    };
    memory.run(&[sample.launch()]);
    assert_eq!(memory.read::<i32>(sample.tokens), [-7, 0]);
    assert_eq!(memory.read::<i32>(sample.statuses), [-7, 0]);
    assert_eq!(memory.read::<f32>(sample.log_probs)[0], 1.0);
}

#[test]
fn stop_tokens_are_masked_until_the_row_may_stop() {
    for kind in [LogitKind::Fp32, LogitKind::Bf16] {
        let mut memory = Memory::default();
        let (vocab_size, max_stops) = (50, 40);
        let mut stops = vec![-1; 4 * max_stops];
        for (row, stops) in stops.chunks_mut(max_stops).enumerate() {
            (stops[0], stops[1], stops[35]) = (row as i32, 49, 7);
        }
        let logits = vec![1.0; 4 * vocab_size];
        let suppress = Suppress {
            kind,
            num_rows: 4,
            vocab_size,
            logits: if kind == LogitKind::Fp32 { memory.put(&logits) } else { memory.put_bf16(&logits) },
            context_lens: memory.put(&[3, 3, 0, 3]),
            num_generated: memory.put(&[0, 2, 0, 5]),
            min_tokens: memory.put(&[1, 2, 1, 9]),
            stop_tokens: memory.put(&stops),
            max_stops,
        };
        memory.run(&[suppress.launch()]);
        let logits: Vec<f32> = match kind {
            LogitKind::Fp32 => memory.read(suppress.logits),
            LogitKind::Bf16 => memory.read_bf16(suppress.logits),
        };
        for (i, logit) in logits.iter().enumerate() {
            let (row, token) = (i / vocab_size, i % vocab_size);
            let masked = [0, 3].contains(&row) && [row, 49, 7].contains(&token);
            assert_eq!(*logit, if masked { f32::NEG_INFINITY } else { 1.0 }, "token {token} of row {row}");
        }
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    for (value, bits) in [(1.0, 0x3f80), (1.0 + 1.0 / 256.0, 0x3f80), (1.0 + 3.0 / 256.0, 0x3f82), (-1.01, 0xbf81)] {
        assert_eq!(bf16_bits(value), bits);
    }
    assert_eq!(bf16_bits(f32::NEG_INFINITY), 0xff80);
}
