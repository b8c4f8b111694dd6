//! Floating-point operations of a training step, by the matrices that its tokens are multiplied with.

use aha_nn::model_config::ModelConfig;

/// What a step computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Computed {
    /// Tokens that pass through the layers: a shared prompt counts once.
    pub tokens: u64,
    /// Tokens whose log-probs the head computes.
    pub targets: u64,
    /// Pairs of a token and one that it attends to, itself among them.
    pub pairs: u64,
}

/// Operations of forward and backward pass, without what recomputation adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flops {
    /// 6 a token and parameter: 2 forward, 4 backward. Of the layers' matrices for every token, of the head's for targets.
    pub matrices: f64,
    /// 12 a pair, head, and number of a head: scores and weighted sums are 4 forward, and twice as many backward.
    pub attention: f64,
}

impl Computed {
    /// A prompt that is computed once, and completions that see it and themselves.
    #[must_use]
    pub fn group(prompt: usize, completions: &[usize]) -> Self {
        let causal = |len: usize| (len * (len + 1) / 2) as u64;
        let targets: usize = completions.iter().sum();
        let own: u64 = completions.iter().map(|&len| causal(len)).sum();
        Self {
            tokens: (prompt + targets) as u64,
            targets: targets as u64,
            pairs: causal(prompt) + own + (prompt * targets) as u64,
        }
    }

    pub fn add(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.targets += other.targets;
        self.pairs += other.pairs;
    }

    #[must_use]
    pub fn flops(self, model: &ModelConfig) -> Flops {
        let manifest = model.manifest();
        let layers = &manifest.units[1..=model.num_layers];
        let matrices = layers.iter().flat_map(|unit| &unit.params).filter(|param| param.shape.len() == 2);
        let of_layers: usize = matrices.map(aha_core::manifest::ParamSpec::numel).sum();
        let of_head = model.vocab_size * model.hidden_size;
        let width = model.num_layers * model.num_heads * model.head_dim;
        Flops {
            matrices: 6.0 * (of_layers as f64 * self.tokens as f64 + of_head as f64 * self.targets as f64),
            attention: 12.0 * width as f64 * self.pairs as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_counts_what_a_mask_would_let_through() {
        // Row by row: the prompt's tokens see 1, 2, 3; those of completions the prompt and 1, 2 or 1 of their own.
        assert_eq!(Computed::group(3, &[2, 1]), Computed { tokens: 6, targets: 3, pairs: 6 + (4 + 5) + 4 });
        assert_eq!(Computed::group(4, &[]), Computed { tokens: 4, targets: 0, pairs: 10 });
        // A completion that does not share its prompt is a sequence.
        assert_eq!(Computed::group(5, &[7]).pairs, Computed::group(12, &[]).pairs);
    }

    #[test]
    fn qwen_2_5_0_5b_has_the_operations_of_its_sizes() {
        let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896,
            "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "tie_word_embeddings": true});
        let model = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
        let flops = Computed { tokens: 1000, targets: 500, pairs: 10_000 }.flops(&model);
        // 357.8 M parameters in the layers' matrices, 136.1 M in the head's.
        let layer = 896 * (896 + 128 + 128) + 896 * 896 + 3 * 896 * 4864;
        assert_eq!(flops.matrices, 6.0 * (24.0 * f64::from(layer) * 1000.0 + 136_134_656.0 * 500.0));
        assert_eq!(flops.attention, 12.0 * 24.0 * 14.0 * 64.0 * 10_000.0);
    }
}
