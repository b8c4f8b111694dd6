//! Python's notion of white space, which the reference implementations strip by.

/// Python's `str.isspace`: Unicode's white space and the four ASCII separators `\x1c` to `\x1f`.
pub(crate) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Python's `str.strip()`.
pub(crate) fn python_strip(text: &str) -> &str {
    text.trim_matches(is_python_space)
}

/// Python's `str.rstrip()`.
pub(crate) fn python_rstrip(text: &str) -> &str {
    text.trim_end_matches(is_python_space)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_and_unicode_spaces_are_stripped() {
        assert_eq!(python_strip("\x1c\u{a0} a b\u{3000}\x1f\n"), "a b");
        assert_eq!(python_rstrip(" a \x1e"), " a");
        // Python counts neither the zero-width space nor the byte order mark.
        assert_eq!(python_strip("\u{200b}a\u{feff}"), "\u{200b}a\u{feff}");
    }
}
