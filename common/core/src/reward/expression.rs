//! Evaluates arithmetic that a model wrote, the way Python's `eval` would, without running anything.
//!
//! Grammar, precedence and literals are Python's, for the characters `0-9 + - * / ( ) .` and white space: `/` divides
//! truly, `//` floors, `**` binds tighter than a sign to its left and groups to the right, `07` is no number, `2(3)`
//! is no product. Numbers are exact fractions of 128-bit integers. It differs from Python where
//! - a double would have been rounded on the way (`1/49*49//1` is 1 here, 0 there),
//! - a number needs more than 128 bits (`10**50//10**49`) or a power has a fractional exponent: no value here.

mod lexer;
mod ratio;

use lexer::{Lexer, Token};
pub(super) use ratio::Ratio;

/// Python's own limit on nested parentheses.
const MAX_DEPTH: usize = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EvalError {
    /// Not an expression, or one that Python refuses at run time for its types, as the call `2(3)`.
    Syntax,
    /// Division by zero, or a value that is not an exact fraction within bounds.
    Arithmetic,
}

/// The value of `text`. More than `max_operations` operations have no value, which bounds the time that long numbers
/// take; a mistake in the syntax is found all the same.
pub(super) fn evaluate(text: &str, max_operations: usize) -> Result<Ratio, EvalError> {
    let mut parser = Parser { lexer: Lexer::new(text), next: Token::End, operations_left: max_operations };
    parser.advance()?;
    let value = parser.sum()?;
    if parser.next != Token::End {
        return Err(EvalError::Syntax);
    }
    value.ok_or(EvalError::Arithmetic)
}

/// `None` is an arithmetic error: it spreads to the end, so that a later mistake in the syntax still shows.
type Value = Option<Ratio>;

struct Parser<'a> {
    lexer: Lexer<'a>,
    next: Token,
    operations_left: usize,
}

impl Parser<'_> {
    /// `product (("+" | "-") product)*`
    fn sum(&mut self) -> Result<Value, EvalError> {
        let mut value = self.product()?;
        loop {
            let operation = match self.next {
                Token::Plus => Ratio::checked_add,
                Token::Minus => Ratio::checked_sub,
                _ => return Ok(value),
            };
            self.advance()?;
            let right = self.product()?;
            value = self.apply(operation, value, right);
        }
    }

    /// `factor (("*" | "/" | "//") factor)*`
    fn product(&mut self) -> Result<Value, EvalError> {
        let mut value = self.factor()?;
        loop {
            let operation = match self.next {
                Token::Star => Ratio::checked_mul,
                Token::Slash => Ratio::checked_div,
                Token::DoubleSlash => Ratio::checked_floor_div,
                _ => return Ok(value),
            };
            self.advance()?;
            let right = self.factor()?;
            value = self.apply(operation, value, right);
        }
    }

    /// `sign* atom ("**" factor)?`, the chain of powers gathered in a list instead of by recursion.
    fn factor(&mut self) -> Result<Value, EvalError> {
        let first = self.signed_atom()?;
        if self.next != Token::DoubleStar {
            return Ok(first.value());
        }
        let mut chain = vec![first];
        while self.next == Token::DoubleStar {
            self.advance()?;
            chain.push(self.signed_atom()?);
        }
        let mut exponent = None;
        while let Some(SignedAtom { is_negative, atom }) = chain.pop() {
            let magnitude = match exponent {
                None => atom,
                Some(exponent) => self.apply(Ratio::checked_pow, atom, exponent),
            };
            exponent = Some(SignedAtom { is_negative, atom: magnitude }.value());
        }
        Ok(exponent.flatten())
    }

    fn signed_atom(&mut self) -> Result<SignedAtom, EvalError> {
        let mut is_negative = false;
        while matches!(self.next, Token::Plus | Token::Minus) {
            is_negative ^= self.next == Token::Minus;
            self.advance()?;
        }
        Ok(SignedAtom { is_negative, atom: self.atom()? })
    }

    /// `number | "(" sum ")"`
    fn atom(&mut self) -> Result<Value, EvalError> {
        let value = match self.next {
            Token::Number(value) => value,
            Token::Open => {
                if self.lexer.depth() > MAX_DEPTH {
                    return Err(EvalError::Syntax);
                }
                self.advance()?;
                let value = self.sum()?;
                if self.next != Token::Close {
                    return Err(EvalError::Syntax);
                }
                value
            }
            _ => return Err(EvalError::Syntax),
        };
        self.advance()?;
        Ok(value)
    }

    fn apply(&mut self, operation: fn(Ratio, Ratio) -> Value, left: Value, right: Value) -> Value {
        self.operations_left = self.operations_left.checked_sub(1)?;
        operation(left?, right?)
    }

    fn advance(&mut self) -> Result<(), EvalError> {
        self.next = self.lexer.next_token()?;
        Ok(())
    }
}

struct SignedAtom {
    is_negative: bool,
    atom: Value,
}

impl SignedAtom {
    fn value(self) -> Value {
        if self.is_negative { self.atom?.checked_neg() } else { self.atom }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Result<f64, EvalError>) {
        assert_eq!(evaluate(text, 100).map(Ratio::to_f64), expect, "{text:?}");
    }

    #[test]
    fn precedence_is_python_s() {
        check("1 + 2 * 3", Ok(7.0));
        check("(1 + 2) * 3", Ok(9.0));
        check("7 - 2 - 1", Ok(4.0));
        check("8 / 4 / 2", Ok(1.0));
        check("-2**2", Ok(-4.0));
        check("2**-1", Ok(0.5));
        check("2**3**2", Ok(512.0));
        check("-2**-2", Ok(-0.25));
        check("2*-3", Ok(-6.0));
        check("--+-1", Ok(-1.0));
        check("-7//2", Ok(-4.0));
        check("7//-2", Ok(-4.0));
        check("-(7//2)", Ok(-3.0));
    }

    #[test]
    fn literals_are_python_s() {
        check("1.5", Ok(1.5));
        check("1.", Ok(1.0));
        check(".5", Ok(0.5));
        check("012.5", Ok(12.5));
        check("00", Ok(0.0));
        check("1.-2", Ok(-1.0));
        for text in ["012", "1..5", "1.5.2", "1 .5", ".", "...", "1. 5", "5 5"] {
            check(text, Err(EvalError::Syntax));
        }
    }

    #[test]
    fn what_python_refuses_is_no_expression() {
        let refused = ["", "()", "2(3)", "(2)(3)", "1+", "*2", "1***2", "1/ /2", "1* *2", "(1", "1)", "1/0)", "1\r+2"];
        for text in refused {
            check(text, Err(EvalError::Syntax));
        }
        check("(1\r+\x0c2\t)", Ok(3.0));
    }

    #[test]
    fn division_is_exact() {
        check("1/3*3", Ok(1.0));
        check("1/49*49//1", Ok(1.0));
        check("1/(1/3*3-1)", Err(EvalError::Arithmetic));
        check("7//0", Err(EvalError::Arithmetic));
        check("0**-1", Err(EvalError::Arithmetic));
        check("0**0", Ok(1.0));
    }

    #[test]
    fn powers_are_bounded() {
        check("2**126", Ok(2.0_f64.powi(126)));
        check("1**99999999999999999999", Ok(1.0));
        check("(-1)**99999999999999999999", Ok(-1.0));
        check("(2/3)**-2", Ok(2.25));
        check("4**(4/2)", Ok(16.0));
        for text in ["9**9**9", "9**9**9**9**9", "2**127", "4**.5", "2**-128"] {
            check(text, Err(EvalError::Arithmetic));
        }
    }

    #[test]
    fn depth_is_python_s() {
        let nested = |depth: usize| format!("{}1{}", "(".repeat(depth), ")".repeat(depth));
        check(&nested(MAX_DEPTH), Ok(1.0));
        check(&nested(MAX_DEPTH + 1), Err(EvalError::Syntax));
    }

    #[test]
    fn too_many_operations_have_no_value_but_keep_their_syntax() {
        assert_eq!(evaluate("1+1+1", 1), Err(EvalError::Arithmetic));
        assert_eq!(evaluate("1+1+1+", 1), Err(EvalError::Syntax));
    }
}
