//! Formulas: tokens in, a [`Quantity`] out, by recursive descent of bounded depth.

use super::function::{self, Function};
use super::quantity::Quantity;
use super::token::Token;

/// Of brackets, fractions, powers and signs in one another.
const MAX_DEPTH: usize = 32;
/// Multiplications that all factorials of a formula may take.
const MAX_FACTORIAL_WORK: u32 = 2_500;

/// Functions by their usual letters; what else stands before a parenthesis is multiplied.
const FUNCTION_LETTERS: &[char] = &['f', 'g', 'h', 'F', 'G', 'H'];

/// Letters and commands that stand over all of a term.
const OPERATORS: &[&str] = &["sum", "prod", "int", "lim", "oint", "iint", "max", "min", "gcd", "lcm", "operatorname"];

/// What the formula is, if all tokens are one.
pub(super) fn quantity(tokens: &[Token]) -> Option<Quantity> {
    let mut parser = Parser { tokens, at: 0, taken: 0, depth: 0, in_bars: false, work: MAX_FACTORIAL_WORK };
    let quantity = parser.sum()?;
    (parser.at == tokens.len()).then_some(quantity)
}

struct Parser<'t> {
    tokens: &'t [Token],
    at: usize,
    /// Digits of the next token that are an argument already: `\frac13` is a third.
    taken: usize,
    depth: usize,
    /// A bar ends what is read, rather than to begin an absolute value.
    in_bars: bool,
    work: u32,
}

impl<'t> Parser<'t> {
    fn peek(&self) -> Option<&'t Token> {
        self.tokens.get(self.at)
    }

    fn is_sign(&self, sign: char) -> bool {
        self.peek() == Some(&Token::Sign(sign))
    }

    fn takes(&mut self, sign: char) -> bool {
        let is_next = self.is_sign(sign);
        self.at += usize::from(is_next);
        is_next
    }

    fn is_command(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Command(command)) if command == name)
    }

    fn takes_command(&mut self, name: &str) -> bool {
        let is_next = self.is_command(name);
        self.at += usize::from(is_next);
        is_next
    }

    fn sum(&mut self) -> Option<Quantity> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let mut sum = self.term()?;
        loop {
            sum = match self.peek() {
                Some(Token::Sign('+')) => {
                    self.at += 1;
                    sum.plus(&self.term()?)
                }
                Some(Token::Sign('-')) => {
                    self.at += 1;
                    sum.minus(&self.term()?)
                }
                _ => break,
            };
        }
        self.depth -= 1;
        Some(sum)
    }

    fn term(&mut self) -> Option<Quantity> {
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

    fn begins_factor(&self) -> bool {
        match self.peek() {
            Some(Token::Sign(sign)) => matches!(sign, '(' | '[' | '{') || (*sign == '|' && !self.in_bars),
            Some(Token::Command(name)) => !matches!(name.as_str(), "}" | "rfloor" | "rceil" | "\\" | "begin" | "end"),
            Some(_) => true,
            None => false,
        }
    }

    /// An atom with its factorials and its exponent.
    fn power(&mut self) -> Option<Quantity> {
        let mut base = self.atom()?;
        loop {
            if self.takes('!') {
                base = self.factorial(&base);
            } else if self.takes('%') {
                base = base.over(&Quantity::integer(100));
            } else if self.is_sign('^') {
                let exponent = self.exponent()?;
                return Some(base.to_the(&exponent));
            } else {
                return Some(base);
            }
        }
    }

    fn exponent(&mut self) -> Option<Quantity> {
        self.at += 1;
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let is_negative = self.takes('-');
        // Without braces, an exponent is right-associative.
        let exponent = if self.is_sign('{') { self.group('{')? } else { self.power()? };
        let exponent = if self.is_sign('^') { exponent.to_the(&self.exponent()?) } else { exponent };
        self.depth -= 1;
        Some(if is_negative { exponent.negated() } else { exponent })
    }

    fn factorial(&mut self, of: &Quantity) -> Quantity {
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
    fn subscripted(&mut self, name: &str) -> Option<Quantity> {
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

    fn one(&mut self) -> Option<&'t [Token]> {
        self.at += 1;
        self.tokens.get(self.at - 1..self.at)
    }

    /// The tokens of a group in braces.
    fn braced(&mut self) -> Option<&'t [Token]> {
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

    fn group(&mut self, open: char) -> Option<Quantity> {
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
    fn argument(&mut self) -> Option<Quantity> {
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

    fn atom_within(&mut self) -> Option<Quantity> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let atom = self.atom();
        self.depth -= 1;
        atom
    }

    fn command(&mut self, name: &str) -> Option<Quantity> {
        if let Some(function) = function::named(name) {
            return self.call(function);
        }
        match name {
            "frac" => self.fraction(),
            "binom" => {
                let (n, k) = (self.argument()?, self.argument()?);
                let below = self.factorial(&k).times(&self.factorial(&n.minus(&k)));
                Some(self.factorial(&n).over(&below))
            }
            "sqrt" => {
                let degree = if self.is_sign('[') { self.group('[')? } else { Quantity::integer(2) };
                Some(self.atom_within()?.root(&degree))
            }
            "lfloor" => self.rounded("rfloor", f64::floor),
            "lceil" => self.rounded("rceil", f64::ceil),
            "{" => {
                let inner = self.sum()?;
                self.takes_command("}").then_some(inner)
            }
            "pi" if !self.is_sign('_') => Some(Quantity::transcendental("pi", std::f64::consts::PI)),
            "overline" | "bar" | "hat" | "dot" | "ddot" | "tilde" | "underline" => {
                let inner = self.atom_within()?;
                Some(Quantity::opaque(name, &inner))
            }
            _ if OPERATORS.contains(&name) => self.operator(name),
            _ if name.bytes().all(|byte| byte.is_ascii_alphabetic()) => self.subscripted(&format!("\\{name}")),
            _ => None,
        }
    }

    fn fraction(&mut self) -> Option<Quantity> {
        let start = self.at;
        let is_differential = |parser: &Self| {
            let is_d = |token: Option<&Token>| match token {
                Some(Token::Letter('d')) => true,
                Some(Token::Word(word)) => word.starts_with('d'),
                Some(Token::Command(name)) => name == "partial",
                _ => false,
            };
            parser.is_sign('{') && is_d(parser.tokens.get(parser.at + 1))
        };
        let numerator_is = is_differential(self);
        let numerator = self.argument()?;
        let denominator_is = is_differential(self);
        let denominator = self.argument()?;
        if numerator_is && denominator_is {
            // A derivative, and no quotient.
            let name: String = self.tokens[start..self.at].iter().map(spelled).collect();
            return Some(Quantity::symbol(&name));
        }
        Some(numerator.over(&denominator))
    }

    fn rounded(&mut self, close: &str, round: fn(f64) -> f64) -> Option<Quantity> {
        let inner = self.sum()?;
        self.takes_command(close).then(|| inner.rounded(close, round))
    }

    /// A sum, an integral or a limit of the rest of the term.
    fn operator(&mut self, name: &str) -> Option<Quantity> {
        let mut name = name.to_owned();
        while self.is_sign('_') || self.is_sign('^') {
            self.at += 1;
            let inner = if self.is_sign('{') { self.braced()? } else { self.one()? };
            name.push('_');
            let limits: String = inner.iter().map(spelled).collect();
            name.push_str(&limits);
        }
        self.depth += 1;
        let body = if self.depth > MAX_DEPTH { None } else { self.term() };
        self.depth -= 1;
        Some(Quantity::opaque(&name, &body?))
    }

    fn call(&mut self, function: Function) -> Option<Quantity> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let base = if function == Function::Log && self.takes('_') { Some(self.argument()?) } else { None };
        let exponent = if self.is_sign('^') { Some(self.exponent()?) } else { None };
        let argument = self.call_argument()?;
        self.depth -= 1;
        let is_inverse = exponent.is_some_and(|exponent| exponent.as_integer() == Some(-1));
        match (exponent, function.inverse()) {
            (Some(_), Some(inverse)) if is_inverse => Some(inverse.of(&argument, None)),
            (Some(exponent), _) => Some(function.of(&argument, base).to_the(&exponent)),
            (None, _) => Some(function.of(&argument, base)),
        }
    }

    /// A group, or the factors up to the next function.
    fn call_argument(&mut self) -> Option<Quantity> {
        if let Some(Token::Sign(open @ ('(' | '{'))) = self.peek() {
            let open = *open;
            return self.group(open);
        }
        let mut product = self.power()?;
        while self.begins_factor() && !self.begins_function() && !self.is_sign('(') {
            product = product.times(&self.power()?);
        }
        Some(product)
    }

    fn begins_function(&self) -> bool {
        matches!(self.peek(), Some(Token::Command(name)) if function::named(name).is_some())
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
