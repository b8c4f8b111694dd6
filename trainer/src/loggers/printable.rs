//! Model output is hostile input to a terminal too.

/// `text` without what would command a terminal instead of showing on it: ANSI escape sequences, control characters
/// other than newline and tab, and the Unicode marks that reorder or hide what is beside them.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(char) = rest.next() {
        match char {
            '\u{1b}' => skip_escape(&mut rest),
            '\u{9b}' => skip_control_sequence(&mut rest),
            // The 8-bit forms of the string introducers.
            '\u{90}' | '\u{98}' | '\u{9d}'..='\u{9f}' => skip_string(&mut rest),
            '\n' | '\t' => shown.push(char),
            char if char.is_control() || is_invisible_mark(char) => {}
            char => shown.push(char),
        }
    }
    shown
}

/// What follows ESC, as ECMA-48 lays it out. An unfinished sequence takes only what belongs to it.
fn skip_escape(rest: &mut std::str::Chars<'_>) {
    match rest.clone().next() {
        Some('[') => {
            rest.next();
            skip_control_sequence(rest);
        }
        // Device control, start of string, operating system command, privacy message, application command.
        Some('P' | 'X' | ']' | '^' | '_') => {
            rest.next();
            skip_string(rest);
        }
        // Intermediates, then one final character.
        Some(' '..='/') => {
            skip_while(rest, |char| matches!(char, ' '..='/'));
            skip_if(rest, |char| matches!(char, '0'..='~'));
        }
        Some('0'..='~') => {
            rest.next();
        }
        _ => {}
    }
}

/// Parameters, intermediates and one final character after `ESC [`.
fn skip_control_sequence(rest: &mut std::str::Chars<'_>) {
    skip_while(rest, |char| matches!(char, '0'..='?'));
    skip_while(rest, |char| matches!(char, ' '..='/'));
    skip_if(rest, |char| matches!(char, '@'..='~'));
}

/// Up to the terminator: BEL, ST (`ESC \`) or the end of the line, so that an open string cannot swallow the rest.
fn skip_string(rest: &mut std::str::Chars<'_>) {
    skip_while(rest, |char| !matches!(char, '\u{7}' | '\u{9c}' | '\u{1b}' | '\n'));
}

fn skip_while(rest: &mut std::str::Chars<'_>, belongs: impl Fn(char) -> bool) {
    while skip_if(rest, &belongs) {}
}

fn skip_if(rest: &mut std::str::Chars<'_>, belongs: impl Fn(char) -> bool) -> bool {
    let skip = rest.clone().next().is_some_and(belongs);
    if skip {
        rest.next();
    }
    skip
}

/// Bidirectional embeddings, overrides and isolates, zero-width characters, the byte order mark.
fn is_invisible_mark(char: char) -> bool {
    matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: &str) {
        assert_eq!(printable(text), expect);
    }

    #[test]
    fn text_stays() {
        check("<think>\n\t2 + 3 × 4 = 14, né 日本 🙂</think>", "<think>\n\t2 + 3 × 4 = 14, né 日本 🙂</think>");
    }

    #[test]
    fn colours_and_cursor_movements_go() {
        check("a\u{1b}[31;1mred\u{1b}[0m\u{1b}[2J\u{1b}[?25lb", "aredb");
        check("a\u{9b}31mb", "ab");
        check("a\u{1b}(Bb\u{1b}cc\u{1b}7d", "abcd");
    }

    #[test]
    fn titles_and_links_go() {
        check("a\u{1b}]0;owned\u{7}b\u{1b}]8;;http://x\u{1b}\\link\u{1b}]8;;\u{1b}\\c", "ablinkc");
        check("a\u{1b}P1$r0m\u{1b}\\b\u{9d}0;x\u{9c}c", "abc");
    }

    #[test]
    fn control_characters_and_reordering_go() {
        check("a\rb\u{8}\u{0}\u{7f}\u{85}c\u{202e}d\u{2066}e\u{200b}f\u{feff}", "abcdef");
    }

    #[test]
    fn unfinished_sequences_do_not_swallow_the_text() {
        check("a\u{1b}", "a");
        check("a\u{1b}[31", "a");
        check("a\u{1b}[é", "aé");
        check("a\u{1b}]0;open\nb", "a\nb");
        check("\u{1b}\u{1b}[31mx", "x");
    }

    #[test]
    fn nothing_printed_can_command_a_terminal() {
        let alphabet = ['\u{1b}', '[', ']', '3', 'm', '\u{7}', '\u{9b}', '\\', 'x', '\n', '\u{202e}', '\u{9c}', 'P'];
        for case in 0..20_000_u64 {
            let seed = aha_core::random::derive_seed(case, &[]);
            let text: String = (0..12).map(|at| alphabet[(seed >> (5 * at)) as usize % alphabet.len()]).collect();
            let shown = printable(&text);
            let harmless = |char: char| char == '\n' || char == '\t' || !(char.is_control() || is_invisible_mark(char));
            assert!(shown.chars().all(harmless), "{text:?} gave {shown:?}");
        }
    }
}
