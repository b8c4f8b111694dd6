//! When an answer is the gold one.
//!
//! Not symmetric: the gold answer says what was asked, so that an interval may answer an inequality, and a number an
//! equation that defines it.

use super::quantity::{Proportion, Quantity};
use super::value::{Equation, Inequality, Interval, Order, Scalar, Value};

/// Whether `answer` says what `gold` says.
pub(super) fn equal(gold: &Value, answer: &Value) -> bool {
    match (gold, answer) {
        (Value::Equation(gold), Value::Equation(answer)) => same_equation(gold, answer),
        (_, Value::Equation(answer)) => equal(gold, &answer.right),
        (Value::Equation(gold), _) => gold.is_definition && equal(&gold.right, answer),
        (Value::Inequality(gold), Value::Inequality(answer)) => same_inequality(gold, answer),
        (Value::Inequality(gold), _) => gold.interval.as_ref().is_some_and(|interval| equal(interval, answer)),
        (Value::Scalar(gold), Value::Scalar(answer)) => same_scalar(gold, answer),
        (Value::Set(gold), Value::Set(answer) | Value::Tuple(answer)) => same_set(gold, answer),
        (Value::Tuple(gold), Value::Tuple(answer) | Value::Set(answer)) => same_sequence(gold, answer),
        (Value::Matrix(gold), Value::Matrix(answer)) => {
            gold.len() == answer.len() && gold.iter().zip(answer).all(|(gold, answer)| same_sequence(gold, answer))
        }
        (Value::Interval(gold), Value::Interval(answer)) => {
            gold.is_open == answer.is_open && same_sequence(&gold.ends, &answer.ends)
        }
        // `(0, 1)` may be either.
        (Value::Interval(interval), Value::Tuple(tuple)) => is_open_interval(interval, tuple, true),
        (Value::Tuple(tuple), Value::Interval(interval)) => is_open_interval(interval, tuple, false),
        _ => false,
    }
}

fn is_open_interval(interval: &Interval, tuple: &[Value], interval_is_gold: bool) -> bool {
    let (gold, answer) = if interval_is_gold { (&interval.ends[..], tuple) } else { (tuple, &interval.ends[..]) };
    interval.is_open == [true; 2] && same_sequence(gold, answer)
}

fn same_sequence(gold: &[Value], answer: &[Value]) -> bool {
    gold.len() == answer.len() && gold.iter().zip(answer).all(|(gold, answer)| equal(gold, answer))
}

/// In any order, and however often.
fn same_set(gold: &[Value], answer: &[Value]) -> bool {
    let is_in_answer = |gold| answer.iter().any(|answer| equal(gold, answer));
    let is_in_gold = |answer| gold.iter().any(|gold| equal(gold, answer));
    gold.iter().all(is_in_answer) && answer.iter().all(is_in_gold)
}

fn same_scalar(gold: &Scalar, answer: &Scalar) -> bool {
    if gold.is_text || answer.is_text {
        // A word may be read as a product of its letters; case tells single letters apart.
        return match (&gold.word, &answer.word) {
            (Some(gold), Some(answer)) if gold.len() > 1 => gold.to_lowercase() == answer.to_lowercase(),
            (Some(gold), Some(answer)) => gold == answer,
            _ => gold.quantity.equals(&answer.quantity),
        };
    }
    let same = |factor: u32| {
        let answer_quantity = answer.quantity.times(&Quantity::integer(factor));
        let gold_quantity = gold.quantity;
        gold_quantity.equals(&answer_quantity)
            || (gold.is_decimal || answer.is_decimal) && gold_quantity.approximates(&answer_quantity)
    };
    // A percentage is right with and without its sign, and as a share of 1.
    same(1)
        || gold.is_percent && !answer.is_percent && same(100)
        || answer.is_percent && !gold.is_percent && is_share(gold, answer)
}

/// Whether the percentage `answer` is the share `gold`.
fn is_share(gold: &Scalar, answer: &Scalar) -> bool {
    let percents = gold.quantity.times(&Quantity::integer(100));
    percents.equals(&answer.quantity) || gold.is_decimal && percents.approximates(&answer.quantity)
}

fn same_equation(gold: &Equation, answer: &Equation) -> bool {
    let is_same_definition = gold.is_definition && answer.is_definition && gold.left == answer.left;
    is_same_definition && equal(&gold.right, &answer.right)
        || match (&gold.difference, &answer.difference) {
            (Some(gold), Some(answer)) => gold.proportion(answer) != Proportion::None,
            _ => false,
        }
}

fn same_inequality(gold: &Inequality, answer: &Inequality) -> bool {
    let mut links: Vec<_> = answer.links.iter().collect();
    gold.links.len() == answer.links.len()
        && gold.links.iter().all(|(order, gold)| {
            let is_same = |(answer_order, answer): &&(Order, Quantity)| {
                order == answer_order
                    && match gold.proportion(answer) {
                        Proportion::Positive => true,
                        Proportion::Negative => *order == Order::NotEqual,
                        Proportion::None => false,
                    }
            };
            links.iter().position(is_same).map(|at| links.swap_remove(at)).is_some()
        })
}
