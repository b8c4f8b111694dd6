//! The ends of a text, cut where a character is.

/// As many bytes of the beginning, or a few less.
pub(super) fn head(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

/// As many bytes of the end, or a few less.
pub(super) fn tail(text: &str, bytes: usize) -> &str {
    let start = (text.len().saturating_sub(bytes)..=text.len()).find(|at| text.is_char_boundary(*at));
    &text[start.unwrap_or(text.len())..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_cut() {
        assert_eq!(["", "", "é", "éx", "éx"], [0, 1, 2, 3, 9].map(|bytes| head("éx", bytes)));
        assert_eq!(["", "", "é", "xé", "xé"], [0, 1, 2, 3, 9].map(|bytes| tail("xé", bytes)));
    }
}
