//! Tests of [`super`] on the CPU or a GPU, against f64.

use super::super::testing::{Memory, assert_bf16_close, on_gpu, rounded};
use super::*;
use crate::kernels::cpu::testing::random;

#[test]
fn embeddings_are_the_rows_of_the_table() {
    for width in [8, 72, 896, 2056] {
        let mut memory = Memory::default();
        let table = random(5 * width, 1);
        let tokens = [3, 0, 4, 3];
        let embed = Embed {
            num_rows: tokens.len(),
            width,
            tokens: memory.put(&tokens),
            table: memory.put_bf16(&table),
            residual: memory.put(&vec![f32::NAN; tokens.len() * width]),
        };
        memory.run(&[embed.launch()]);
        let table = rounded(&table);
        let expect: Vec<f32> =
            tokens.iter().flat_map(|token| table[*token as usize * width..][..width].to_vec()).collect();
        assert_eq!(memory.read::<f32>(embed.residual), expect);
    }
}

struct NormCase {
    residual: Vec<f32>,
    delta: Option<Vec<f32>>,
    weight: Vec<f32>,
    epsilon: f32,
}

impl NormCase {
    /// The residual after the addition, and its norm.
    fn reference(&self) -> (Vec<f32>, Vec<f64>) {
        let delta = self.delta.as_ref().map_or_else(|| vec![0.0; self.residual.len()], |delta| rounded(delta));
        let sum: Vec<f32> = self.residual.iter().zip(&delta).map(|(x, y)| x + y).collect();
        let weight = rounded(&self.weight);
        let normed = sum.chunks(weight.len()).flat_map(|row| {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
            let scale = (mean + f64::from(self.epsilon)).sqrt().recip();
            row.iter().zip(&weight).map(move |(x, w)| f64::from(*x) * scale * f64::from(*w)).collect::<Vec<_>>()
        });
        let normed = normed.collect();
        (sum, normed)
    }
}

fn norm_case(num_rows: usize, width: usize, with_delta: bool) -> NormCase {
    let mut residual: Vec<f32> = random(num_rows * width, 1).iter().map(|x| x * 30.0).collect();
    // A row that is nearly nothing: epsilon decides.
    residual[..width].iter_mut().for_each(|x| *x *= 1e-6);
    let mut delta = with_delta.then(|| random(num_rows * width, 2));
    if let Some(delta) = &mut delta {
        delta[..width].fill(0.0);
    }
    NormCase { residual, delta, weight: random(width, 3), epsilon: 1e-6 }
}

#[test]
fn the_norm_of_the_sum_agrees_with_f64() {
    for width in [8, 72, 576, 896, 2056, 8192] {
        for with_delta in [false, true] {
            let case = norm_case(3, width, with_delta);
            let mut memory = Memory::default();
            let norm = AddRmsNorm {
                num_rows: 3,
                width,
                epsilon: case.epsilon,
                residual: memory.put(&case.residual),
                delta: case.delta.as_ref().map(|delta| memory.put_bf16(delta)),
                weight: memory.put_bf16(&case.weight),
                out: memory.put(&vec![0x7fff_u16; 3 * width]),
                rows: None,
            };
            memory.run(&[norm.launch()]);
            let (residual, normed) = case.reference();
            assert_eq!(memory.read::<f32>(norm.residual), residual);
            assert_bf16_close(&memory.read_bf16(norm.out), &normed, 0.0, 1e-5);
        }
    }
}

#[test]
fn the_norm_of_chosen_rows_leaves_the_residual_alone() {
    let (width, rows) = (72, [4, 1, 4]);
    let case = norm_case(5, width, true);
    let mut memory = Memory::default();
    let norm = AddRmsNorm {
        num_rows: rows.len(),
        width,
        epsilon: case.epsilon,
        residual: memory.put(&case.residual),
        delta: case.delta.as_ref().map(|delta| memory.put_bf16(delta)),
        weight: memory.put_bf16(&case.weight),
        out: memory.put(&vec![0x7fff_u16; rows.len() * width]),
        rows: Some(memory.put(&rows)),
    };
    memory.run(&[norm.launch()]);
    assert_eq!(memory.read::<f32>(norm.residual), case.residual);
    let normed = case.reference().1;
    let expect: Vec<f64> = rows.iter().flat_map(|row| normed[*row as usize * width..][..width].to_vec()).collect();
    assert_bf16_close(&memory.read_bf16(norm.out), &expect, 0.0, 1e-5);
}

#[test]
fn silu_mul_agrees_with_f64() {
    for num_features in [8, 48, 2048, 2056, 4864] {
        let mut gate_up: Vec<f32> = random(3 * 2 * num_features, 1).iter().map(|x| x * 20.0).collect();
        (gate_up[0], gate_up[1]) = (1000.0, -1000.0);
        let mut memory = Memory::default();
        let silu = SiluMul {
            num_rows: 3,
            num_features,
            gate_up: memory.put_bf16(&gate_up),
            out: memory.put(&vec![0x7fff_u16; 3 * num_features]),
        };
        memory.run(&[silu.launch()]);
        let expect: Vec<f64> = rounded(&gate_up)
            .chunks(2 * num_features)
            .flat_map(|row| {
                let (gate, up) = row.split_at(num_features);
                let silu = |gate: f32| f64::from(gate) / (1.0 + (-f64::from(gate)).exp());
                gate.iter().zip(up).map(|(gate, up)| silu(*gate) * f64::from(*up)).collect::<Vec<_>>()
            })
            .collect();
        assert_bf16_close(&memory.read_bf16(silu.out), &expect, 1e-30, 1e-5);
    }
}

#[test]
fn arguments_that_a_kernel_does_not_take_are_refused() {
    if on_gpu() {
        eprintln!("skipped: a GPU takes any arguments");
        return;
    }
    let mut memory = Memory::default();
    let silu = SiluMul { num_rows: 1, num_features: 8, gate_up: DevicePtr(0), out: DevicePtr(0) };
    let launch = silu.launch();
    let more = Launch { args: launch.args.clone().with(1_i32), ..launch.clone() };
    assert!(memory.try_run(&[more]).unwrap_err().contains("number of arguments"));
    let wider = Launch { args: Args::default().with(silu.gate_up).with(silu.out).with(silu.out), ..launch };
    assert!(memory.try_run(&[wider]).unwrap_err().contains("another size"));
}
