//! What a sequence may be made of.

use aha_core::config::RunConfig;
use aha_core::ids::TokenId;
use aha_nn::model_config::ModelConfig;

#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_prompt_length: usize,
    max_completion_length: usize,
    /// Longest sequence of model and generator.
    pub(super) context: usize,
    vocab_size: usize,
}

impl Limits {
    pub(super) fn new(config: &RunConfig, model: &ModelConfig) -> Self {
        let max_model_len = config.generator.max_model_len;
        let context = if max_model_len == 0 { usize::MAX } else { max_model_len }.min(model.max_position_embeddings);
        Self {
            max_prompt_length: config.data.max_prompt_length,
            max_completion_length: config.rollout.max_completion_length as usize,
            context,
            vocab_size: model.vocab_size,
        }
    }

    /// Whether a prompt of so many tokens can be asked.
    pub(super) fn check(&self, num_tokens: usize) -> Result<(), String> {
        let Self { max_prompt_length, max_completion_length, context, .. } = *self;
        if num_tokens > max_prompt_length {
            return Err(format!(
                "the prompt has {num_tokens} tokens, over data.max_prompt_length {max_prompt_length}: raise it, or say in \
                 data.prompt_too_long what becomes of such rows"
            ));
        }
        if num_tokens + max_completion_length > context {
            return Err(format!(
                "the prompt has {num_tokens} tokens, and with rollout.max_completion_length {max_completion_length} is \
                 longer than the {context} that model and generator allow"
            ));
        }
        Ok(())
    }

    pub(super) fn check_vocabulary(&self, token_ids: &[TokenId]) -> Result<(), String> {
        match token_ids.iter().find(|&&token| token as usize >= self.vocab_size) {
            Some(token) => Err(format!(
                "its tokens go up to {token}, and the model's vocabulary has {}: the tokenizer in model.path belongs to \
                 another model",
                self.vocab_size
            )),
            None => Ok(()),
        }
    }
}
