//! Answers as mathematical objects: tokens in, a [`Value`] out.

use super::parser;
use super::quantity::Quantity;
use super::statement::item;
use super::token::Token;

/// Of tuples and sets in one another.
const MAX_DEPTH: usize = 6;
/// Elements of a list or set; comparing two takes the square of it.
const MAX_ITEMS: usize = 128;

/// Units of more than one letter, which a number keeps its value without.
const UNITS: &[&str] = &[
    "cm", "mm", "km", "ft", "inch", "inches", "foot", "feet", "yard", "yards", "mile", "miles", "meter", "meters",
    "metre", "metres", "kg", "mg", "gram", "grams", "lb", "lbs", "pound", "pounds", "ounces", "oz", "liter", "liters",
    "litre", "litres", "ml", "gallon", "gallons", "second", "seconds", "sec", "minute", "minutes", "min", "hour",
    "hours", "hr", "hrs", "day", "days", "week", "weeks", "month", "months", "year", "years", "yr", "mph", "kmph",
    "degree", "degrees", "deg", "radians", "unit", "units", "square", "sq", "cubic", "acre", "acres", "dollar",
    "dollars", "cent", "cents", "euro", "euros", "yuan", "rupees", "ways", "people", "students", "points", "digits",
    "edges", "apples", "coins", "tiles", "Hz", "kPa", "Pa", "eV", "ohm", "ohms", "mol", "nm", "per", "th",
];

#[derive(Debug, Clone)]
pub(super) enum Value {
    Scalar(Scalar),
    Tuple(Vec<Value>),
    Interval(Box<Interval>),
    /// Without an order: of braces, of a list, or a union of intervals.
    Set(Vec<Value>),
    /// By rows.
    Matrix(Vec<Vec<Value>>),
    Equation(Box<Equation>),
    Inequality(Inequality),
}

#[derive(Debug, Clone)]
pub(super) struct Scalar {
    pub(super) quantity: Quantity,
    /// Written with a point: it may be rounded.
    pub(super) is_decimal: bool,
    pub(super) is_percent: bool,
    /// The letters, where there is nothing else.
    pub(super) word: Option<String>,
    /// It was said to be text.
    pub(super) is_text: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Interval {
    pub(super) ends: [Value; 2],
    pub(super) is_open: [bool; 2],
}

/// `left = right`, what is between them in a chain left out.
#[derive(Debug, Clone)]
pub(super) struct Equation {
    pub(super) left: String,
    pub(super) right: Value,
    /// Left minus right, of scalars.
    pub(super) difference: Option<Quantity>,
    /// The left is a mere name of the right, as in `x = 5`, `(p, q) = (1, 2)` or `f(x) = 1`.
    pub(super) is_definition: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    NotEqual,
    Less,
    LessOrEqual,
}

/// A chain of inequalities, each a difference of its sides that is below 0.
#[derive(Debug, Clone)]
pub(super) struct Inequality {
    pub(super) links: Vec<(Order, Quantity)>,
    /// The same as an interval, where there is one variable between numbers.
    pub(super) interval: Option<Box<Value>>,
}

/// What all of `tokens` says.
pub(super) fn read(tokens: &[Token]) -> Option<Value> {
    list(tokens, MAX_DEPTH)
}

fn list(tokens: &[Token], depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    let groups = split(tokens, |token| *token == Token::Sign(';'));
    let is_comma = |token: &Token| *token == Token::Sign(',');
    if groups.len() > 1 && split(tokens, is_comma).len() > 1 {
        // `p=5,q=2;p=7,q=2` is two pairs.
        let pairs = groups.into_iter().map(|group| match list(group, depth)? {
            Value::Set(items) => Some(Value::Tuple(items)),
            item => Some(item),
        });
        return Some(set(pairs.collect::<Option<_>>()?));
    }
    let items = split(tokens, |token| matches!(token, Token::Sign(',' | ';')));
    if items.len() > MAX_ITEMS {
        return None;
    }
    let mut values = Vec::with_capacity(items.len());
    for tokens in items {
        if tokens.contains(&Token::Sign('±')) {
            values.extend([item(&signed(tokens, '+'), depth)?, item(&signed(tokens, '-'), depth)?]);
        } else {
            values.push(item(tokens, depth)?);
        }
    }
    Some(set(values))
}

/// One of the two values of what has a `±`.
fn signed(tokens: &[Token], sign: char) -> Vec<Token> {
    tokens.iter().map(|token| if *token == Token::Sign('±') { Token::Sign(sign) } else { token.clone() }).collect()
}

/// A set of one is what is in it.
fn set(mut items: Vec<Value>) -> Value {
    match items.len() {
        1 => items.remove(0),
        _ => Value::Set(items),
    }
}

/// The parts between separators that are in no bracket.
pub(super) fn split(tokens: &[Token], is_separator: impl Fn(&Token) -> bool) -> Vec<&[Token]> {
    let mut parts = Vec::new();
    let (mut start, mut depth) = (0, 0_usize);
    for (at, token) in tokens.iter().enumerate() {
        match nesting(token) {
            1 => depth += 1,
            -1 => depth = depth.saturating_sub(1),
            _ if depth == 0 && is_separator(token) => {
                parts.push(&tokens[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&tokens[start..]);
    parts
}

/// Any bracket may close any other: intervals are half open.
fn nesting(token: &Token) -> i32 {
    match token {
        Token::Sign('(' | '[' | '{') => 1,
        Token::Sign(')' | ']' | '}') => -1,
        Token::Command(name) => match name.as_str() {
            "{" | "begin" | "lfloor" | "lceil" => 1,
            "}" | "end" | "rfloor" | "rceil" => -1,
            _ => 0,
        },
        _ => 0,
    }
}

/// A value: what stands on one side of a relation, without its unit.
pub(super) fn side(tokens: &[Token], depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    let tokens = without_unit(tokens);
    let parts = split(tokens, |token| *token == Token::Sign('∪'));
    if parts.len() > 1 {
        return Some(Value::Set(parts.into_iter().map(|part| side(part, depth)).collect::<Option<_>>()?));
    }
    match bracketed(tokens) {
        Some((Token::Command(open), inner, Token::Command(close))) => match (open.as_str(), close.as_str()) {
            ("begin", "end") => return matrix(inner, depth),
            ("{", "}") => return list(inner, depth),
            _ => {}
        },
        Some((Token::Sign('{'), inner, Token::Sign('}'))) => return list(inner, depth),
        Some((Token::Sign(open @ ('(' | '[')), inner, Token::Sign(close @ (')' | ']')))) => {
            let items = split(inner, |token| matches!(token, Token::Sign(',' | ';')));
            if let ([low, high], true) = (items.as_slice(), *open == '[' || *close == ']') {
                let ends = [item(low, depth)?, item(high, depth)?];
                return Some(Value::Interval(Box::new(Interval { ends, is_open: [*open == '(', *close == ')'] })));
            }
            if (2..=MAX_ITEMS).contains(&items.len()) {
                return Some(Value::Tuple(items.into_iter().map(|part| item(part, depth)).collect::<Option<_>>()?));
            }
            // The brackets may have been put round a value of any kind.
            if bracketed(inner).is_some() {
                return side(inner, depth);
            }
        }
        _ => {}
    }
    scalar(tokens).map(Value::Scalar)
}

/// The first token, the inner ones and the last, where the first is closed by the last.
fn bracketed(tokens: &[Token]) -> Option<(&Token, &[Token], &Token)> {
    let [open, inner @ .., close] = tokens else { return None };
    let mut depth = 1;
    for token in inner {
        depth += nesting(token);
        if depth == 0 {
            return None;
        }
    }
    (nesting(open) == 1 && depth == 1 && nesting(close) == -1).then_some((open, inner, close))
}

fn matrix(tokens: &[Token], depth: usize) -> Option<Value> {
    let rows = split(tokens, |token| *token == Token::Command("\\".to_owned()));
    let rows = rows.into_iter().filter(|row| !row.is_empty());
    let cells =
        |row| split(row, |token| *token == Token::Sign('&')).into_iter().map(|cell| side(cell, depth)).collect();
    Some(Value::Matrix(rows.map(cells).collect::<Option<_>>()?))
}

/// Leaves at least one token.
fn without_unit(tokens: &[Token]) -> &[Token] {
    match tokens {
        [rest @ .., last] if !rest.is_empty() && is_unit(last) => without_unit(rest),
        // `cm^2`
        [rest @ .., unit, Token::Sign('^'), Token::Number { .. }] if !rest.is_empty() && is_unit(unit) => {
            without_unit(rest)
        }
        _ => tokens,
    }
}

fn is_unit(token: &Token) -> bool {
    match token {
        Token::Text(_) => true,
        Token::Word(word) => UNITS.contains(&word.as_str()),
        _ => false,
    }
}

fn scalar(tokens: &[Token]) -> Option<Scalar> {
    let (tokens, is_percent) = match tokens {
        [rest @ .., Token::Sign('%')] if !rest.is_empty() => (rest, true),
        _ => (tokens, false),
    };
    let is_decimal = match tokens {
        [Token::Number { is_decimal, .. }] | [Token::Sign('-' | '+'), Token::Number { is_decimal, .. }] => *is_decimal,
        _ => false,
    };
    let letters = |token: &Token| match token {
        Token::Letter(letter) => Some(letter.to_string()),
        Token::Word(word) | Token::Text(word) => Some(word.clone()),
        Token::Sign('(' | ')' | '{' | '}') => Some(String::new()),
        _ => None,
    };
    let word = tokens.iter().map(letters).collect::<Option<String>>().filter(|word| !word.is_empty());
    let is_text = tokens.iter().any(|token| matches!(token, Token::Text(_)));
    let quantity = parser::quantity(tokens)?;
    Some(Scalar { quantity, is_decimal, is_percent, word, is_text })
}
