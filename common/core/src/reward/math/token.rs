//! Answers as tokens: LaTeX and plain text alike, without what only changes how they look.
//!
//! Two answers of the same tokens are equal, whatever they mean.

use super::names;

/// Longest answer that is read.
pub(super) const MAX_BYTES: usize = 1 << 12;
const MAX_TOKENS: usize = 512;
/// Of a number written as `1e5`; beyond it is no number.
const MAX_EXPONENT: i32 = 9999;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// `digits` times ten to the `exponent`.
    Number {
        digits: String,
        exponent: i32,
        is_decimal: bool,
    },
    Letter(char),
    /// Letters in a row that are neither a command nor text.
    Word(String),
    /// What LaTeX has a name for, without the backslash.
    Command(String),
    /// In `\text` and its like; lower case if more than a letter.
    Text(String),
    /// One character; relations and operators of several have a character of their own.
    Sign(char),
}

/// The tokens of `text`, if it is short enough and all of it is tokens.
pub(super) fn tokens(text: &str) -> Option<Vec<Token>> {
    if text.len() > MAX_BYTES {
        return None;
    }
    let mut lexer = Lexer::new(text.trim());
    while !lexer.rest.is_empty() {
        lexer.step()?;
        if lexer.tokens.len() > MAX_TOKENS {
            return None;
        }
    }
    let mut tokens = lexer.tokens;
    while matches!(tokens.last(), Some(Token::Sign('.' | ',' | ';' | ':'))) {
        tokens.pop();
    }
    Some(tokens)
}

struct Lexer<'a> {
    text: &'a str,
    rest: &'a str,
    tokens: Vec<Token>,
    /// Open parentheses, where a comma parts two numbers even before three digits.
    parentheses: usize,
    /// `\\` ends a row; elsewhere, before a letter, it is a backslash that somebody escaped.
    is_matrix: bool,
}

impl<'a> Lexer<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, rest: text, tokens: Vec::new(), parentheses: 0, is_matrix: text.contains("matrix") }
    }

    fn step(&mut self) -> Option<()> {
        let first = self.rest.chars().next()?;
        if first.is_ascii_digit() || (first == '.' && self.rest[1..].starts_with(|c: char| c.is_ascii_digit())) {
            return self.number();
        }
        if first.is_ascii_alphabetic() {
            let end = self.rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(self.rest.len());
            let word = self.take(end);
            return self.word(word);
        }
        if first == '\\' {
            return self.command();
        }
        self.take(first.len_utf8());
        let after = self.rest.chars().next();
        match (first, after) {
            ('*', Some('*')) => self.two_as('^'),
            ('<', Some('=')) => self.two_as('≤'),
            ('>', Some('=')) => self.two_as('≥'),
            ('!' | '=', Some('=')) => self.two_as(if first == '!' { '≠' } else { '=' }),
            ('^', _) if self.skips_degrees() => {}
            (',', _) => self.comma(),
            ('(' | '[', _) => self.open(first),
            (')' | ']', _) => self.close(first),
            ('$' | '"' | '~' | '`' | '°' | '€' | '£' | '¥' | '₹' | '₽', _) => {}
            _ if first.is_whitespace() => {}
            _ if first.is_ascii_punctuation() => self.tokens.push(Token::Sign(first)),
            ('²', _) => self.superscript("2"),
            ('³', _) => self.superscript("3"),
            _ => match (names::sign_of_character(first), names::command_of_character(first)) {
                (Some(sign), _) => self.tokens.push(Token::Sign(sign)),
                (None, Some(command)) => self.push_command(command),
                (None, None) if first.is_alphabetic() => self.tokens.push(Token::Letter(first)),
                (None, None) => return None,
            },
        }
        Some(())
    }

    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        taken
    }

    fn two_as(&mut self, sign: char) {
        self.take(1);
        self.tokens.push(Token::Sign(sign));
    }

    fn superscript(&mut self, digits: &str) {
        self.tokens.push(Token::Sign('^'));
        self.tokens.push(Token::Number { digits: digits.to_owned(), exponent: 0, is_decimal: false });
    }

    fn open(&mut self, sign: char) {
        self.parentheses += 1;
        self.tokens.push(Token::Sign(sign));
    }

    fn close(&mut self, sign: char) {
        self.parentheses = self.parentheses.saturating_sub(1);
        self.tokens.push(Token::Sign(sign));
    }

    /// `, and` is one separator.
    fn comma(&mut self) {
        if !matches!(self.tokens.last(), None | Some(Token::Sign(',' | ';'))) {
            self.tokens.push(Token::Sign(','));
        }
    }

    /// `^\circ` says nothing about a value.
    fn skips_degrees(&mut self) -> bool {
        let after = self.rest.trim_start();
        for degrees in ["\\circ", "{\\circ}", "{ \\circ }", "\\degree", "{\\degree}"] {
            if let Some(rest) = after.strip_prefix(degrees) {
                self.rest = rest;
                return true;
            }
        }
        false
    }

    fn word(&mut self, word: &str) -> Option<()> {
        match word {
            "and" | "or" => self.comma(),
            _ if names::is_percent(word) => self.tokens.push(Token::Sign('%')),
            _ if word.len() == 1 => self.tokens.push(Token::Letter(char::from(word.as_bytes()[0]))),
            _ => {
                let name = names::canonical(word);
                match names::is_command_word(name) {
                    true => self.push_command(name),
                    false => self.tokens.push(Token::Word(word.to_owned())),
                }
            }
        }
        Some(())
    }

    fn push_command(&mut self, name: &str) {
        self.tokens.push(Token::Command(name.to_owned()));
    }

    fn command(&mut self) -> Option<()> {
        self.take(1);
        let after = self.rest.chars().next()?;
        if after == '\\' {
            let is_escaped = !self.is_matrix && self.rest[1..].starts_with(|c: char| c.is_ascii_alphabetic());
            if !is_escaped {
                self.take(1);
                self.push_command("\\");
            }
            return Some(());
        }
        let letters = self.rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(self.rest.len());
        let before = self.rest;
        let name = self.take(if letters == 0 { after.len_utf8() } else { letters });
        if let Some(space) = ["qquad", "quad"].iter().find(|space| name.starts_with(**space)) {
            // Somebody may have forgotten to end it.
            self.rest = &before[space.len()..];
            return Some(());
        }
        let name = names::canonical(name);
        match name {
            _ if name.trim().is_empty() || names::is_skipped(name) => self.skip_delimiter(name),
            _ if names::is_text(name) => return self.text(),
            "begin" | "end" => return self.environment(name),
            _ => match names::sign_of_command(name) {
                Some('(') => self.open('('),
                Some(')') => self.close(')'),
                Some(sign) => self.tokens.push(Token::Sign(sign)),
                None => self.push_command(name),
            },
        }
        Some(())
    }

    /// `\left.` has no delimiter.
    fn skip_delimiter(&mut self, name: &str) {
        if matches!(name, "left" | "right") && self.rest.starts_with('.') {
            self.take(1);
        }
    }

    /// What is in the braces that come next.
    fn group(&mut self) -> Option<&'a str> {
        self.rest = self.rest.trim_start().strip_prefix('{')?;
        let mut depth = 0_usize;
        let end = self.rest.bytes().position(|byte| {
            depth += usize::from(byte == b'{');
            let is_end = byte == b'}' && depth == 0;
            depth -= usize::from(byte == b'}' && !is_end);
            is_end
        })?;
        let content = self.take(end);
        self.take(1);
        Some(content)
    }

    fn text(&mut self) -> Option<()> {
        if !self.rest.trim_start().starts_with('{') {
            return Some(());
        }
        let content = self.group()?.trim_matches(|c: char| c.is_whitespace() || matches!(c, ',' | '.' | '~'));
        let bare = content.trim_matches(['(', ')']);
        let mut letters = bare.chars();
        match (letters.next(), letters.next()) {
            (None, _) => {}
            (Some(letter), None) if letter.is_alphabetic() => self.tokens.push(Token::Letter(letter)),
            _ if content == "and" || content == "or" => self.comma(),
            _ if names::is_percent(content) => self.tokens.push(Token::Sign('%')),
            _ if names::is_command_word(content) => self.push_command(content),
            _ if content.chars().any(char::is_alphabetic) => {
                let words: Vec<String> = bare.split_whitespace().map(str::to_lowercase).collect();
                self.tokens.push(Token::Text(words.join(" ")));
            }
            _ => self.tokens.extend(tokens(content)?),
        }
        Some(())
    }

    fn environment(&mut self, name: &str) -> Option<()> {
        let environment = self.group()?;
        if environment == "array" && name == "begin" {
            self.group()?;
        }
        if environment == "array" || environment.ends_with("matrix") {
            self.push_command(name);
        }
        Some(())
    }

    fn number(&mut self) -> Option<()> {
        let follows_comma = self.text[..self.text.len() - self.rest.len()].ends_with(',');
        let mut digits = self.digits().to_owned();
        let is_grouped = (1..=3).contains(&digits.len()) && !digits.starts_with('0');
        let is_in_list = self.parentheses > 0 || follows_comma || self.begins_list();
        while let Some(separator) = self.separator(!is_in_list).filter(|_| is_grouped) {
            self.take(separator);
            digits.push_str(self.take(3));
        }
        let mut exponent = 0;
        let mut is_decimal = false;
        if self.rest.starts_with('.') && self.rest[1..].starts_with(|c: char| c.is_ascii_digit()) {
            self.take(1);
            let fraction = self.digits();
            is_decimal = true;
            digits.push_str(fraction);
            exponent -= i32::try_from(fraction.len()).ok()?;
        }
        if let Some((length, scale)) = scientific(self.rest) {
            self.take(length);
            exponent += scale?;
        }
        // So that 007, 7 and 7.00 are the same tokens.
        let zeros = digits.len() - digits.trim_end_matches('0').len();
        let behind_point = usize::try_from(-exponent).unwrap_or(0).min(zeros);
        digits.truncate(digits.len() - behind_point);
        exponent += i32::try_from(behind_point).ok()?;
        let digits = digits.trim_start_matches('0');
        self.tokens.push(match digits {
            "" => Token::Number { digits: "0".to_owned(), exponent: 0, is_decimal },
            _ => Token::Number { digits: digits.to_owned(), exponent, is_decimal },
        });
        Some(())
    }

    fn digits(&mut self) -> &'a str {
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        self.take(end)
    }

    /// Whether a comma comes that parts this number from one that is not its next three digits: then all of them do.
    fn begins_list(&self) -> bool {
        let mut groups = self.rest.split(',');
        let is_three = |group: &str| group.len() == 3 && group.bytes().all(|byte| byte.is_ascii_digit());
        let first_other = groups.by_ref().skip(1).find(|group| !is_three(group));
        first_other.is_some_and(|group| {
            let num_digits = group.bytes().take_while(u8::is_ascii_digit).count();
            num_digits > 0 && num_digits != 3
        })
    }

    /// The bytes of what parts thousands from the three digits that come next.
    fn separator(&self, commas_do: bool) -> Option<usize> {
        let trimmed = self.rest.trim_start();
        let in_braces = trimmed.strip_prefix('{').and_then(|rest| rest.trim_start().strip_prefix(','));
        let after = in_braces
            .and_then(|rest| rest.trim_start().strip_prefix('}'))
            .or_else(|| self.rest.strip_prefix(",\\!").map(str::trim_start))
            .or_else(|| self.rest.strip_prefix("\\,"))
            .or_else(|| self.rest.strip_prefix("\\!"))
            .or_else(|| self.rest.strip_prefix(',').filter(|_| commas_do))
            .or_else(|| self.rest.strip_prefix(' ').filter(|_| self.parentheses == 0))?;
        let num_digits = after.bytes().take(4).take_while(u8::is_ascii_digit).count();
        (num_digits == 3).then_some(self.rest.len() - after.len())
    }
}

/// The length and value of an exponent as in `1e-5`; no value where it is too large.
fn scientific(rest: &str) -> Option<(usize, Option<i32>)> {
    let after = rest.strip_prefix(['e', 'E'])?;
    let unsigned = after.strip_prefix(['+', '-']).unwrap_or(after);
    let num_digits = unsigned.bytes().take_while(u8::is_ascii_digit).count();
    let ends = !unsigned[num_digits..].starts_with(|c: char| c.is_ascii_alphabetic());
    let length = rest.len() - unsigned.len() + num_digits;
    let value = after[..length - 1].parse().ok().filter(|scale: &i32| scale.abs() <= MAX_EXPONENT);
    (num_digits > 0 && ends).then_some((length, value))
}
