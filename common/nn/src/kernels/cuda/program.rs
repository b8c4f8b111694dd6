//! Which sources to compile, with which macros.

use std::fmt;

use super::AttentionShape;
use crate::model_config::{Family, ModelConfig};

/// A source file and the macros it is compiled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Program {
    Attention(AttentionShape),
    Elementwise,
    Rope { head_dim: usize },
    Sampling(LogitKind),
    Step,
    Training(Element),
}

/// How the trainer stores activations and weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    Bf16,
    Fp32,
}

/// How logits are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LogitKind {
    Bf16,
    /// What a product of bf16 matrices was summed in: log-probs that deserve their digits.
    Fp32,
}

/// What of a model the kernels depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelShapes {
    pub attention: AttentionShape,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub logits: LogitKind,
}

/// A model that these kernels cannot serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} is {value}, and the CUDA kernels need {expected}")]
pub struct UnsupportedShape {
    pub name: &'static str,
    pub value: usize,
    pub expected: &'static str,
}

impl KernelShapes {
    /// # Errors
    /// Names the first size that the kernels cannot serve.
    pub fn of(config: &ModelConfig, block_size: usize, logits: LogitKind) -> Result<Self, UnsupportedShape> {
        let check = |ok: bool, name, value, expected| {
            if ok { Ok(()) } else { Err(UnsupportedShape { name, value, expected }) }
        };
        let group = config.group_size();
        // Past this a block of the norm, or of the rotation, would have more than 1024 threads.
        let widest = |width: usize| width.is_multiple_of(8) && width <= 8192;
        let num_projected = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
        check([32, 64, 128].contains(&config.head_dim), "head_dim", config.head_dim, "32, 64 or 128")?;
        check((1..=16).contains(&group), "query heads per key-value head", group, "1 to 16")?;
        check(block_size > 0 && block_size.is_multiple_of(16), "block_size", block_size, "a multiple of 16")?;
        check(widest(config.hidden_size), "hidden_size", config.hidden_size, "a multiple of 8 up to 8192")?;
        let features = config.intermediate_size;
        check(features.is_multiple_of(8), "intermediate_size", features, "a multiple of 8")?;
        check(num_projected <= 16 * 1024, "width of q, k and v", num_projected, "at most 16384")?;
        check(config.vocab_size <= 1 << 19, "vocab_size", config.vocab_size, "at most 524288")?;
        check(!config.output_bias && !config.mlp_bias, "biases beside those of q, k and v", 1, "none")?;
        check(config.family != Family::Qwen3 || !config.qkv_bias, "biases beside q and k norms", 1, "none")?;
        Ok(Self {
            attention: AttentionShape { head_dim: config.head_dim, group, block_size },
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            vocab_size: config.vocab_size,
            logits,
        })
    }

    /// All that a generator launches.
    #[must_use]
    pub fn programs(&self) -> [Program; 5] {
        [
            Program::Elementwise,
            Program::Rope { head_dim: self.attention.head_dim },
            Program::Attention(self.attention),
            Program::Sampling(self.logits),
            Program::Step,
        ]
    }
}

/// A header that every source includes.
pub(super) const HEADER: (&str, &str) = ("prelude.cuh", include_str!("../../../kernels/cuda/prelude.cuh"));

impl Program {
    /// Of the source, without its ending.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Attention(_) => "attention",
            Self::Elementwise => "elementwise",
            Self::Rope { .. } => "rope",
            Self::Sampling(_) => "sampling",
            Self::Step => "step",
            Self::Training(_) => "training",
        }
    }

    pub(super) fn source(&self) -> &'static str {
        match self {
            Self::Attention(_) => include_str!("../../../kernels/cuda/attention.cu"),
            Self::Elementwise => include_str!("../../../kernels/cuda/elementwise.cu"),
            Self::Rope { .. } => include_str!("../../../kernels/cuda/rope.cu"),
            Self::Sampling(_) => include_str!("../../../kernels/cuda/sampling.cu"),
            Self::Step => include_str!("../../../kernels/cuda/step.cu"),
            Self::Training(_) => include_str!("../../../kernels/cuda/training.cu"),
        }
    }

    /// Names that the source declares with `KERNEL`.
    pub(super) fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.source().lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split(',').next())
    }

    pub(super) fn macros(&self) -> Vec<(&'static str, usize)> {
        match *self {
            Self::Attention(AttentionShape { head_dim, group, block_size }) => {
                vec![("HEAD_DIM", head_dim), ("GROUP", group), ("BLOCK_SIZE", block_size)]
            }
            Self::Rope { head_dim } => vec![("HEAD_DIM", head_dim)],
            Self::Sampling(logits) => vec![("LOGITS_BF16", usize::from(logits == LogitKind::Bf16))],
            Self::Training(element) => vec![("ELEMENT_BF16", usize::from(element == Element::Bf16))],
            Self::Elementwise | Self::Step => Vec::new(),
        }
    }
}

/// Source and macros.
impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        self.macros().iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shapes(changes: serde_json::Value) -> Result<KernelShapes, UnsupportedShape> {
        let mut raw = json!({"model_type": "llama", "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
        for (key, value) in changes.as_object().unwrap() {
            raw[key] = value.clone();
        }
        let config = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
        KernelShapes::of(&config, 16, LogitKind::Fp32)
    }

    #[test]
    fn models_that_the_kernels_cannot_serve_are_refused_by_name() {
        for (changes, name) in [
            (json!({"head_dim": 80}), "head_dim"),
            (json!({"num_attention_heads": 34}), "query heads per key-value head"),
            (json!({"hidden_size": 252, "head_dim": 64}), "hidden_size"),
            (json!({"hidden_size": 16384, "head_dim": 64}), "hidden_size"),
            (json!({"intermediate_size": 4}), "intermediate_size"),
            (json!({"num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 64}), "width of q, k and v"),
            (json!({"vocab_size": 600_000}), "vocab_size"),
            (json!({"mlp_bias": true}), "biases beside those of q, k and v"),
        ] {
            let mut changes = changes;
            if name == "query heads per key-value head" {
                changes["head_dim"] = json!(32);
            }
            assert_eq!(shapes(changes).unwrap_err().name, name);
        }
    }

    #[test]
    fn programs_are_named_with_their_macros() {
        let programs = shapes(json!({})).unwrap().programs().map(|program| program.to_string());
        assert_eq!(
            programs,
            [
                "elementwise",
                "rope HEAD_DIM=64",
                "attention HEAD_DIM=64 GROUP=2 BLOCK_SIZE=16",
                "sampling LOGITS_BF16=0",
                "step"
            ]
        );
    }
}
