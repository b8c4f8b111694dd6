//! Finds stop strings in a completion, token by token.

use aha_core::ids::TokenId;
use aha_core::tokenizer::{SpecialTokens, TokenStream, Tokenizer, TokenizerError};

/// The end of one completion's text, as far as a stop string can reach back.
#[derive(Debug)]
pub(crate) struct StopFinder {
    stream: TokenStream,
    tail: String,
}

impl Default for StopFinder {
    fn default() -> Self {
        // Special tokens are not part of a completion's text, so they complete no string.
        Self { stream: TokenStream::new(SpecialTokens::Skip), tail: String::new() }
    }
}

impl StopFinder {
    /// Whether `token` completes one of `stops`. What an earlier token completed does not count again.
    ///
    /// # Errors
    /// A failing decoder.
    pub(crate) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        stops: &[String],
        token: TokenId,
    ) -> Result<bool, TokenizerError> {
        let new = self.stream.push(tokenizer, token)?;
        let seen = self.tail.len();
        self.tail.push_str(&new);
        let found = stops.iter().any(|stop| {
            // A match that ends in the new text begins at most this far before it.
            self.tail[char_start(&self.tail, (seen + 1).saturating_sub(stop.len()))..].contains(stop)
        });
        let reach = stops.iter().map(String::len).max().unwrap_or(1) - 1;
        let keep = char_start(&self.tail, self.tail.len().saturating_sub(reach));
        self.tail.drain(..keep);
        Ok(found)
    }
}

/// The first start of a character at or after byte `index`.
fn char_start(text: &str, index: usize) -> usize {
    (index..text.len()).find(|&index| text.is_char_boundary(index)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::byte_tokenizer;

    /// Pushes `text` byte by byte and returns after how many bytes each match is found.
    fn matches(stops: &[&str], text: &str) -> Vec<usize> {
        let (tokenizer, stops) = (byte_tokenizer(), stops.iter().map(|&stop| stop.to_owned()).collect::<Vec<_>>());
        let mut finder = StopFinder::default();
        let found = |(index, byte): (usize, u8)| {
            finder.push(&tokenizer, &stops, TokenId::from(byte)).unwrap().then_some(index + 1)
        };
        text.bytes().enumerate().filter_map(found).collect()
    }

    #[test]
    fn the_completing_token_is_found_and_no_later_one() {
        assert_eq!(matches(&["</a>"], "x</a>yz</a"), [5]);
        assert_eq!(matches(&["ab", "abcdef"], "abcdefab"), [2, 6, 8]);
        assert_eq!(matches(&["aa"], "aaa"), [2, 3]);
        assert_eq!(matches(&["x"], ""), [0_usize; 0]);
    }

    #[test]
    fn characters_of_several_bytes_are_whole_or_not_there() {
        assert_eq!(matches(&["é!"], "aé!"), [4]);
        assert_eq!(matches(&["é"], "aé"), [3]);
        // 0xA9 ends this character too, but it is another one.
        assert_eq!(matches(&["é"], "a\u{129}"), [0_usize; 0]);
        assert_eq!(matches(&["日本", "本!"], "日本!本!"), [6, 7, 11]);
    }
}
