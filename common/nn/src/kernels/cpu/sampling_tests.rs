//! Tests of [`super`] against sorting in f64.

use super::super::testing::{NO_EDITS, PLAIN, pools, probabilities, random};
use super::*;

/// Probabilities of the whole vocabulary.
pub(crate) fn reference(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let logits: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
    probabilities(&logits, params)
}

/// Draws at many quantiles; tokens and log-probs must be those of the reference.
#[track_caller]
fn check(pool: &Pool, logits: &[f32], params: &SamplingParams) {
    let probs = reference(logits, params);
    for u in [0.0, 1e-12, 0.1, 0.25, 0.5, 0.77, 0.9, 0.999, 1.0 - f64::EPSILON / 2.0] {
        let Sample { token, log_prob } = sample_row(pool, logits, params, u).unwrap();
        let (below, prob) = (probs[..token as usize].iter().sum::<f64>(), probs[token as usize]);
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
    for pool in pools() {
        for (vocab, scale) in [(1, 1.0), (5, 2.0), (511, 5.0), (1025, 0.1), (20_000, 12.0), (49_152, 0.01)] {
            let logits = scaled(vocab, vocab as u64, scale);
            for temperature in [0.3, 1.0, 1.7] {
                let plain = SamplingParams { temperature, ..PLAIN };
                check(&pool, &logits, &plain);
                check(&pool, &logits, &SamplingParams { top_k: 20, ..plain });
                check(&pool, &logits, &SamplingParams { top_p: 0.9, ..plain });
                check(&pool, &logits, &SamplingParams { min_p: 0.05, ..plain });
                check(&pool, &logits, &SamplingParams { top_k: 7, top_p: 0.6, min_p: 0.2, ..plain });
                check(&pool, &logits, &SamplingParams { top_p: 0.3, min_p: 0.5, ..plain });
                check(&pool, &logits, &SamplingParams { top_k: u32::MAX, top_p: 1e-6, ..plain });
            }
        }
    }
}

#[test]
fn ties_are_kept_by_top_k_and_ordered_by_top_p() {
    for pool in pools() {
        let logits = [1.0, 3.0, 2.0, 2.0, 0.0, 2.0];
        check(&pool, &logits, &SamplingParams { top_k: 2, ..PLAIN });
        let all: Vec<u32> = (0..100)
            .map(|i| sample_row(&pool, &logits, &SamplingParams { top_k: 2, ..PLAIN }, f64::from(i) / 100.0))
            .map(|s| s.unwrap().token)
            .collect();
        assert!([1, 2, 3, 5].iter().all(|t| all.contains(t)) && all.iter().all(|t| [1, 2, 3, 5].contains(t)));
        // Four equal tokens: the first three are needed for 0.6 of the mass.
        let params = SamplingParams { top_p: 0.6, ..PLAIN };
        assert_eq!(sample_row(&pool, &[5.0; 4], &params, 0.999).unwrap().token, 2);
    }
}

#[test]
fn the_most_likely_token_is_the_lowest_of_equals() {
    for pool in pools() {
        let mut logits = scaled(2000, 1, 1.0);
        (logits[700], logits[1900]) = (4.0, 4.0);
        for temperature in [0.0, 9e-6] {
            let Sample { token, log_prob } =
                sample_row(&pool, &logits, &SamplingParams { temperature, ..PLAIN }, 0.9).unwrap();
            assert_eq!(token, 700);
            assert!((f64::from(log_prob) - reference(&logits, &PLAIN)[700].ln()).abs() < 1e-5);
        }
    }
}

#[test]
fn masked_tokens_are_never_drawn() {
    for pool in pools() {
        let mut logits = vec![f32::NEG_INFINITY; 3000];
        logits[1234] = -50.0;
        for params in [PLAIN, SamplingParams { top_p: 0.5, ..PLAIN }, SamplingParams { top_k: 5, ..PLAIN }] {
            for u in [0.0, 0.5, 1.0 - f64::EPSILON / 2.0] {
                let sample = sample_row(&pool, &logits, &params, u).unwrap();
                assert_eq!((sample.token, sample.log_prob), (1234, 0.0));
            }
        }
        logits[5] = -51.0;
        check(&pool, &logits, &PLAIN);
        check(&pool, &logits, &SamplingParams { top_k: 3, ..PLAIN });
    }
}

#[test]
fn bad_logits_and_parameters_are_errors() {
    for pool in pools() {
        for value in [f32::NAN, f32::INFINITY] {
            for token in [0, 3, 600, 999] {
                for fill in [0.5, f32::NEG_INFINITY] {
                    let mut logits = vec![fill; 1000];
                    logits[token] = value;
                    for temperature in [0.0, 1.0] {
                        let params = SamplingParams { temperature, ..PLAIN };
                        let error = sample_row(&pool, &logits, &params, 0.5).unwrap_err();
                        assert!(matches!(error, SampleError::BadLogit { token: t, .. } if t as usize == token));
                    }
                }
            }
        }
        let masked = [f32::NEG_INFINITY; 20];
        assert_eq!(sample_row(&pool, &masked, &PLAIN, 0.5), Err(SampleError::NothingAllowed));
        assert_eq!(sample_row(&pool, &[], &PLAIN, 0.5), Err(SampleError::NothingAllowed));
        for (params, u) in [
            (SamplingParams { temperature: -1.0, ..PLAIN }, 0.5),
            (SamplingParams { top_p: 0.0, ..PLAIN }, 0.5),
            (SamplingParams { min_p: f32::NAN, ..PLAIN }, 0.5),
            (PLAIN, 1.0),
        ] {
            let error = sample_row(&pool, &[0.0], &params, u).unwrap_err();
            assert!(matches!(error, SampleError::BadParameter { .. }));
        }
    }
}

#[test]
fn rows_of_a_batch_are_drawn_as_alone() {
    for pool in pools() {
        let vocab = 3001;
        let mut logits = scaled(70 * vocab, 9, 6.0);
        let requests: Vec<SampleRequest> = (0..70)
            .map(|i| {
                let temperature = [1.0, 0.0, 0.6][i % 3];
                let params =
                    SamplingParams { temperature, top_k: [0, 40][i % 2], top_p: [1.0, 0.8][i / 35], min_p: 0.0 };
                SampleRequest { params, uniform: i as f64 / 70.0, edits: NO_EDITS, num_top: None }
            })
            .collect();
        let alone: Vec<_> = (0..70)
            .map(|i| sample_row(&pool, &logits[i * vocab..][..vocab], &requests[i].params, requests[i].uniform))
            .map(|sample| Ok(Drawn { sample: sample?, raw: None }))
            .collect();
        for batch in 1..=70 {
            assert_eq!(sample_rows(&pool, &mut logits[..batch * vocab], &requests[..batch]), alone[..batch]);
        }
        assert!(sample_rows(&pool, &mut [], &[]).is_empty());
    }
}

#[test]
fn log_probs_of_given_and_top_tokens_agree_with_f64() {
    for pool in pools() {
        for vocab in [3, 2000, 50_000, 151_936] {
            let mut logits = scaled(vocab, 5, 8.0);
            logits[vocab / 2] = logits[0];
            let probs = reference(&logits, &PLAIN);
            let close = |log_prob: f32, token: usize| (f64::from(log_prob) - probs[token].ln()).abs() < 1e-5;
            for token in [0, vocab / 2, vocab - 1] {
                assert!(close(log_softmax_at(&pool, &logits, token as u32).unwrap(), token));
            }
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|a, b| probs[*b].total_cmp(&probs[*a]).then(a.cmp(b)));
            for num_tokens in [0, 1, 5, 200] {
                let (_, top) = top_log_probs(&pool, &logits, num_tokens).unwrap();
                assert_eq!(top.len(), num_tokens.min(vocab));
                assert!(top.iter().zip(&order).all(|(s, t)| s.token as usize == *t && close(s.log_prob, *t)));
            }
        }
    }
}

#[test]
fn the_first_quantile_of_a_hardly_likely_chunk_is_no_masked_token() {
    for pool in pools() {
        let mut logits = vec![-110.0; 2 * CHUNK];
        (logits[0], logits[CHUNK]) = (f32::NEG_INFINITY, 0.0);
        assert_eq!(sample_row(&pool, &logits, &PLAIN, 0.0).unwrap().token, 1);
    }
}
