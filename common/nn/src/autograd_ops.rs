//! The trainer's operations, differentiable, over packed sequences: our own where there are some for the device and the
//! type, else plain libtorch.

use tch::{Kind, Tensor};

use crate::activation::Activation;
use crate::fused_kernels::{Angles, Kernels};
use crate::fused_ops::{self, TrainedMatrix};
use crate::packed_attention::{GroupLengths, PackedAttention};
use crate::rotary::RotaryTable;
use crate::tensor_data::to_device;
use crate::transformer::{Ops, Projection};

/// Everything about a micro-batch that the layers need, on the device.
#[derive(Debug)]
pub struct PackedBatch {
    /// `[N]`, i64.
    pub tokens: Tensor,
    angles: Angles,
    attention: PackedAttention,
    /// None where libtorch's operations serve.
    kernels: Option<Kernels>,
}

/// A prompt and sequences that go on after it. Its tokens are computed once; `prompt` may as well be all there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptGroup<'a> {
    pub prompt: &'a [u32],
    pub completions: Vec<&'a [u32]>,
}

impl PackedBatch {
    /// Packs `sequences` one after the other, each with positions from 0.
    #[must_use]
    pub fn new(sequences: &[&[u32]], table: &RotaryTable, kind: Kind) -> Self {
        let groups: Vec<_> = sequences.iter().map(|prompt| PromptGroup { prompt, completions: Vec::new() }).collect();
        Self::shared(&groups, table, kind)
    }

    /// Packs groups one after the other: the prompt, with positions from 0, then its completions, each with positions
    /// from the prompt's end. A completion's tokens see the prompt and their own completion.
    #[must_use]
    pub fn shared(groups: &[PromptGroup<'_>], table: &RotaryTable, kind: Kind) -> Self {
        let device = table.cos.device();
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        for group in groups {
            let mut add = |piece: &[u32], first: usize| {
                tokens.extend(piece.iter().map(|&token| i64::from(token)));
                positions.extend((first..first + piece.len()).map(|position| position as i64));
            };
            add(group.prompt, 0);
            group.completions.iter().for_each(|completion| add(completion, group.prompt.len()));
        }
        let lengths: Vec<GroupLengths> = groups.iter().map(PromptGroup::lengths).collect();
        let kernels = Kernels::of(device, kind);
        let head_dim = 2 * table.cos.size()[1];
        Self {
            tokens: to_device(&tokens, device),
            angles: angles(&positions, table, kind, kernels.as_ref()),
            attention: PackedAttention::new(&lengths, device, kind, head_dim),
            kernels,
        }
    }
}

/// Of every row; of every position for the kernels of a GPU, which look them up.
fn angles(positions: &[i64], table: &RotaryTable, kind: Kind, kernels: Option<&Kernels>) -> Angles {
    let (num_positions, half) = table.cos.size2().expect("the table is [T, D / 2]");
    let head_dim = 2 * half as usize;
    let longest = positions.iter().max().map_or(0, |last| last + 1);
    assert!(longest <= num_positions, "{longest} positions, and angles of {num_positions}");
    let positions = to_device(positions, table.cos.device());
    if matches!(kernels, Some(Kernels::Gpu(_))) {
        let [cos, sin] = [&table.cos, &table.sin].map(Tensor::shallow_clone);
        return Angles { cos, sin, positions: Some(positions.to_kind(Kind::Int)), head_dim };
    }
    let [cos, sin] = table.rows(&positions, kind);
    Angles { cos, sin, positions: None, head_dim }
}

impl PromptGroup<'_> {
    fn lengths(&self) -> GroupLengths {
        GroupLengths {
            prompt: self.prompt.len(),
            completions: self.completions.iter().map(|completion| completion.len()).collect(),
        }
    }
}

impl PackedBatch {
    /// `[N, heads * D]` or `[N, heads, D]` as the latter.
    fn heads(&self, x: &Tensor) -> Tensor {
        x.view([self.tokens.size()[0], -1, self.angles.head_dim as i64])
    }
}

impl PackedBatch {
    /// Whether [`TrainedMatrix::adding_to`] may be used.
    #[must_use]
    pub fn adds_gradients(&self) -> bool {
        self.kernels.is_some()
    }
}

impl Ops for PackedBatch {
    type Matrix = TrainedMatrix;
    type Rows = Activation;

    fn embed(&self, weight: &Tensor) -> Activation {
        Tensor::embedding(weight, &self.tokens, -1, false, false).into() // [N, C]
    }

    fn rms_norm(&self, x: &Activation, weight: &Tensor, eps: f64) -> Activation {
        match &self.kernels {
            Some(kernels) => fused_ops::rms_norm(kernels, &x.rows, weight, eps),
            None => x.rows.rms_norm(weight.size(), Some(weight), Some(eps)).into(),
        }
    }

    fn head_norm(&self, x: Activation, weight: &Tensor, eps: f64) -> Activation {
        self.rms_norm(&self.heads(&x.rows).into(), weight, eps)
    }

    fn residual_norm(&self, x: Activation, weight: &Tensor, eps: f64) -> [Activation; 2] {
        match &self.kernels {
            Some(kernels @ Kernels::Gpu(_)) => fused_ops::add_norm(kernels, &x.rows, None, weight, eps),
            _ => {
                let normed = self.rms_norm(&x, weight, eps);
                [x, normed]
            }
        }
    }

    fn linear<const P: usize>(&self, x: &Activation, projections: [&Projection<TrainedMatrix>; P]) -> [Activation; P] {
        let outputs = if self.kernels.is_some() {
            fused_ops::linear(x, projections)
        } else {
            projections.map(|projection| projection.of(&x.rows))
        };
        outputs.map(Activation::from)
    }

    fn add_linear(&self, residual: Activation, x: &Activation, projection: &Projection<TrainedMatrix>) -> Activation {
        let residual = residual.rows;
        if self.kernels.is_some() {
            return fused_ops::add_linear(&residual, x, projection).into();
        }
        (residual + projection.of(&x.rows)).into()
    }

    fn add_linear_norm(
        &self,
        residual: Activation,
        x: &Activation,
        projection: &Projection<TrainedMatrix>,
        (weight, eps): (&Tensor, f64),
    ) -> [Activation; 2] {
        // oneDNN adds within the product instead.
        if let Some(kernels @ Kernels::Gpu(_)) = &self.kernels {
            let [delta] = fused_ops::linear(x, [projection]);
            return fused_ops::add_norm(kernels, &residual.rows, Some(&delta), weight, eps);
        }
        self.residual_norm(self.add_linear(residual, x, projection), weight, eps)
    }

    fn rope(&self, x: Activation) -> Activation {
        let x = x.rows;
        if let Some(kernels) = &self.kernels {
            return fused_ops::rope(kernels, &x, &self.angles).into();
        }
        let x = self.heads(&x);
        let halves = x.chunk(2, -1);
        let rotated = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1); // [N, H, D]
        (x * &self.angles.cos + rotated * &self.angles.sin).into()
    }

    fn attention(&self, _layer_idx: usize, qkv: [Activation; 3]) -> Activation {
        self.attention.forward(qkv.map(|x| self.heads(&x.rows))).into()
    }

    fn silu_mul(&self, [gate, up]: [Activation; 2]) -> Activation {
        match &self.kernels {
            Some(kernels) => fused_ops::silu_mul(kernels, &gate.rows, &up.rows),
            None => (gate.rows.silu() * up.rows).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use aha_core::random::derive_seed;

    use tch::Device;

    use super::*;
    use crate::autograd::grad;
    use crate::fused_kernels::testing;
    use crate::model_config::ModelConfig;
    use crate::transformer::Layer;
    use crate::weights::Weights;

    fn config(family: &str) -> ModelConfig {
        let raw = serde_json::json!({"model_type": family, "vocab_size": 31, "hidden_size": 20, "intermediate_size": 26,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
            "initializer_range": 0.4});
        ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
    }

    /// A prompt's tokens and those of its completions.
    type Group = (Vec<u32>, Vec<Vec<u32>>);

    fn groups(seed: u64) -> Vec<Group> {
        let draw = |index: &[u64], bound: u64| (derive_seed(seed, index) % bound) as u32;
        let tokens = |group: u64, piece: u64, len: u32| -> Vec<u32> {
            (0..len).map(|position| draw(&[group, piece, u64::from(position)], 31)).collect()
        };
        (0..4)
            .map(|group| {
                let completions = (1..1 + u64::from(draw(&[group, 100], 5)))
                    .map(|piece| tokens(group, piece, draw(&[group, 200 + piece], 12)));
                (tokens(group, 0, 1 + draw(&[group, 300], 9)), completions.collect())
            })
            .collect()
    }

    /// A layer's outputs at all completion tokens, `[M, C]`, and its gradients with respect to embedding and parameters.
    fn layer(config: &ModelConfig, kind: Kind, pieces: &[PromptGroup<'_>], rows: &[i64]) -> Vec<Tensor> {
        layer_on(Device::Cpu, config, kind, pieces, rows)
    }

    fn layer_on(
        device: Device,
        config: &ModelConfig,
        kind: Kind,
        pieces: &[PromptGroup<'_>],
        rows: &[i64],
    ) -> Vec<Tensor> {
        let weights = Weights::random(config, 3, 1, Kind::Float, Device::Cpu);
        let table = RotaryTable::new(config, 64, device);
        let batch = PackedBatch::shared(pieces, &table, kind);
        let mut leaves = vec![weights.embedding()];
        leaves.extend(weights.views(1));
        for (index, leaf) in leaves.iter_mut().enumerate() {
            // Norms and biases of their own, so that none of them can be missed.
            let noise = if leaf.dim() == 1 {
                (Tensor::arange(leaf.size()[0], (kind, Device::Cpu)) + index as f64).sin() * 0.3
            } else {
                leaf.zeros_like()
            };
            *leaf = (leaf.to_kind(kind) + noise.to_kind(kind)).detach().to_device(device).set_requires_grad(true);
        }
        let params = leaves[1..].iter().map(Tensor::shallow_clone).collect();
        let x = batch.embed(&leaves[0]);
        let output = Tensor::from(Layer::new(config, params, TrainedMatrix::from).forward(&batch, config, 0, x));
        let output = output.index_select(0, &Tensor::from_slice(rows).to_device(device)); // [M, C]
        let direction = Tensor::arange(output.numel() as i64, (Kind::Double, Device::Cpu)).sin().view_as(&output);
        let direction = direction.to_kind(kind).to_device(device);
        let grads = grad(&[(&output * direction).sum(kind)], &leaves, &[None], false).unwrap();
        std::iter::once(output).chain(grads.into_iter().flatten()).collect()
    }

    #[test]
    fn sharing_prompts_and_our_own_functions_change_nothing() {
        for seed in 0..12 {
            let family = ["qwen2", "qwen3", "llama"][seed as usize % 3];
            let groups = groups(seed);
            let (mut shared, mut whole) = (Vec::new(), Vec::new());
            let (mut shared_rows, mut whole_rows) = (Vec::new(), Vec::new());
            let sequences: Vec<Vec<u32>> = groups
                .iter()
                .flat_map(|(prompt, completions)| completions.iter().map(|own| [prompt.as_slice(), own].concat()))
                .collect();
            let (mut shared_row, mut whole_row) = (0, 0);
            for (prompt, completions) in &groups {
                shared.push(PromptGroup { prompt, completions: completions.iter().map(Vec::as_slice).collect() });
                shared_row += prompt.len() as i64;
                for own in completions {
                    shared_rows.extend(shared_row..shared_row + own.len() as i64);
                    whole_row += prompt.len() as i64;
                    whole_rows.extend(whole_row..whole_row + own.len() as i64);
                    shared_row += own.len() as i64;
                    whole_row += own.len() as i64;
                }
            }
            whole.extend(sequences.iter().map(|tokens| PromptGroup { prompt: tokens, completions: Vec::new() }));
            let config = config(family);
            let expected = layer(&config, Kind::Double, &whole, &whole_rows);
            let close = |results: Vec<Tensor>, what: &str, tolerance: f64| {
                assert_eq!(results.len(), expected.len());
                for (index, (ours, theirs)) in results.iter().zip(&expected).enumerate() {
                    let difference = (ours.to_kind(Kind::Double) - theirs).abs().max().double_value(&[]);
                    let size = theirs.abs().max().double_value(&[]).max(1.0);
                    assert!(difference < tolerance * size, "{family}, {what}: result {index} differs by {difference}");
                }
            };
            close(layer(&config, Kind::Double, &shared, &shared_rows), "shared in f64", 1e-10);
            close(layer(&config, Kind::Float, &whole, &whole_rows), "our functions", 1e-5);
            close(layer(&config, Kind::Float, &shared, &shared_rows), "our functions, shared", 1e-5);
        }
    }

    /// Root of the mean of squared differences, relative to that of the expected values.
    fn relative_error(ours: &Tensor, theirs: &Tensor) -> f64 {
        let ours = ours.to_device(Device::Cpu).to_kind(Kind::Double);
        let squares = |x: &Tensor| x.square().mean(Kind::Double).double_value(&[]);
        (squares(&(ours - theirs)) / squares(theirs)).sqrt()
    }

    #[test]
    fn a_layer_on_a_gpu_agrees_with_autograd_in_f64() {
        for (seed, family) in (0..).zip(["qwen2", "qwen3", "llama"]) {
            let groups = groups(seed);
            let pieces: Vec<_> = groups
                .iter()
                .map(|(prompt, own)| PromptGroup { prompt, completions: own.iter().map(Vec::as_slice).collect() })
                .collect();
            let (config, rows) = (config(family), [0, 2, 3, 7]);
            let expected = layer(&config, Kind::Double, &pieces, &rows);
            let by_libtorch = layer(&config, Kind::BFloat16, &pieces, &rows);
            for kind in [Kind::Float, Kind::BFloat16] {
                let run = || testing::with_gpu(kind, || layer_on(testing::device(), &config, kind, &pieces, &rows));
                let ours = run();
                // On a real one libtorch's attention adds up in any order.
                let is_emulated = testing::device() == Device::Cpu;
                assert!(!is_emulated || ours.iter().zip(run()).all(|(a, b)| a.equal(&b)), "{family}: two runs differ");
                for (index, ((ours, theirs), unfused)) in ours.iter().zip(&expected).zip(&by_libtorch).enumerate() {
                    assert_eq!(ours.kind(), kind);
                    let error = relative_error(ours, theirs);
                    // libtorch's own operations in bf16 are no nearer to the truth.
                    let allowed = if kind == Kind::Float { 1e-5 } else { 1.5 * relative_error(unfused, theirs) + 2e-3 };
                    assert!(error < allowed, "{family}, {kind:?}: result {index} is off by {error}, over {allowed}");
                }
            }
        }
    }

    #[test]
    fn our_functions_give_the_same_bits_twice() {
        let groups = groups(9);
        let pieces: Vec<_> = groups
            .iter()
            .map(|(prompt, own)| PromptGroup { prompt, completions: own.iter().map(Vec::as_slice).collect() })
            .collect();
        let run = || layer(&config("qwen3"), Kind::Float, &pieces, &[0, 3, 5]);
        assert!(run().iter().zip(run()).all(|(a, b)| a.equal(&b)));
    }
}
