//! Commands in formulas: fractions, roots, functions, and what stands over all of a term.

use super::function::{self, Function};
use super::parser::{Parser, spelled};
use super::quantity::Quantity;
use super::token::Token;

/// Letters and commands that stand over all of a term.
const OPERATORS: &[&str] = &["sum", "prod", "int", "lim", "oint", "iint", "max", "min", "gcd", "lcm", "operatorname"];

impl Parser<'_> {
    /// What the command `name`, which was just taken, and its arguments are.
    pub(super) fn command(&mut self, name: &str) -> Option<Quantity> {
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
            command @ ("overline" | "bar" | "hat" | "dot" | "ddot" | "tilde" | "underline") => {
                let start = self.at - 1;
                let inner = self.atom_within()?;
                let name: String = self.tokens[start..self.at].iter().map(spelled).collect();
                if self.is_sign('_') { self.subscripted(&name) } else { Some(Quantity::opaque(command, &inner)) }
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
        let body = self.deeper(Self::term)?;
        Some(Quantity::opaque(&name, &body))
    }

    fn call(&mut self, function: Function) -> Option<Quantity> {
        let base = if function == Function::Log && self.takes('_') { Some(self.argument()?) } else { None };
        let exponent = if self.is_sign('^') { Some(self.exponent()?) } else { None };
        let argument = self.deeper(Self::call_argument)?;
        let is_inverse = exponent.is_some_and(|exponent| exponent.as_integer() == Some(-1));
        match (exponent, function.inverse()) {
            (Some(_), Some(inverse)) if is_inverse => Some(inverse.of(&argument, None)),
            (Some(exponent), _) => Some(function.of(&argument, base).pow(&exponent)),
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
