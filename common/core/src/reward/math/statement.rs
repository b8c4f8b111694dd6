//! Values and statements about them: equations, inequalities, membership.

use super::parser;
use super::quantity::Quantity;
use super::token::Token;
use super::value::{Equation, Inequality, Interval, Order, Value, side, split};

fn is_relation(token: &Token) -> bool {
    matches!(token, Token::Sign('=' | '≈' | '≠' | '<' | '>' | '≤' | '≥' | '∈'))
}

/// A value or a statement about one.
pub(super) fn item(tokens: &[Token], depth: usize) -> Option<Value> {
    let sides = split(tokens, is_relation);
    let mut signs = Vec::with_capacity(sides.len());
    let mut end = 0;
    for side in &sides[..sides.len() - 1] {
        end += side.len() + 1;
        let Token::Sign(sign) = tokens[end - 1] else { return None };
        signs.push(sign);
    }
    match signs.as_slice() {
        [] => side(tokens, depth),
        ['∈'] if is_name(sides[0]) => side(sides[1], depth),
        _ if signs.iter().all(|sign| matches!(sign, '=' | '≈')) => {
            // What is said to be about equal is left out where something is said to be equal.
            let last = signs.iter().rposition(|sign| *sign == '=').unwrap_or(signs.len() - 1) + 1;
            equation(sides[0], sides[last], last > 1, depth)
        }
        _ => inequality(&sides, &signs, depth),
    }
}

fn equation(left: &[Token], right: &[Token], is_chain: bool, depth: usize) -> Option<Value> {
    let right_value = side(right, depth)?;
    let difference = match &right_value {
        Value::Scalar(right) => parser::quantity(left).map(|left| left.minus(&right.quantity)),
        _ => None,
    };
    let is_definition = is_chain || is_name(left);
    let left = left.iter().map(parser::spelled).collect();
    Some(Value::Equation(Box::new(Equation { left, right: right_value, difference, is_definition })))
}

/// Whether these tokens name something rather than to calculate it: no number but an index, no sum.
fn is_name(tokens: &[Token]) -> bool {
    let mut before = None;
    let mut in_index = 0_usize;
    for token in tokens {
        match token {
            Token::Sign('{') if before == Some(&Token::Sign('_')) || in_index > 0 => in_index += 1,
            Token::Sign('}') if in_index > 0 => in_index -= 1,
            Token::Number { .. } if in_index == 0 && before != Some(&Token::Sign('_')) => return false,
            Token::Sign('+' | '-' | '*' | '^') if in_index == 0 => return false,
            _ => {}
        }
        before = Some(token);
    }
    !tokens.is_empty()
}

fn inequality(sides: &[&[Token]], signs: &[char], depth: usize) -> Option<Value> {
    let quantities: Vec<Quantity> = sides.iter().map(|side| parser::quantity(side)).collect::<Option<_>>()?;
    let mut links = Vec::with_capacity(signs.len());
    for (sign, pair) in signs.iter().zip(quantities.windows(2)) {
        let (left, right) = (&pair[0], &pair[1]);
        links.push(match sign {
            '<' => (Order::Less, left.minus(right)),
            '>' => (Order::Less, right.minus(left)),
            '≤' => (Order::LessOrEqual, left.minus(right)),
            '≥' => (Order::LessOrEqual, right.minus(left)),
            '≠' => (Order::NotEqual, left.minus(right)),
            _ => return None,
        });
    }
    Some(Value::Inequality(Inequality { links, interval: interval_of(sides, signs, depth).map(Box::new) }))
}

/// `a < x <= b`, `x > a` and the like as intervals.
fn interval_of(sides: &[&[Token]], signs: &[char], depth: usize) -> Option<Value> {
    let infinity = [Token::Command("infty".to_owned())];
    let minus_infinity = [Token::Sign('-'), infinity[0].clone()];
    let is_number = |tokens: &[Token]| parser::quantity(tokens).is_some_and(|quantity| quantity.is_constant());
    let (low, high, signs) = match (sides, signs) {
        ([low, name, high], ['<' | '≤', '<' | '≤']) if is_name(name) => (*low, *high, [signs[0], signs[1]]),
        ([high, name, low], ['>' | '≥', '>' | '≥']) if is_name(name) => (*low, *high, [signs[1], signs[0]]),
        ([name, end], [sign]) if is_name(name) && is_number(end) => match sign {
            '<' | '≤' => (&minus_infinity[..], *end, ['<', *sign]),
            '>' | '≥' => (*end, &infinity[..], [*sign, '<']),
            _ => return None,
        },
        ([end, name], [sign]) if is_name(name) && is_number(end) => match sign {
            '>' | '≥' => (&minus_infinity[..], *end, ['<', *sign]),
            '<' | '≤' => (*end, &infinity[..], [*sign, '<']),
            _ => return None,
        },
        _ => return None,
    };
    let ends = [side(low, depth)?, side(high, depth)?];
    Some(Value::Interval(Box::new(Interval { ends, is_open: signs.map(|sign| matches!(sign, '<' | '>')) })))
}
