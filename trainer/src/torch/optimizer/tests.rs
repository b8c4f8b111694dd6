//! Every optimizer against its reference, and sharded against whole.

use std::sync::Mutex;

use aha_core::manifest::ParamSpec;
use aha_core::optimizer::{MuonAdjustLr, MuonOptions};
use serde::Deserialize;
use tch::Device;

use super::blocks::CodeBook;
use super::*;
use crate::test_ranks::run_ranks;

/// What `tests/golden/make_optimizers.py` writes.
#[derive(Deserialize)]
struct Golden {
    muon: Vec<MuonCase>,
    code_books: CodeBooks,
    adamw_8bit: Adamw8bitCase,
}

#[derive(Deserialize)]
struct MuonCase {
    rows: usize,
    columns: usize,
    adjust_lr: MuonAdjustLr,
    lr: f64,
    weight_decay: f64,
    initial: Vec<f32>,
    gradients: Vec<Vec<f32>>,
    expect: Vec<f32>,
}

#[derive(Deserialize)]
struct CodeBooks {
    signed: Vec<f32>,
    unsigned: Vec<f32>,
}

#[derive(Deserialize)]
struct Adamw8bitCase {
    numel: usize,
    steps: u64,
    /// Every so many elements are listed.
    stride: usize,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    expect: Vec<f32>,
}

const ADAMW: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
const KINDS: [OptimizerKind; 3] = [OptimizerKind::Adamw, OptimizerKind::Adamw8bit, OptimizerKind::Muon];

fn golden() -> Golden {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/optimizers.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn unit(name: &str, shapes: &[&[usize]]) -> UnitSpec {
    let param = |(index, shape): (usize, &&[usize])| ParamSpec::new(format!("p{index}"), shape);
    UnitSpec { name: name.to_owned(), params: shapes.iter().enumerate().map(param).collect() }
}

fn whole(unit: &UnitSpec) -> Range {
    Range { start: 0, len: unit.padded_numel(1) as i64 }
}

/// `values` with zeros after them.
fn padded(values: &Tensor, len: i64) -> Tensor {
    let padding = len - values.numel() as i64;
    Tensor::cat(&[values.shallow_clone(), Tensor::zeros([padding], (values.kind(), Device::Cpu))], 0)
}

fn update(step: u64, options: &AdamW) -> Update<'_> {
    Update { scale: 1.0, step, options, group: None }
}

#[test]
fn muon_updates_as_torch_does() {
    for case in golden().muon {
        let unit = unit("layers.0", &[&[case.rows, case.columns]]);
        let owned = whole(&unit);
        let mut weights = padded(&Tensor::from_slice(&case.initial), owned.len);
        // Twice the ratio at half the rate.
        let muon = MuonOptions { adjust_lr: case.adjust_lr, lr_ratio: 2.0 };
        let options = OptimizerOptions { kind: OptimizerKind::Muon, muon };
        let mut optimizer = ShardOptimizer::new(&unit, owned, &weights, &options);
        let adamw = AdamW { lr: case.lr / 2.0, weight_decay: case.weight_decay, ..ADAMW };
        for (step, gradient) in (1..).zip(&case.gradients) {
            let mut grad = padded(&Tensor::from_slice(gradient), owned.len);
            optimizer.update(&mut weights, &mut grad, &update(step, &adamw)).unwrap();
        }
        let expect = Tensor::from_slice(&case.expect);
        let moved = (&expect - Tensor::from_slice(&case.initial)).abs().max().double_value(&[]);
        let difference = (weights.narrow(0, 0, expect.numel() as i64) - expect).abs().max().double_value(&[]);
        // The iteration computes in bf16, of 8 bits.
        assert!(
            difference < 0.005 * moved,
            "{} x {}, {:?}: {difference} of {moved}",
            case.rows,
            case.columns,
            case.adjust_lr
        );
    }
}

#[test]
fn code_books_are_those_of_bitsandbytes() {
    let CodeBooks { signed, unsigned } = golden().code_books;
    for (book, expect) in [(CodeBook::signed(Device::Cpu), signed), (CodeBook::unsigned(Device::Cpu), unsigned)] {
        assert_eq!(book.values().len(), 256);
        for (value, expect) in book.values().into_iter().zip(expect) {
            assert!((value - expect).abs() <= 1e-6 * expect.abs(), "{value} is not {expect}");
        }
    }
}

#[test]
fn moments_in_8_bits_follow_the_paper() {
    let case = golden().adamw_8bit;
    let unit = unit("layers.0", &[&[case.numel / 2, 2]]);
    let owned = whole(&unit);
    assert_eq!(owned.len, case.numel as i64);
    let index = Tensor::arange(owned.len, (Kind::Double, Device::Cpu));
    let mut weights = (&index * 0.11).cos().to_kind(Kind::Float);
    let options = OptimizerOptions { kind: OptimizerKind::Adamw8bit, ..OptimizerOptions::default() };
    let mut optimizer = ShardOptimizer::new(&unit, owned, &weights, &options);
    let Adamw8bitCase { lr, beta1, beta2, eps, weight_decay, .. } = case;
    let adamw = AdamW { lr, beta1, beta2, eps, weight_decay };
    for step in 1..=case.steps {
        let scale = (index.remainder(5.0) * -std::f64::consts::LN_10).exp();
        let mut grad = ((&index * 0.37 + 1.7 * step as f64).sin() * scale).to_kind(Kind::Float);
        optimizer.update(&mut weights, &mut grad, &update(step, &adamw)).unwrap();
    }
    let weights = Vec::<f32>::try_from(weights).unwrap();
    let found = weights.iter().step_by(case.stride);
    let differences: Vec<f32> = found.zip(&case.expect).map(|(found, expect)| (found - expect).abs()).collect();
    assert_eq!(differences.len(), case.expect.len());
    // Where an element lies between two values to the last bit, fp32 and f64 may round it to different ones.
    let far = differences.iter().filter(|&&difference| difference > 2e-6).count();
    assert!(far <= differences.len() / 200, "{far} of {} differ", differences.len());
}

#[test]
fn the_state_takes_the_memory_it_says() {
    let unit = unit("layers.0", &[&[64, 64], &[64], &[128, 64]]);
    let owned = whole(&unit);
    for kind in [Kind::Float, Kind::BFloat16] {
        let weights = Tensor::zeros([owned.len], (kind, Device::Cpu));
        let bytes = |optimizer| {
            let options = OptimizerOptions { kind: optimizer, ..OptimizerOptions::default() };
            ShardOptimizer::new(&unit, owned, &weights, &options).num_bytes()
        };
        let numel = 12_288 + 64;
        let master = if kind == Kind::Float { 0 } else { 4 * numel };
        assert_eq!(bytes(OptimizerKind::Adamw), 8 * numel + master);
        // 49 blocks, one of them exact.
        assert_eq!(bytes(OptimizerKind::Adamw8bit), 2 * (numel + 4 * 49 + 4 * 256) + master);
        assert_eq!(bytes(OptimizerKind::Muon), 4 * 12_288 + 8 * 64 + master);
    }
}

/// Units with parameters on both sides of every rule, cut across at all places.
fn units() -> Vec<UnitSpec> {
    vec![
        unit("embedding", &[&[130, 40]]),
        unit("layers.0", &[&[60], &[70, 60], &[60], &[30, 60], &[9], &[50, 90]]),
        unit("head", &[&[60], &[101, 60]]),
        unit("layers.1", &[&[3]]),
    ]
}

/// Numbers of element `0..numel` that depend on nothing but `name`.
fn random(numel: usize, name: u64) -> Tensor {
    let value = |index| (aha_core::random::derive_seed(name, &[index]) % 20_001) as f32 / 10_000.0 - 1.0;
    Tensor::from_slice(&(0..numel as u64).map(|index| value(index).powi(3)).collect::<Vec<_>>())
}

/// What a rank owns of a unit after some updates: weights and state, with their places in the whole.
struct Shard {
    weights: Tensor,
    state: Vec<StateTensor>,
}

/// A unit's weights and state, put together.
type Whole = (Tensor, Vec<(&'static str, Tensor)>);

fn copy((weights, state): &Whole) -> Whole {
    (weights.copy(), state.iter().map(|(name, tensor)| (*name, tensor.copy())).collect())
}

/// One rank's updates of one unit from the `first` to the `last`, after loading `state` of any world size.
fn run(
    unit_spec: (&UnitSpec, OptimizerKind, Kind),
    group: &ProcessGroup,
    steps: std::ops::RangeInclusive<u64>,
    before: Option<&Whole>,
) -> Shard {
    let (unit, kind, weights_kind) = unit_spec;
    let padded_len = unit.padded_numel(group.size()) as i64;
    let len = padded_len / group.size() as i64;
    let owned = Range { start: group.rank() as i64 * len, len };
    let initial = random(unit.numel(), 7);
    let weights = before.map_or(&initial, |(weights, _)| weights).to_kind(weights_kind);
    let mut weights = owned.of(&padded(&weights, padded_len)).copy();
    let options = OptimizerOptions { kind, ..OptimizerOptions::default() };
    let mut optimizer = ShardOptimizer::new(unit, owned, &weights, &options);
    for mut part in optimizer.tensors() {
        if let Some((_, state)) = before {
            let (_, saved) = state.iter().find(|(name, _)| *name == part.name).unwrap();
            assert_eq!(saved.size(), [part.whole_len], "{}", part.name);
            part.tensor.copy_(&saved.narrow(0, part.offset, part.tensor.numel() as i64));
        }
    }
    for step in steps {
        let mut grad = owned.of(&padded(&random(unit.numel(), 100 + step), padded_len)).copy();
        let update = Update { scale: 0.7, step, options: &ADAMW, group: Some(group) };
        optimizer.update(&mut weights, &mut grad, &update).unwrap();
    }
    let real = optimizer.real;
    Shard { weights: real.relative_to(owned.start.min(real.start)).of(&weights).copy(), state: optimizer.tensors() }
}

/// The shards of all ranks put together.
fn join(shards: Vec<Shard>) -> Whole {
    let mut state = Vec::new();
    for index in 0..shards[0].state.len() {
        let mut end = 0;
        for shard in &shards {
            let StateTensor { name, tensor, offset, .. } = &shard.state[index];
            assert!(tensor.numel() == 0 || *offset == end, "{name} begins at {offset}, not at {end}");
            end += tensor.numel() as i64;
        }
        let StateTensor { name, whole_len, .. } = shards[0].state[index];
        assert_eq!(end, whole_len, "{name}");
        let parts: Vec<&Tensor> = shards.iter().map(|shard| &shard.state[index].tensor).collect();
        state.push((name, Tensor::cat(&parts, 0)));
    }
    let weights: Vec<&Tensor> = shards.iter().map(|shard| &shard.weights).collect();
    (Tensor::cat(&weights, 0), state)
}

/// Every optimizer on every unit, in fp32 and in bf16.
fn cases() -> Vec<(UnitSpec, OptimizerKind, Kind)> {
    let kinds = KINDS.into_iter().flat_map(|kind| [Kind::Float, Kind::BFloat16].map(|weights| (kind, weights)));
    kinds.flat_map(|(kind, weights)| units().into_iter().map(move |unit| (unit, kind, weights))).collect()
}

/// What `size` ranks make of all cases, put together.
fn sharded(size: usize, steps: std::ops::RangeInclusive<u64>, before: Option<&[Whole]>) -> Vec<Whole> {
    let before = Mutex::new(before.map(|before| before.iter().map(copy).collect::<Vec<_>>()));
    let by_rank = run_ranks(size, |group| {
        let before = before.lock().unwrap().as_ref().map(|before| before.iter().map(copy).collect::<Vec<_>>());
        let shard = |(index, (unit, kind, weights)): (usize, &(UnitSpec, OptimizerKind, Kind))| {
            let before = before.as_ref().map(|before| &before[index]);
            run((unit, *kind, *weights), &group, steps.clone(), before)
        };
        cases().iter().enumerate().map(shard).collect::<Vec<_>>()
    });
    let mut ranks: Vec<_> = by_rank.into_iter().map(Vec::into_iter).collect();
    (0..cases().len()).map(|_| join(ranks.iter_mut().map(|shards| shards.next().unwrap()).collect())).collect()
}

#[test]
fn shards_of_any_world_size_update_as_the_whole_and_go_on_from_each_other() {
    let expect = sharded(1, 1..=5, None);
    for size in [2, 3] {
        let third = sharded(size, 1..=3, None);
        for (what, found) in [
            ("straight", sharded(size, 1..=5, None)),
            ("resumed by one", sharded(1, 4..=5, Some(&third))),
            ("resumed by others", sharded(5 - size, 4..=5, Some(&third))),
        ] {
            for ((unit, kind, weights), (found, expect)) in cases().iter().zip(found.iter().zip(&expect)) {
                let place = format!("{kind:?}, {weights:?}, {}, {size} ranks, {what}", unit.name);
                assert!(found.0.equal(&expect.0), "{place}: weights");
                for ((name, found), (_, expect)) in found.1.iter().zip(&expect.1) {
                    assert!(found.equal(expect), "{place}: {name}");
                }
            }
        }
    }
}
