//! Formulas: tokens in, a [`Quantity`] out, by recursive descent of bounded depth.

use super::quantity::Quantity;
use super::token::Token;

/// Of brackets, fractions, powers and signs in one another.
const MAX_DEPTH: usize = 32;
/// Multiplications that all factorials of a formula may take.
const MAX_FACTORIAL_WORK: u32 = 2_500;

/// Functions by their usual letters; what else stands before a parenthesis is multiplied.
const FUNCTION_LETTERS: &[char] = &['f', 'g', 'h', 'F', 'G', 'H'];

/// What the formula is, if all tokens are one.
pub(super) fn quantity(tokens: &[Token]) -> Option<Quantity> {
    let mut parser = Parser { tokens, at: 0, taken: 0, depth: 0, in_bars: false, work: MAX_FACTORIAL_WORK };
    let quantity = parser.sum()?;
    (parser.at == tokens.len()).then_some(quantity)
}

pub(super) struct Parser<'t> {
    pub(super) tokens: &'t [Token],
    pub(super) at: usize,
    /// Digits of the next token that are an argument already: `\frac13` is a third.
    taken: usize,
    depth: usize,
    /// A bar ends what is read, rather than to begin an absolute value.
    in_bars: bool,
    work: u32,
}

impl<'t> Parser<'t> {
    pub(super) fn peek(&self) -> Option<&'t Token> {
        self.tokens.get(self.at)
    }

    pub(super) fn is_sign(&self, sign: char) -> bool {
        self.peek() == Some(&Token::Sign(sign))
    }

    pub(super) fn takes(&mut self, sign: char) -> bool {
        let is_next = self.is_sign(sign);
        self.at += usize::from(is_next);
        is_next
    }

    pub(super) fn is_command(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Command(command)) if command == name)
    }

    pub(super) fn takes_command(&mut self, name: &str) -> bool {
        let is_next = self.is_command(name);
        self.at += usize::from(is_next);
        is_next
    }

    /// What `parse` gives one level deeper.
    pub(super) fn deeper(&mut self, parse: impl FnOnce(&mut Self) -> Option<Quantity>) -> Option<Quantity> {
        self.depth += 1;
        let parsed = if self.depth > MAX_DEPTH { None } else { parse(self) };
        self.depth -= 1;
        parsed
    }

    pub(super) fn sum(&mut self) -> Option<Quantity> {
        self.deeper(|parser| {
            let mut sum = parser.term()?;
            loop {
                if parser.takes('+') {
                    sum = sum.plus(&parser.term()?);
                } else if parser.takes('-') {
                    sum = sum.minus(&parser.term()?);
                } else {
                    return Some(sum);
                }
            }
        })
    }

    pub(super) fn term(&mut self) -> Option<Quantity> {
        let mut is_number = matches!(self.peek(), Some(Token::Number { .. }));
        let mut product = self.signed()?;
        loop {
            if self.takes('*') {
                product = product.times(&self.signed()?);
            } else if self.takes('/') || self.takes(':') {
                product = product.over(&self.signed()?);
            } else if self.begins_factor() {
                let follows_number = is_number && matches!(self.tokens.get(self.at - 1), Some(Token::Number { .. }));
                match self.fraction_of_mixed_number(follows_number) {
                    Some(fraction) => product = product.plus(&fraction),
                    // Two numbers side by side are no product.
                    None if matches!(self.peek(), Some(Token::Number { .. })) => return None,
                    None => product = product.times(&self.power()?),
                }
            } else {
                return Some(product);
            }
            is_number = false;
        }
    }

    /// `\frac{3}{4}` or `3/4` after a whole number and below 1.
    fn fraction_of_mixed_number(&mut self, follows_number: bool) -> Option<Quantity> {
        let whole = |at: usize| match self.tokens.get(at) {
            Some(Token::Number { digits, exponent: 0, is_decimal: false }) => digits.parse::<u32>().ok(),
            _ => None,
        };
        if !follows_number || whole(self.at - 1).is_none() {
            return None;
        }
        let is = |at: usize, sign: char| self.tokens.get(at) == Some(&Token::Sign(sign));
        let (numerator, denominator, end) = match self.is_command("frac") {
            true if is(self.at + 1, '{') && is(self.at + 3, '}') && is(self.at + 4, '{') && is(self.at + 6, '}') => {
                (whole(self.at + 2)?, whole(self.at + 5)?, self.at + 7)
            }
            true => return None,
            false if is(self.at + 1, '/') => (whole(self.at)?, whole(self.at + 2)?, self.at + 3),
            false => return None,
        };
        if numerator >= denominator || self.tokens.get(end) == Some(&Token::Sign('^')) {
            return None;
        }
        self.at = end;
        Some(Quantity::integer(numerator).over(&Quantity::integer(denominator)))
    }

    fn signed(&mut self) -> Option<Quantity> {
        let mut is_negative = false;
        while self.is_sign('-') || self.is_sign('+') {
            is_negative ^= self.is_sign('-');
            self.at += 1;
        }
        let power = self.power()?;
        Some(if is_negative { power.negated() } else { power })
    }

    pub(super) fn begins_factor(&self) -> bool {
        match self.peek() {
            Some(Token::Sign(sign)) => matches!(sign, '(' | '[' | '{') || (*sign == '|' && !self.in_bars),
            Some(Token::Command(name)) => !matches!(name.as_str(), "}" | "rfloor" | "rceil" | "\\" | "begin" | "end"),
            Some(_) => true,
            None => false,
        }
    }

    /// An atom with its factorials and its exponent.
    pub(super) fn power(&mut self) -> Option<Quantity> {
        let mut base = self.atom()?;
        loop {
            if self.takes('!') {
                base = self.factorial(&base);
            } else if self.takes('%') {
                base = base.over(&Quantity::integer(100));
            } else if self.is_sign('^') {
                let exponent = self.exponent()?;
                return Some(base.pow(&exponent));
            } else {
                return Some(base);
            }
        }
    }

    pub(super) fn exponent(&mut self) -> Option<Quantity> {
        self.at += 1;
        let is_negative = self.takes('-');
        // Without braces, `2^3^2` is two to the ninth.
        let exponent = self.deeper(|parser| if parser.is_sign('{') { parser.group('{') } else { parser.power() })?;
        Some(if is_negative { exponent.negated() } else { exponent })
    }

    pub(super) fn factorial(&mut self, of: &Quantity) -> Quantity {
        let Some(count) = of.as_integer().and_then(|count| u32::try_from(count).ok()).filter(|n| *n <= self.work)
        else {
            return Quantity::opaque("!", of);
        };
        self.work -= count;
        (2..=count).fold(Quantity::integer(1), |product, factor| product.times(&Quantity::integer(factor)))
    }

    fn atom(&mut self) -> Option<Quantity> {
        match self.peek()? {
            Token::Number { .. } => self.number(),
            Token::Letter(letter) => {
                let letter = *letter;
                self.at += 1;
                self.letter(letter)
            }
            Token::Word(word) => {
                let word = word.clone();
                self.at += 1;
                let (last, others) = word.split_at_checked(word.len() - 1).map(|(others, last)| (last, others))?;
                let others =
                    others.chars().fold(Quantity::integer(1), |product, letter| product.times(&symbol(letter)));
                Some(others.times(&self.letter(last.chars().next()?)?))
            }
            Token::Text(text) => {
                let symbol = Quantity::symbol(text);
                self.at += 1;
                Some(symbol)
            }
            Token::Sign(open @ ('(' | '[' | '{')) => self.group(*open),
            Token::Sign('|') if !self.in_bars => self.absolute(),
            Token::Sign(_) => None,
            Token::Command(name) => {
                let name = name.clone();
                self.at += 1;
                self.command(&name)
            }
        }
    }

    fn number(&mut self) -> Option<Quantity> {
        let Some(Token::Number { digits, exponent, .. }) = self.peek() else { return None };
        let number = Quantity::decimal(&digits[self.taken..], *exponent);
        let name = format!("{digits}e{exponent}");
        (self.at, self.taken) = (self.at + 1, 0);
        // Digits in another base are a name.
        if self.is_sign('_') { self.subscripted(&name) } else { Some(number) }
    }

    fn letter(&mut self, letter: char) -> Option<Quantity> {
        let is_argument = self.is_sign('(')
            && (FUNCTION_LETTERS.contains(&letter)
                || matches!(self.tokens.get(self.at + 1..self.at + 3), Some([Token::Number { .. }, Token::Sign(')')])));
        if is_argument {
            let argument = self.group('(')?;
            return Some(Quantity::opaque(&format!("{letter}()"), &argument));
        }
        if self.is_sign('_') || self.is_sign('\'') || self.is_command("prime") {
            return self.subscripted(&letter.to_string());
        }
        Some(symbol(letter))
    }

    /// A name with what stands below and behind it, which is read as text.
    pub(super) fn subscripted(&mut self, name: &str) -> Option<Quantity> {
        let mut name = name.to_owned();
        loop {
            if self.takes('\'') || self.takes_command("prime") {
                name.push('\'');
            } else if self.takes('_') {
                let inner = if self.is_sign('{') { self.braced()? } else { self.one()? };
                name.push('_');
                inner.iter().for_each(|token| name.push_str(&spelled(token)));
            } else {
                return Some(Quantity::symbol(&name));
            }
        }
    }

    pub(super) fn one(&mut self) -> Option<&'t [Token]> {
        self.at += 1;
        self.tokens.get(self.at - 1..self.at)
    }

    /// The tokens of a group in braces.
    pub(super) fn braced(&mut self) -> Option<&'t [Token]> {
        let start = self.at + 1;
        let mut depth = 0_usize;
        for (at, token) in self.tokens.iter().enumerate().skip(self.at) {
            match token {
                Token::Sign('{') => depth += 1,
                Token::Sign('}') => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                self.at = at + 1;
                return self.tokens.get(start..at);
            }
        }
        None
    }

    pub(super) fn group(&mut self, open: char) -> Option<Quantity> {
        self.at += 1;
        let in_bars = std::mem::replace(&mut self.in_bars, false);
        let inner = self.sum()?;
        self.in_bars = in_bars;
        let is_closed = match open {
            '(' => self.takes(')'),
            '[' => self.takes(']'),
            _ => self.takes('}'),
        };
        is_closed.then_some(inner)
    }

    fn absolute(&mut self) -> Option<Quantity> {
        self.at += 1;
        self.in_bars = true;
        let inner = self.sum()?;
        self.in_bars = false;
        self.takes('|').then(|| inner.absolute())
    }

    /// What a command takes: a group, or a single digit or symbol.
    pub(super) fn argument(&mut self) -> Option<Quantity> {
        let Some(Token::Number { digits, exponent: 0, is_decimal: false }) = self.peek() else {
            return self.atom_within();
        };
        let digit = Quantity::decimal(digits.get(self.taken..=self.taken)?, 0);
        self.taken += 1;
        if self.taken == digits.len() {
            (self.at, self.taken) = (self.at + 1, 0);
        }
        Some(digit)
    }

    pub(super) fn atom_within(&mut self) -> Option<Quantity> {
        self.deeper(Self::atom)
    }
}

fn symbol(letter: char) -> Quantity {
    match letter {
        'e' => Quantity::transcendental("e", std::f64::consts::E),
        'i' => Quantity::imaginary_unit(),
        _ => Quantity::symbol(letter.encode_utf8(&mut [0; 4])),
    }
}

/// A token as part of a name.
pub(super) fn spelled(token: &Token) -> String {
    match token {
        Token::Number { digits, exponent: 0, .. } => digits.clone(),
        Token::Number { digits, exponent, .. } => format!("{digits}e{exponent}"),
        Token::Letter(letter) | Token::Sign(letter) => letter.to_string(),
        Token::Word(word) | Token::Text(word) => word.clone(),
        Token::Command(name) => format!("\\{name}"),
    }
}
