//! Text to tokens and back, through a model's `tokenizer.json`.

mod stream;

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use stream::TokenStream;

use crate::ids::TokenId;

/// A model's tokenizer and its end-of-sequence tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    eos_token_ids: Vec<TokenId>,
}

/// What becomes of special tokens, such as `<|im_end|>`, in decoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    Keep,
    Skip,
}

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(
        "{model} has no tokenizer.json; copy the tokenizer files of the model it was made from, or convert a slow \
         tokenizer with transformers (AutoTokenizer.from_pretrained(..).save_pretrained(..))",
        model = model.display()
    )]
    Missing { model: PathBuf },
    #[error("cannot read {path}: {reason}", path = path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{path}: eos_token {token:?} is not in the vocabulary of tokenizer.json", path = path.display())]
    UnknownEos { path: PathBuf, token: String },
    #[error("cannot tokenise {text:?}: {reason}")]
    Encode { text: String, reason: String },
    #[error("cannot decode tokens: {0}")]
    Decode(String),
}

impl Tokenizer {
    /// Reads a Hugging Face folder: `tokenizer.json`, and the end-of-sequence tokens of `generation_config.json` and
    /// `tokenizer_config.json` together, or else of `config.json`.
    ///
    /// # Errors
    /// Missing and malformed files, and an end-of-sequence token that the vocabulary lacks.
    pub fn load(model: &Path) -> Result<Self, TokenizerError> {
        let path = model.join("tokenizer.json");
        if !path.is_file() {
            return Err(TokenizerError::Missing { model: model.to_owned() });
        }
        let inner = tokenizers::Tokenizer::from_file(&path)
            .map_err(|error| TokenizerError::Unreadable { path, reason: error.to_string() })?;
        let eos_token_ids = eos_token_ids(model, &inner)?;
        Ok(Self::new(inner, eos_token_ids))
    }

    fn new(mut inner: tokenizers::Tokenizer, eos_token_ids: Vec<TokenId>) -> Self {
        // A tokenizer.json may hold the padding and truncation of somebody's training run.
        inner.with_padding(None);
        inner.with_truncation(None).expect("only truncation parameters can be invalid");
        let highest_added = inner.get_added_tokens_decoder().keys().max().map_or(0, |&id| id as usize + 1);
        let vocab_size = inner.get_vocab_size(true).max(highest_added);
        Self { inner, vocab_size, eos_token_ids }
    }

    /// One more than the highest token id. A model's embedding can have more rows, for round numbers.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The tokens that end a completion, ascending; none for a tokenizer that knows of none.
    #[must_use]
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.eos_token_ids
    }

    /// The tokens of `text`. Special tokens that are written out in it are recognised, and none are added.
    ///
    /// # Errors
    /// Text that the tokenizer's model has no tokens for.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        self.encode_as(text, false)
    }

    /// As [`Self::encode`], with the special tokens that the tokenizer puts around a text, as BOS.
    ///
    /// # Errors
    /// Text that the tokenizer's model has no tokens for.
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        self.encode_as(text, true)
    }

    /// The text of `tokens`. Bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing.
    ///
    /// # Errors
    /// A failing decoder.
    pub fn decode(&self, tokens: &[TokenId], special_tokens: SpecialTokens) -> Result<String, TokenizerError> {
        let skip = special_tokens == SpecialTokens::Skip;
        self.inner.decode(tokens, skip).map_err(|error| TokenizerError::Decode(error.to_string()))
    }

    /// The id of a token by its text, such as `<|im_end|>`.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token)
    }

    fn encode_as(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|error| TokenizerError::Encode {
            text: text.chars().take(80).collect(),
            reason: error.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("eos_token_ids", &self.eos_token_ids)
            .finish_non_exhaustive()
    }
}

fn eos_token_ids(model: &Path, inner: &tokenizers::Tokenizer) -> Result<Vec<TokenId>, TokenizerError> {
    let mut ids = listed_ids(&read_json(&model.join("generation_config.json"))?);
    let path = model.join("tokenizer_config.json");
    let token = read_json(&path)?["eos_token"].take();
    // Written as its text, or as an object with its text as `content`.
    if let Some(token) = token.as_str().or_else(|| token["content"].as_str()) {
        let unknown = || TokenizerError::UnknownEos { path, token: token.to_owned() };
        ids.push(inner.token_to_id(token).ok_or_else(unknown)?);
    }
    if ids.is_empty() {
        ids = listed_ids(&read_json(&model.join("config.json"))?);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// `eos_token_id`: a number, or a list of numbers.
fn listed_ids(config: &Value) -> Vec<TokenId> {
    let id = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
    match &config["eos_token_id"] {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}

/// Null where there is no such file.
fn read_json(path: &Path) -> Result<Value, TokenizerError> {
    let unreadable = |reason: String| TokenizerError::Unreadable { path: path.to_owned(), reason };
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text).map_err(|error| unreadable(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

#[cfg(test)]
mod tests;
