//! Decoding token by token, for stop strings and for people who watch.

use super::{SpecialTokens, Tokenizer, TokenizerError};
use crate::ids::TokenId;

/// Tokens that may wait for the rest of a character. A character has at most 4 bytes, so more than this many are not
/// a character in the making but noise.
pub(super) const MAX_WAITING: usize = 16;

const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Turns the tokens of one completion into text as they come. Text that is given out stays as it is: a character whose
/// bytes are spread over several tokens is held back until it is whole.
///
/// Everything given out, put together, is what decoding all tokens at once gives, save for a character that begins amid a
/// long run of bytes that are none. The work for one token depends on the few tokens before it, not on the length of
/// the completion.
#[derive(Debug, Clone)]
pub struct TokenStream {
    special_tokens: SpecialTokens,
    /// The last tokens: `num_context` whose text is out, without which decoders would treat the others as the start of
    /// a text, and then those whose text is not out entirely.
    pub(super) window: Vec<TokenId>,
    num_context: usize,
    /// Bytes of the window's text that are out.
    num_given: usize,
}

impl TokenStream {
    #[must_use]
    pub fn new(special_tokens: SpecialTokens) -> Self {
        Self { special_tokens, window: Vec::new(), num_context: 0, num_given: 0 }
    }

    /// The text that `token` completes; often one word, sometimes nothing.
    ///
    /// # Errors
    /// A failing decoder.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: TokenId) -> Result<String, TokenizerError> {
        self.window.push(token);
        let text = tokenizer.decode(&self.window, self.special_tokens)?;
        // Bytes that break off give one U+FFFD at the end, which the next token may turn into a character.
        let whole = text.strip_suffix(REPLACEMENT).unwrap_or(&text);
        let is_noise = self.window.len() - self.num_context > MAX_WAITING;
        let given = if is_noise { &text } else { whole };
        let new = given.get(self.num_given..).unwrap_or_default().to_owned();
        self.num_given = self.num_given.max(given.len());
        if given.len() == text.len() {
            self.window.drain(..self.num_context);
            self.num_context = self.window.len();
            self.num_given = tokenizer.decode(&self.window, self.special_tokens)?.len();
        }
        Ok(new)
    }

    /// What is held back when no more tokens come: U+FFFD for a character that was never completed, or nothing.
    ///
    /// # Errors
    /// A failing decoder.
    pub fn finish(self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let text = tokenizer.decode(&self.window, self.special_tokens)?;
        Ok(text.get(self.num_given..).unwrap_or_default().to_owned())
    }
}
