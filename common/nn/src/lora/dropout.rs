//! Dropout on the adapters' inputs that depends on nothing but what it is for.
//!
//! A row's mask is a function of seed, optimizer update, layer, projection, and the tokens from the start of the row's
//! sequence to the row itself. So it is the same when activations are computed again, after a resume, and however
//! sequences are spread over ranks, micro-batches and shared prompts.

use aha_core::config::TargetModule;
use aha_core::random::derive_seed;
use tch::{Device, Kind, Tensor};

use crate::autograd_ops::PromptGroup;
use crate::kernels::cpu::training;
use crate::tensor_data::f32_slice_mut;

/// The masks of one micro-batch in one update.
#[derive(Debug)]
pub struct Dropout {
    rate: f64,
    /// Of the prefix that ends with each row.
    keys: Vec<u64>,
}

impl Dropout {
    /// `rate` is the share of inputs that become 0; `groups` are those of the packed batch.
    #[must_use]
    pub fn new(rate: f64, (seed, update): (u64, u64), groups: &[PromptGroup<'_>]) -> Self {
        let start = derive_seed(seed, &[u64::from_be_bytes(*b"dropout."), update]);
        let mut keys = Vec::new();
        let mut extend = |mut key: u64, tokens: &[u32]| {
            for &token in tokens {
                key = derive_seed(key, &[token.into()]);
                keys.push(key);
            }
            key
        };
        for group in groups {
            let prompt = extend(start, group.prompt);
            for completion in &group.completions {
                extend(prompt, completion);
            }
        }
        Self { rate, keys }
    }

    /// What the inputs of a projection are multiplied by: 0, or `1 / (1 - rate)`. `[N, width]`.
    pub fn mask(&self, layer_idx: usize, target: TargetModule, width: usize, (kind, device): (Kind, Device)) -> Tensor {
        let mut mask = Tensor::empty([self.keys.len() as i64, width as i64], (Kind::Float, Device::Cpu));
        let stream = [layer_idx as u32, target as u32];
        training::dropout_mask(&self.keys, stream, self.rate, f32_slice_mut(&mut mask));
        mask.to_kind(kind).to_device(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn group<'a>(prompt: &'a [u32], completions: &[&'a [u32]]) -> PromptGroup<'a> {
        PromptGroup { prompt, completions: completions.to_vec() }
    }

    fn mask(update: u64, groups: &[PromptGroup<'_>], (layer_idx, target): (usize, TargetModule)) -> Tensor {
        Dropout::new(0.3, (5, update), groups).mask(layer_idx, target, 1001, OPTIONS)
    }

    #[test]
    fn rows_with_equal_prefixes_have_equal_masks_however_they_are_packed() {
        let place = (1, TargetModule::V);
        let shared = mask(3, &[group(&[1, 2], &[&[3, 4], &[5]])], place);
        let apart = mask(3, &[group(&[1, 2, 5], &[]), group(&[1, 2, 3, 4], &[])], place);
        for (row, other) in [(0, 0), (1, 1), (0, 3), (2, 5), (3, 6), (4, 2)] {
            assert!(shared.get(row).equal(&apart.get(other)), "row {row} is not row {other}");
        }
        assert!(!shared.get(2).equal(&shared.get(4)), "rows of different prefixes");
    }

    #[test]
    fn masks_differ_by_update_layer_and_projection_and_have_the_rate() {
        let groups = [group(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], &[])];
        let first = mask(3, &groups, (1, TargetModule::V));
        assert!(first.equal(&mask(3, &groups, (1, TargetModule::V))));
        for other in [
            mask(4, &groups, (1, TargetModule::V)),
            mask(3, &groups, (0, TargetModule::V)),
            mask(3, &groups, (1, TargetModule::K)),
        ] {
            assert!(!first.equal(&other));
        }
        let dropped = first.eq(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!((dropped - 0.3).abs() < 0.02, "{dropped}");
        assert!((first.max().double_value(&[]) - 1.0 / 0.7).abs() < 1e-6);
    }
}
