//! Python's tokens, of those that arithmetic needs.

use super::{EvalError, Ratio};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// `None` where the literal is longer than 128 bits hold.
    Number(Option<Ratio>),
    Plus,
    Minus,
    Star,
    DoubleStar,
    Slash,
    DoubleSlash,
    Open,
    Close,
    End,
}

pub(super) struct Lexer<'a> {
    rest: &'a [u8],
    /// Parentheses that are open.
    depth: usize,
}

impl<'a> Lexer<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { rest: text.as_bytes(), depth: 0 }
    }

    /// How many parentheses are open after the last token.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    pub(super) fn next_token(&mut self) -> Result<Token, EvalError> {
        self.skip_space();
        let Some(&byte) = self.rest.first() else { return Ok(Token::End) };
        if byte.is_ascii_digit() || byte == b'.' {
            return self.number();
        }
        let is_double = self.rest.get(1) == Some(&byte);
        let token = match byte {
            b'+' => Token::Plus,
            b'-' => Token::Minus,
            b'*' if is_double => Token::DoubleStar,
            b'*' => Token::Star,
            b'/' if is_double => Token::DoubleSlash,
            b'/' => Token::Slash,
            b'(' => Token::Open,
            b')' => Token::Close,
            _ => return Err(EvalError::Syntax),
        };
        match token {
            Token::Open => self.depth += 1,
            Token::Close => self.depth = self.depth.checked_sub(1).ok_or(EvalError::Syntax)?,
            _ => {}
        }
        let length = if matches!(token, Token::DoubleStar | Token::DoubleSlash) { 2 } else { 1 };
        self.rest = &self.rest[length..];
        Ok(token)
    }

    /// A line break is space inside parentheses only; outside it ends the expression.
    fn skip_space(&mut self) {
        let is_space =
            |byte: &u8| matches!(byte, b' ' | b'\t' | 0x0c) || (self.depth > 0 && matches!(byte, b'\n' | b'\r'));
        let length = self.rest.iter().take_while(|byte| is_space(byte)).count();
        self.rest = &self.rest[length..];
    }

    /// `digits`, `digits.`, `.digits` or `digits.digits`.
    fn number(&mut self) -> Result<Token, EvalError> {
        let whole = self.digits();
        let is_integer = self.rest.first() != Some(&b'.');
        if is_integer {
            let has_leading_zero = whole.len() > 1 && whole[0] == b'0' && whole.iter().any(|&digit| digit != b'0');
            return if has_leading_zero {
                Err(EvalError::Syntax)
            } else {
                Ok(Token::Number(Ratio::from_decimal(whole, &[])))
            };
        }
        self.rest = &self.rest[1..];
        let fraction = self.digits();
        if whole.is_empty() && fraction.is_empty() {
            return Err(EvalError::Syntax);
        }
        Ok(Token::Number(Ratio::from_decimal(whole, fraction)))
    }

    fn digits(&mut self) -> &'a [u8] {
        let length = self.rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (digits, rest) = self.rest.split_at(length);
        self.rest = rest;
        digits
    }
}
