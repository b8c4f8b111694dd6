//! Tests of [`super`] on the CPU or a GPU, against f64. Every launch runs twice and must give the same bits.

use super::super::testing::{Draws, Memory, assert_bf16_close, rounded};
use super::*;
use crate::kernels::cpu::testing::random;

const ELEMENTS: [Element; 2] = [Element::Bf16, Element::Fp32];

impl Element {
    fn put(self, memory: &mut Memory, values: &[f32]) -> DevicePtr {
        match self {
            Self::Bf16 => memory.put_bf16(values),
            Self::Fp32 => memory.put(values),
        }
    }

    /// Memory for as many elements, filled with NaN.
    fn room(self, memory: &mut Memory, len: usize) -> DevicePtr {
        self.put(memory, &vec![f32::NAN; len])
    }

    /// As stored.
    fn of(self, values: &[f32]) -> Vec<f64> {
        let stored = if self == Self::Bf16 { rounded(values) } else { values.to_vec() };
        stored.into_iter().map(f64::from).collect()
    }

    #[track_caller]
    fn assert_close(self, memory: &Memory, address: DevicePtr, expect: &[f64], tolerance: f64) {
        match self {
            Self::Bf16 => assert_bf16_close(&memory.read_bf16(address), expect, 1.0, tolerance),
            Self::Fp32 => assert_fp32_close(&memory.read(address), expect, tolerance),
        }
    }
}

/// Relative to the larger of the value and 1.
#[track_caller]
fn assert_fp32_close(actual: &[f32], expect: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expect.len());
    for (i, (a, e)) in actual.iter().zip(expect).enumerate() {
        assert!((f64::from(*a) - e).abs() <= tolerance * e.abs().max(1.0), "element {i} is {a}, not {e}");
    }
}

fn scaled(len: usize, seed: u64, factor: f32) -> Vec<f32> {
    random(len, seed).iter().map(|x| x * factor).collect()
}

const EPSILON: f32 = 1e-6;

fn norm_scale(row: &[f64]) -> f64 {
    (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + f64::from(EPSILON)).sqrt().recip()
}

/// What is normalised, and a launch of it in `memory`.
fn norm(memory: &mut Memory, element: Element, (num_rows, width): (usize, usize), adds: bool) -> (Vec<f64>, RmsNorm) {
    let len = num_rows * width;
    let (mut x, delta) = (scaled(len, 1, 30.0), random(len, 2));
    // A row that is nearly nothing: epsilon decides.
    x.iter_mut().take(if adds { 0 } else { width }).for_each(|x| *x *= 1e-6);
    let mut sum = x.clone();
    if adds {
        sum = element.of(&x).iter().zip(element.of(&delta)).map(|(x, y)| (x + y) as f32).collect();
    }
    let x = element.put(memory, &x);
    let delta = element.put(memory, &delta);
    let norm = RmsNorm {
        element,
        num_rows,
        width,
        epsilon: EPSILON,
        x,
        addition: adds.then(|| [delta, element.room(memory, len)]),
        weight: element.put(memory, &random(width, 3)),
        out: element.room(memory, len),
        scales: memory.put(&vec![f32::NAN; num_rows]),
    };
    (element.of(&sum), norm)
}

const WIDTHS: [usize; 11] = [1, 5, 8, 63, 64, 256, 257, 576, 896, 2051, 8192];

#[test]
fn norms_of_sums_agree_with_f64() {
    for (index, width) in WIDTHS.into_iter().enumerate() {
        for element in ELEMENTS {
            for (num_rows, adds) in [(0, false), (1, true), (3 + index, true), (3, false)] {
                let mut memory = Memory::default();
                let (sum, norm) = norm(&mut memory, element, (num_rows, width), adds);
                memory.run(&[norm.launch()]);
                if let Some([_, stored]) = norm.addition {
                    element.assert_close(&memory, stored, &sum, 0.0);
                }
                let weight = element.of(&random(width, 3));
                let scales: Vec<f64> = sum.chunks(width).map(norm_scale).collect();
                let expect: Vec<f64> = (0..sum.len()).map(|i| sum[i] * scales[i / width] * weight[i % width]).collect();
                element.assert_close(&memory, norm.out, &expect, 2e-6);
                let found = memory.read::<f32>(norm.scales);
                let relative: Vec<f32> = found.iter().zip(&scales).map(|(a, e)| (f64::from(*a) / e) as f32).collect();
                assert_fp32_close(&relative, &vec![1.0; num_rows], 1e-6);
            }
        }
    }
}

fn check_norm_backward(element: Element, (num_rows, width): (usize, usize), adds: bool) {
    let mut memory = Memory::default();
    let len = num_rows * width;
    let (x, d_out, d_sum, weight) = (scaled(len, 4, 3.0), random(len, 5), random(len, 6), random(width, 7));
    let x_stored = element.of(&x);
    let scales: Vec<f64> = x_stored.chunks(width).map(norm_scale).collect();
    let num_parts = RmsNormBackward::num_parts(num_rows, width);
    let backward = RmsNormBackward {
        element,
        num_rows,
        width,
        x: element.put(&mut memory, &x),
        weight: element.put(&mut memory, &weight),
        scales: memory.put(&scales.iter().map(|&scale| scale as f32).collect::<Vec<_>>()),
        d_out: element.put(&mut memory, &d_out),
        d_sum: adds.then(|| element.put(&mut memory, &d_sum)),
        d_x: element.room(&mut memory, len),
        d_weight: (num_rows != 3).then(|| memory.put(&vec![f32::NAN; num_parts * width])),
    };
    memory.run(&[backward.launch()]);

    let (d_out, d_sum, weight) = (element.of(&d_out), element.of(&d_sum), element.of(&weight));
    let (mut d_x, mut d_weight) = (Vec::new(), vec![0.0; width]);
    for (row, scale) in scales.iter().enumerate() {
        let normed = |i: usize| x_stored[row * width + i] * scale;
        let grad = |i: usize| d_out[row * width + i] * weight[i];
        let mean = (0..width).map(|i| grad(i) * normed(i)).sum::<f64>() / width as f64;
        for i in 0..width {
            d_weight[i] += d_out[row * width + i] * normed(i);
            let also = if adds { d_sum[row * width + i] } else { 0.0 };
            d_x.push(scale * (grad(i) - normed(i) * mean) + also);
        }
    }
    element.assert_close(&memory, backward.d_x, &d_x, 1e-5);
    if let Some(address) = backward.d_weight {
        let parts = memory.read::<f32>(address);
        let sums = (0..width).map(|i| parts.iter().skip(i).step_by(width).sum());
        assert_fp32_close(&sums.collect::<Vec<f32>>(), &d_weight, 1e-4);
    }
}

#[test]
fn gradients_of_norms_agree_with_f64() {
    for (index, width) in WIDTHS.into_iter().enumerate() {
        for element in ELEMENTS {
            for (num_rows, adds) in [(0, true), (1, false), (2 + index, true), (3, false)] {
                check_norm_backward(element, (num_rows, width), adds);
            }
        }
    }
    // More rows than teams.
    check_norm_backward(Element::Bf16, (131, 8189), true);
}

#[test]
fn heads_turn_and_turn_back() {
    for (head_dim, num_heads, num_rows) in
        [(2, 1, 1), (6, 3, 4), (20, 2, 5), (64, 9, 40), (80, 3, 3), (128, 2, 7), (64, 1, 0)]
    {
        for element in ELEMENTS {
            let (half, num_positions) = (head_dim / 2, 50);
            let angle = |position: usize, i: usize| position as f64 * 10_000_f64.powf(-(i as f64) / half as f64);
            let mut memory = Memory::default();
            let mut table = |function: fn(f64) -> f64| {
                let angles = (0..num_positions * half).map(|i| angle(i / half, i % half));
                memory.put(&angles.map(|angle| function(angle) as f32).collect::<Vec<_>>())
            };
            let (cos, sin) = (table(f64::cos), table(f64::sin));
            let mut draws = Draws(5);
            let positions: Vec<i32> = (0..num_rows).map(|_| draws.below(num_positions) as i32).collect();
            let x = scaled(num_rows * num_heads * head_dim, 1, 3.0);
            let positions_address = memory.put(&positions);
            let x_address = element.put(&mut memory, &x);
            let forth = TurnHeads {
                element,
                num_rows,
                num_heads,
                head_dim,
                x: x_address,
                positions: positions_address,
                cos,
                sin,
                is_back: false,
            };
            memory.run(&[forth.launch()]);
            let x = element.of(&x);
            let mut expect = x.clone();
            for (head, (turned, x)) in expect.chunks_mut(head_dim).zip(x.chunks(head_dim)).enumerate() {
                for i in 0..half {
                    let (sin, cos) = angle(positions[head / num_heads] as usize, i).sin_cos();
                    (turned[i], turned[i + half]) = (x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin);
                }
            }
            element.assert_close(&memory, x_address, &expect, 1e-5);
            memory.run(&[TurnHeads { is_back: true, ..forth }.launch()]);
            element.assert_close(&memory, x_address, &x, if element == Element::Bf16 { 0.02 } else { 1e-5 });
        }
    }
}

#[test]
fn gated_units_and_their_gradients_agree_with_f64() {
    for num_elements in [0, 1, 7, 8, 2049, 4096] {
        for element in ELEMENTS {
            let (mut gate, up, d_out) =
                (scaled(num_elements, 1, 20.0), scaled(num_elements, 2, 3.0), random(num_elements, 3));
            gate.iter_mut().zip([1000.0, -1000.0]).for_each(|(gate, extreme)| *gate = extreme);
            let mut memory = Memory::default();
            let [gate_address, up_address, d_address] =
                [&gate, &up, &d_out].map(|values| element.put(&mut memory, values));
            let [out, d_gate] = [(); 2].map(|()| element.room(&mut memory, num_elements));
            let forward = SwiGlu { element, num_elements, gate: gate_address, up: up_address, out };
            let backward =
                SwiGluBackward { element, num_elements, gate: gate_address, up: up_address, d_out: d_address, d_gate };
            memory.run(&[forward.launch(), backward.launch()]);
            let [gate, up, d_out] = [&gate, &up, &d_out].map(|values| element.of(values));
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            let each = |f: &dyn Fn(f64, f64, f64) -> f64| -> Vec<f64> {
                (0..num_elements).map(|i| f(gate[i], up[i], d_out[i])).collect()
            };
            element.assert_close(&memory, out, &each(&|g, u, _| g * sigmoid(g) * u), 1e-5);
            element.assert_close(&memory, d_address, &each(&|g, _, d| d * g * sigmoid(g)), 1e-5);
            let d_gates = each(&|g, u, d| d * u * sigmoid(g) * (1.0 + g * (1.0 - sigmoid(g))));
            element.assert_close(&memory, d_gate, &d_gates, 1e-5);
        }
    }
}

/// Log-softmax and entropy of a row of logits over the temperature.
fn log_softmax(row: &[f32], temperature: f32) -> (Vec<f64>, f64) {
    let scaled: Vec<f64> = row.iter().map(|x| f64::from(*x) / f64::from(temperature)).collect();
    let peak = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = peak + scaled.iter().map(|x| (x - peak).exp()).sum::<f64>().ln();
    let logprobs: Vec<f64> = scaled.iter().map(|x| x - log_sum).collect();
    let entropy = -logprobs.iter().map(|x| x.exp() * x).sum::<f64>();
    (logprobs, entropy)
}

fn check_targets(element: Element, (num_rows, vocab_size): (usize, usize), temperature: f32, with_entropies: bool) {
    let mut memory = Memory::default();
    let mut logits = scaled(num_rows * vocab_size, 1, 12.0);
    // A row whose largest logit comes last.
    logits[vocab_size - 1] = 40.0;
    let mut draws = Draws(7);
    let targets: Vec<i64> = (0..num_rows).map(|_| draws.below(vocab_size) as i64).collect();
    let (d_logprobs, d_entropies) = (random(num_rows, 2), random(num_rows, 3));
    let column = |memory: &mut Memory| memory.put(&vec![f32::NAN; num_rows]);
    let summary = SummariseTargets {
        element,
        num_rows,
        vocab_size,
        temperature,
        logits: memory.put(&logits),
        targets: memory.put(&targets),
        logprobs: column(&mut memory),
        entropies: column(&mut memory),
        log_sums: column(&mut memory),
    };
    let gradients = LogitGradients {
        summary,
        d_logprobs: memory.put(&d_logprobs),
        d_entropies: with_entropies.then(|| memory.put(&d_entropies)),
        d_logits: match element {
            Element::Bf16 => element.room(&mut memory, logits.len()),
            Element::Fp32 => summary.logits,
        },
    };
    memory.run(&[summary.launch(), gradients.launch()]);
    let (mut expect, mut d_logits) = ([vec![], vec![]], vec![]);
    for (row, logits) in logits.chunks(vocab_size).enumerate() {
        let (logprobs, entropy) = log_softmax(logits, temperature);
        expect[0].push(logprobs[targets[row] as usize]);
        expect[1].push(entropy);
        let d_entropy = if with_entropies { f64::from(d_entropies[row]) } else { 0.0 };
        let d_logprob = f64::from(d_logprobs[row]);
        d_logits.extend(logprobs.iter().enumerate().map(|(token, logprob)| {
            let hit = if token as i64 == targets[row] { 1.0 } else { 0.0 };
            let p = logprob.exp();
            (d_logprob * (hit - p) - d_entropy * p * (logprob + entropy)) / f64::from(temperature)
        }));
    }
    assert_fp32_close(&memory.read(summary.logprobs), &expect[0], 1e-5);
    assert_fp32_close(&memory.read(summary.entropies), &expect[1], 1e-5);
    element.assert_close(&memory, gradients.d_logits, &d_logits, 1e-5);
}

#[test]
fn log_probs_of_targets_and_their_gradients_agree_with_f64() {
    for (num_rows, vocab_size) in [(1, 1), (3, 5), (5, 101), (2, 4104), (3, 20_003)] {
        for element in ELEMENTS {
            check_targets(element, (num_rows, vocab_size), 1.0, false);
            check_targets(element, (num_rows, vocab_size), 0.7, true);
        }
    }
}

#[test]
fn a_target_that_is_no_token_has_no_log_prob() {
    let mut memory = Memory::default();
    let summary = SummariseTargets {
        element: Element::Bf16,
        num_rows: 3,
        vocab_size: 2,
        temperature: 1.0,
        logits: memory.put(&[1.0_f32; 6]),
        targets: memory.put(&[2_i64, -1, 1]),
        logprobs: memory.put(&[0.0_f32; 3]),
        entropies: memory.put(&[0.0_f32; 3]),
        log_sums: memory.put(&[0.0_f32; 3]),
    };
    memory.run(&[summary.launch()]);
    let logprobs = memory.read::<f32>(summary.logprobs);
    assert!(logprobs[0].is_nan() && logprobs[1].is_nan() && (logprobs[2] + 2_f32.ln()).abs() < 1e-6, "{logprobs:?}");
}

#[test]
fn squares_add_up() {
    for num_elements in [0, 1, 17, 2048, 2049, 100_003] {
        let mut memory = Memory::default();
        let values = random(num_elements, 1);
        let num_parts = SumOfSquares::num_parts(num_elements);
        let squares = SumOfSquares {
            element: Element::Bf16,
            num_elements,
            values: memory.put(&values),
            sums: memory.put(&vec![f64::NAN; num_parts]),
        };
        memory.run(&[squares.launch()]);
        let expect: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
        let found: f64 = memory.read::<f64>(squares.sums).iter().sum();
        assert!((found - expect).abs() <= 1e-12 * expect, "{num_elements}: {found}, not {expect}");
    }
}

#[test]
fn adamw_follows_the_formula_and_writes_the_copy() {
    let factors = AdamWFactors {
        scale: 0.7,
        decay: 0.999,
        beta1: 0.9,
        beta2: 0.95,
        step_size: 0.02,
        root_scale: 3.1,
        epsilon: 1e-8,
    };
    let f = |x: f32| f64::from(x);
    for num_elements in [1, 8, 2051] {
        for has_copy in [false, true] {
            let mut memory = Memory::default();
            let (weights, grad, mean) = (random(num_elements, 1), random(num_elements, 2), random(num_elements, 3));
            let square: Vec<f32> = random(num_elements, 4).iter().map(|x| x * x).collect();
            let update = AdamWUpdate {
                element: Element::Bf16,
                num_elements,
                weights: memory.put(&weights),
                grad: memory.put(&grad),
                exp_avg: memory.put(&mean),
                exp_avg_sq: memory.put(&square),
                copy: has_copy.then(|| Element::Bf16.room(&mut memory, num_elements)),
                factors,
            };
            memory.run(&[update.launch()]);
            let (mut weights_after, mut means, mut squares) = (vec![], vec![], vec![]);
            for i in 0..num_elements {
                let g = f(grad[i]) * f(factors.scale);
                means.push(f(factors.beta1) * f(mean[i]) + (1.0 - f(factors.beta1)) * g);
                squares.push(f(factors.beta2) * f(square[i]) + (1.0 - f(factors.beta2)) * g * g);
                let root = squares[i].sqrt() * f(factors.root_scale) + f(factors.epsilon);
                weights_after.push(f(weights[i]) * f(factors.decay) - f(factors.step_size) * means[i] / root);
            }
            assert_fp32_close(&memory.read(update.weights), &weights_after, 2e-6);
            assert_fp32_close(&memory.read(update.exp_avg), &means, 1e-6);
            assert_fp32_close(&memory.read(update.exp_avg_sq), &squares, 1e-6);
            if let Some(copy) = update.copy {
                assert_eq!(memory.read_bf16(copy), rounded(&memory.read::<f32>(update.weights)));
            }
        }
    }
}
