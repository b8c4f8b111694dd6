//! Numbers in running text.

/// Where a number, a share or a little arithmetic is: without spaces but between thousands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Number {
    pub(super) start: usize,
    end: usize,
}

/// The numbers of `text` in order. Those that are part of a word are none.
pub(super) fn numbers(text: &str) -> impl Iterator<Item = Number> {
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            let start = at + text[at..].find(begins)?;
            at = start + run(&text[start..]);
            let first = text[start..at].trim_start_matches('-');
            if (1..=3).contains(&num_digits(first)) && num_digits(first) == first.len() && !first.starts_with('0') {
                // `1 000`
                while text[at..].starts_with(' ') && num_digits(&text[at + 1..]) == 3 {
                    at += 4;
                }
            }
            let is_part_of_word = text[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            if !is_part_of_word && text[start..at].contains(|c: char| c.is_ascii_digit()) {
                return Some(Number { start, end: at });
            }
        }
    })
}

impl Number {
    /// It is calculated with, and the text ends before the result.
    pub(super) fn is_cut_off(self, text: &str) -> bool {
        text[self.end..].trim_start().strip_prefix('=').is_some_and(|after| after.trim_start().is_empty())
    }

    /// With `.` for a decimal comma, and `%` if that follows.
    pub(super) fn read(self, text: &str) -> String {
        let run = &text[self.start..self.end];
        let number = run.trim_matches(['*', '+', '/', '^', ',', '.', '-'].as_slice());
        let sign = sign_of(run, number);
        format!("{sign}{}{}", with_point(number), percent_after(&text[self.end..]))
    }
}

/// `%` where `after` begins with it or with its name.
pub(super) fn percent_after(after: &str) -> &'static str {
    let after = after.strip_prefix('$').unwrap_or(after);
    let after = super::clip::head(after, 24).trim_start();
    let after = after.strip_prefix('\\').unwrap_or(after);
    let is_percent = after.starts_with('%') || ["percent", "Percent", "pct"].iter().any(|name| after.starts_with(name));
    if is_percent { "%" } else { "" }
}

/// The `\frac{..}{..}` of two plain numbers at `at`, with its sign, and where it ends.
pub(super) fn fraction(text: &str, at: usize) -> Option<(String, usize)> {
    let number = |rest: &str| {
        let inner = rest.strip_prefix('{')?;
        let length = inner.find(|c: char| !matches!(c, '0'..='9' | '.' | ',' | '-'))?;
        inner[length..].starts_with('}').then_some(length + 2)
    };
    let numerator = at + "\\frac".len();
    let denominator = numerator + number(&text[numerator..])?;
    let end = denominator + number(&text[denominator..])?;
    let sign = if text[..at].ends_with('-') { "-" } else { "" };
    Some((format!("{sign}{}", &text[at..end]), end))
}

fn begins(c: char) -> bool {
    c.is_ascii_digit() || matches!(c, '-' | '.')
}

/// The bytes of digits, points and operators from the start.
fn run(text: &str) -> usize {
    text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | ',' | '/' | '*' | '+' | '-' | '^')))
        .unwrap_or(text.len())
}

/// That the text begins with; it stops counting at 4.
fn num_digits(text: &str) -> usize {
    text.bytes().take(4).take_while(u8::is_ascii_digit).count()
}

/// The sign or the point that trimming took from the front.
fn sign_of(run: &str, number: &str) -> &'static str {
    let before = run.find(number).map_or("", |at| &run[..at]);
    match (before.ends_with('.'), before.trim_end_matches('.').ends_with('-')) {
        (true, true) => "-.",
        (true, false) => ".",
        (false, true) => "-",
        (false, false) => "",
    }
}

/// `1000,99` is a decimal in much of the world; `1,000` is a thousand.
fn with_point(number: &str) -> String {
    match number.split_once(',') {
        Some((whole, fraction))
            if [whole, fraction].iter().all(|part| part.bytes().all(|byte| byte.is_ascii_digit()))
                && (fraction.len() != 3 || whole.starts_with('0') || whole.len() > 3) =>
        {
            format!("{whole}.{fraction}")
        }
        _ => number.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: &[&str]) {
        let found: Vec<String> = numbers(text).map(|number| number.read(text)).collect();
        assert_eq!(found, expect, "{text:?}");
    }

    #[test]
    fn numbers_are_found_with_signs_separators_and_percent() {
        check("-5 and .4, then 1,000.99€.", &["-5", ".4", "1,000.99"]);
        check("1 000 or 12 345 678", &["1 000", "12 345 678"]);
        check("28 percent, 3% and 4 \\%", &["28%", "3%", "4%"]);
        check("2/3 of **10**.", &["2/3", "10"]);
        check("1000,99 but 1,000", &["1000.99", "1,000"]);
        check("$16.20 a piece", &["16.20"]);
    }

    #[test]
    fn words_are_no_numbers() {
        check("AZYUK2A", &[]);
        check("a-b ... x. - -", &[]);
        check("2A", &["2"]);
    }
}
