//! `\boxed{..}`, found from the end of a text.

use super::token::MAX_BYTES;

/// Boxes that are looked at, from the last one backwards.
const MAX_BOXES: usize = 64;
/// Between a command and its brace.
const MAX_SPACE: usize = 16;

/// Where a box is and what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Boxed<'a> {
    pub(super) content: &'a str,
    /// Of the backslash.
    start: usize,
    /// Behind the closing brace.
    pub(super) end: usize,
}

/// The content of the last `\boxed{..}` that is closed, else of the last `\fbox{..}`.
pub(super) fn last(text: &str) -> Option<&str> {
    ["\\boxed", "\\fbox"].iter().find_map(|command| backwards(text, command).next()).map(|found| found.content)
}

/// The last box that is not empty, with those just before it that answer together with it, joined by commas, and where the last one ends.
///
/// They do if little stands between them, or not much that has a comma, an `and` or an `or` in it.
pub(super) fn last_together(text: &str) -> Option<(String, usize)> {
    let full = |command| backwards(text, command).filter(|found| !found.content.trim().is_empty());
    let mut boxes = full("\\boxed");
    let last = boxes.next().or_else(|| full("\\fbox").next())?;
    let mut contents = vec![last.content.trim()];
    let mut next = last;
    for found in boxes {
        let Some(between) = text.get(found.end..next.start) else { break };
        let is_near =
            between.len() < 10 || between.len() < 70 && has_separator(between) && found.content != next.content;
        if !is_near || contents.len() == MAX_BOXES {
            break;
        }
        if contents.last() != Some(&found.content.trim()) {
            contents.push(found.content.trim());
        }
        next = found;
    }
    contents.reverse();
    Some((contents.join(","), last.end))
}

fn has_separator(between: &str) -> bool {
    let mut words = between.split(|c: char| !c.is_ascii_alphabetic());
    between.contains([',', ';']) || words.any(|word| matches!(word, "and" | "or"))
}

/// The closed boxes, the last one first.
fn backwards<'a>(text: &'a str, command: &'static str) -> impl Iterator<Item = Boxed<'a>> {
    let mut end = text.len();
    let candidates = std::iter::from_fn(move || {
        end = text[..end].rfind(command)?;
        Some(end)
    });
    candidates.take(MAX_BOXES).filter_map(move |start| content(text, start, start + command.len()))
}

/// The box whose command is from `start` to `end`.
fn content(text: &str, start: usize, end: usize) -> Option<Boxed<'_>> {
    let rest = &text[end..];
    let open = rest.bytes().take(MAX_SPACE).take_while(u8::is_ascii_whitespace).count();
    let inner = rest.get(open..)?.strip_prefix('{')?;
    let mut depth = 0_usize;
    for (at, byte) in inner.bytes().enumerate().take(MAX_BYTES) {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(Boxed { content: &inner[..at], start, end: end + open + 1 + at + 1 }),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Option<&str>) {
        assert_eq!(last_together(text).as_ref().map(|(content, _)| content.as_str()), expect, "{text:?}");
    }

    #[test]
    fn the_last_closed_box_counts() {
        assert_eq!(last(r"\boxed{1} then \boxed{\frac{1}{2}}."), Some(r"\frac{1}{2}"));
        assert_eq!(last(r"\boxed{1} then \boxed{\frac{1}{2}"), Some("1"));
        assert_eq!(last(r"\fbox{2}"), Some("2"));
        assert_eq!(last(r"\fbox{2} \boxed {3}"), Some("3"));
        assert_eq!(last(r"\boxed 3"), None);
        assert_eq!(last(""), None);
    }

    #[test]
    fn boxes_that_answer_together_are_a_list() {
        check(r"\boxed{1} and \boxed{2}", Some("1,2"));
        check(r"\boxed{1} papers and \boxed{2} bins", Some("1,2"));
        check(r"\boxed{1} no no no no no \boxed{2}", Some("2"));
        check(r"\boxed{2}, so it is \boxed{2}, and the \boxed{2}", Some("2"));
    }

    #[test]
    fn of_a_box_in_a_box_the_inner_one_counts() {
        check(r"\boxed{a \boxed{1} b}", Some("1"));
    }
}
