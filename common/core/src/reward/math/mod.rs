//! Rewards for mathematical answers.
//!
//! An answer is found in the completion ([`extract`]), cut into tokens ([`token`]), read as a mathematical object
//! ([`value`]) whose formulas are known by their values at fixed points ([`quantity`]), and compared ([`equal`]).
//! Every step is linear in what it looks at, and looks at the last 256 KiB of a completion, at 4 KiB and 512 tokens of
//! an answer, at 32 levels of a formula and at 128 elements of a list.

mod accuracy;
mod boxed;
mod choice;
mod clip;
mod command;
mod environment;
mod equal;
mod extract;
mod function;
mod gold;
mod gsm8k;
mod names;
mod parser;
mod plain;
mod quantity;
mod reading;
mod residue;
mod statement;
mod token;
mod value;

pub(super) use accuracy::MathAccuracy;
pub(super) use choice::MultipleChoice;
pub(super) use gsm8k::Gsm8kAnswer;

#[cfg(test)]
mod tests;
