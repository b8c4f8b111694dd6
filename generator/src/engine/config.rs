//! The engine's sizes and policies, and what fits into them.

use aha_core::config::KvPolicy;
use aha_core::ids::{PolicyVersion, TokenId};

use super::request::Refusal;

/// Sizes and policies of one engine; fixed while it lives.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Most sequences that hold blocks at once.
    pub max_num_seqs: usize,
    /// Most tokens of a step, prefill and decode together; at least `max_num_seqs`.
    pub max_num_batched_tokens: usize,
    /// Longest sequence, prompt and completion together, in tokens.
    pub max_model_len: usize,
    /// Most tokens of a sequence that are sampled in one step, where every sequence of the step decodes. More than 1 only
    /// for a runner that can ([`Ahead`](super::Ahead)).
    pub steps_per_look: usize,
    /// What happens to running sequences when weights change.
    pub kv: KvPolicy,
    /// Whether what one sequence computed serves others that begin with the same tokens.
    pub enable_prefix_caching: bool,
    /// The model's end-of-sequence tokens.
    pub eos_token_ids: Vec<TokenId>,
    /// Of the weights that serve at the start.
    pub version: PolicyVersion,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("generator.{field} is {value}, and must be at least {least}")]
pub struct BadEngineConfig {
    pub field: &'static str,
    pub value: usize,
    pub least: usize,
}

impl EngineConfig {
    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// Names the first size that is too small.
    pub fn check(&self) -> Result<(), BadEngineConfig> {
        // A step takes at least one token of every running sequence, so none of them starves.
        let batched_tokens = ("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs);
        let sizes = [
            ("block_size", self.block_size, 1),
            ("kv_cache_mib (in blocks)", self.num_blocks, 1),
            ("max_num_seqs", self.max_num_seqs, 1),
            batched_tokens,
            ("steps_per_look", self.steps_per_look, 1),
            ("max_model_len", self.max_model_len, 2),
        ];
        match sizes.into_iter().find(|&(_, value, least)| value < least) {
            Some((field, value, least)) => Err(BadEngineConfig { field, value, least }),
            None => Ok(()),
        }
    }

    /// Checks that a sequence can run when it is alone.
    ///
    /// # Errors
    /// If it is longer than the model or the cache allows.
    pub fn check_fits(&self, prompt_tokens: usize, max_tokens: usize) -> Result<(), Refusal> {
        if prompt_tokens + max_tokens > self.max_model_len {
            return Err(Refusal::OverModelLen { prompt_tokens, max_tokens, max_model_len: self.max_model_len });
        }
        // The last token is sampled and never computed.
        let num_tokens = if max_tokens > 0 { prompt_tokens + max_tokens - 1 } else { prompt_tokens };
        let (needed, total) = (num_tokens.div_ceil(self.block_size), self.num_blocks);
        if needed > total {
            return Err(Refusal::OverCache { num_tokens, needed, total });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: EngineConfig = EngineConfig {
        block_size: 4,
        num_blocks: 3,
        max_num_seqs: 2,
        max_num_batched_tokens: 2,
        max_model_len: 20,
        steps_per_look: 1,
        kv: KvPolicy::Keep,
        enable_prefix_caching: true,
        eos_token_ids: Vec::new(),
        version: PolicyVersion(0),
    };

    #[test]
    fn a_size_that_is_too_small_is_named() {
        assert_eq!(CONFIG.check(), Ok(()));
        let error = EngineConfig { max_num_batched_tokens: 1, ..CONFIG }.check().unwrap_err();
        assert_eq!(error.to_string(), "generator.max_num_batched_tokens is 1, and must be at least 2");
        assert_eq!(EngineConfig { block_size: 0, ..CONFIG }.check().unwrap_err().field, "block_size");
    }

    #[test]
    fn a_sequence_fits_up_to_its_last_computed_token() {
        assert_eq!(CONFIG.check_fits(9, 4), Ok(()));
        assert_eq!(CONFIG.check_fits(9, 5), Err(Refusal::OverCache { num_tokens: 13, needed: 4, total: 3 }));
        let refusal = Refusal::OverModelLen { prompt_tokens: 15, max_tokens: 6, max_model_len: 20 };
        assert_eq!(CONFIG.check_fits(15, 6), Err(refusal));
        assert_eq!(CONFIG.check_fits(12, 0), Ok(()));
        assert_eq!(CONFIG.check_fits(13, 0), Err(Refusal::OverCache { num_tokens: 13, needed: 4, total: 3 }));
    }
}
