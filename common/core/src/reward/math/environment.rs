//! Formulas in a text: `$..$`, `$$..$$`, `\(..\)` and `\[..\]`.

use super::plain;

/// The last ones that are kept.
const MAX_ENVIRONMENTS: usize = 32;
/// What joins two formulas to one answer.
const JOINTS: &[&str] = &[",", "and", ", and", ",and", "or", ", or", ",or"];

#[derive(Debug, Clone, Copy)]
pub(super) struct Environment<'a> {
    pub(super) start: usize,
    content: &'a str,
    /// Behind the closing delimiter.
    pub(super) end: usize,
}

/// The formulas of `text` in order, the last ones if there are many. They hold none another; inline ones no new line.
pub(super) fn all(text: &str) -> Vec<Environment<'_>> {
    let bytes = text.as_bytes();
    let mut found = std::collections::VecDeque::with_capacity(MAX_ENVIRONMENTS);
    let mut open: Option<(usize, &str)> = None;
    let mut at = 0;
    while at < bytes.len() {
        let delimiter = match (bytes[at], bytes.get(at + 1)) {
            (b'\\', Some(b'(' | b')' | b'[' | b']')) => &text[at..at + 2],
            (b'\\', Some(_)) => {
                at += 2;
                continue;
            }
            (b'$', Some(b'$')) => "$$",
            (b'$', _) => "$",
            (b'\n', _) => "\n",
            _ => {
                at += 1;
                continue;
            }
        };
        open = match open {
            Some((start, opened)) if closing(opened) == delimiter => {
                let end = at + delimiter.len();
                if found.len() == MAX_ENVIRONMENTS {
                    found.pop_front();
                }
                found.push_back(Environment { start, content: &text[start + opened.len()..at], end });
                None
            }
            Some((start, opened)) if delimiter == "\n" && matches!(opened, "\\[" | "$$") => Some((start, opened)),
            _ if matches!(delimiter, "\\)" | "\\]" | "\n") => None,
            _ => Some((at, delimiter)),
        };
        at += delimiter.len();
    }
    found.into()
}

fn closing(opening: &str) -> &str {
    match opening {
        "\\(" => "\\)",
        "\\[" => "\\]",
        same => same,
    }
}

/// The last formula, with those before it that are of the same list.
pub(super) fn joined_to(text: &str, environments: &[Environment<'_>]) -> Option<String> {
    let last = environments.len().checked_sub(1)?;
    let is_joint = |at: usize| JOINTS.contains(&text[environments[at - 1].end..environments[at].start].trim());
    let first = (1..=last).rev().take_while(|at| is_joint(*at)).last().map_or(last, |at| at - 1);
    Some(joined(text, &environments[first..]))
}

/// The first formula, with those behind it that are of the same list.
pub(super) fn joined_from(text: &str, environments: &[Environment<'_>]) -> String {
    let is_joint = |pair: &&[Environment<'_>]| JOINTS.contains(&text[pair[0].end..pair[1].start].trim());
    let num_joined = 1 + environments.windows(2).take_while(is_joint).count();
    joined(text, &environments[..num_joined.min(environments.len())])
}

fn joined(text: &str, environments: &[Environment<'_>]) -> String {
    let contents: Vec<&str> = environments.iter().map(|environment| environment.content.trim()).collect();
    let after = environments.last().map_or("", |last| plain::percent_after(&text[last.end..]));
    contents.join(",") + after
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: &[&str]) {
        let contents: Vec<&str> = all(text).iter().map(|found| found.content).collect();
        assert_eq!(contents, expect, "{text:?}");
    }

    #[test]
    fn every_kind_of_delimiter_is_found() {
        check(r"a $x$ b \(y\) c \[z\] d $$w$$", &["x", "y", "z", "w"]);
        check("$$\na\n$$ and \\[\nb\n\\]", &["\na\n", "\nb\n"]);
        check("$\na\n$ and \\(\nb\n\\)", &[]);
        check(r"costs \$5 and $x$", &["x"]);
        check("$5", &[]);
        check(r"\( \( \(x\)", &["x"]);
    }

    #[test]
    fn lists_of_formulas_are_joined() {
        let text = "so $1$ and $2$, and $3$ it is";
        assert_eq!(joined_to(text, &all(text)).unwrap(), "1,2,3");
        let text = "$0$ gives $28$ percent";
        assert_eq!(joined_to(text, &all(text)).unwrap(), "28%");
    }
}
