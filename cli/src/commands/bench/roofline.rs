//! The least time that a decode step can take: what it must read and write, over the bandwidth of the memory.

use aha_core::manifest::UnitSpec;
use aha_nn::model_config::ModelConfig;

/// What a step of an engine moves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Traffic {
    /// All matrices once, in bytes; of an embedding that is not the head too, only rows are read.
    pub(super) weights: f64,
    /// Keys and values of one token of context, in bytes.
    pub(super) kv_per_token: f64,
    /// Logits of one sequence in fp32, in bytes, once.
    pub(super) logits_per_sequence: f64,
}

/// How an engine stores numbers, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage {
    /// Of weights, keys and values.
    pub(super) element: usize,
    /// Of the layers' matrices, where they are quantised.
    pub(super) layer_matrix: usize,
}

impl Traffic {
    pub(super) fn of(config: &ModelConfig, storage: Storage) -> Self {
        let manifest = config.manifest();
        let last = manifest.units.len() - 1;
        let bytes = |(unit_idx, unit): (usize, &UnitSpec)| -> usize {
            let of_param = |shape: &Vec<usize>| match shape.len() {
                2 if (1..last).contains(&unit_idx) => storage.layer_matrix,
                _ => storage.element,
            };
            unit.params.iter().map(|param| param.numel() * of_param(&param.shape)).sum()
        };
        let stored: usize = manifest.units.iter().enumerate().map(bytes).sum();
        let has_own_head = manifest.units[last].params.iter().any(|param| param.shape.len() == 2);
        let not_streamed = if has_own_head { bytes((0, &manifest.units[0])) } else { 0 };
        Self {
            weights: (stored - not_streamed) as f64,
            kv_per_token: (2 * config.num_layers * config.num_kv_heads * config.head_dim * storage.element) as f64,
            logits_per_sequence: (4 * config.vocab_size) as f64,
        }
    }

    /// Bytes of a step that decodes one token of `batch` sequences, whose contexts are `context` tokens on average.
    pub(super) fn of_step(&self, batch: usize, context: f64) -> f64 {
        self.weights + batch as f64 * (context * self.kv_per_token + self.logits_per_sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::shapes::ModelShape;

    fn traffic(shape: ModelShape, storage: Storage) -> Traffic {
        let folder = tempfile::tempdir().unwrap();
        shape.write(folder.path()).unwrap();
        Traffic::of(&ModelConfig::load(folder.path()).unwrap(), storage)
    }

    /// Gigabytes of weights and bytes of keys and values worked out by hand from the models' sizes.
    #[test]
    fn known_models_move_known_bytes() {
        let bf16 = Storage { element: 2, layer_matrix: 2 };
        for (shape, weights, kv_per_token) in [
            (ModelShape::Qwen25_0_5b, 0.988, 12_288.0),
            (ModelShape::Qwen25_1_5b, 3.087, 28_672.0),
            (ModelShape::Qwen25_3b, 6.172, 36_864.0),
            // Of 15.23 GB, 1.09 are an embedding of which rows are read.
            (ModelShape::Qwen25_7b, 14.14, 57_344.0),
        ] {
            let traffic = traffic(shape, bf16);
            assert!((traffic.weights / 1e9 / weights - 1.0).abs() < 2e-3, "{shape:?}: {traffic:?}");
            assert_eq!(traffic.kv_per_token, kv_per_token);
        }
        // At 3.35 TB/s a step of 256 sequences with 512 tokens each takes 0.82 ms.
        let step = traffic(ModelShape::Qwen25_0_5b, bf16).of_step(256, 512.0);
        assert!((step / 3.35e12 - 0.82e-3).abs() < 5e-6, "{step}");
    }

    #[test]
    fn quantised_layers_move_a_quarter_of_their_matrices() {
        let [fp32, int8] =
            [4, 1].map(|layer_matrix| traffic(ModelShape::Qwen25_0_5b, Storage { element: 4, layer_matrix }));
        assert_eq!(fp32.weights - int8.weights, 3.0 * 24.0 * (2.0 * 896.0 * (896.0 + 128.0) + 3.0 * 896.0 * 4864.0));
        assert_eq!(fp32.kv_per_token, int8.kv_per_token);
    }
}
