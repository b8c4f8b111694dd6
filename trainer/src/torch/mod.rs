//! Everything of the trainer that touches tensors.

#[cfg(test)]
mod golden_tests;
pub mod learner;
pub mod objective;
pub mod optimizer;
pub mod parameters;
mod prompt_groups;
mod range;
mod targets;
#[cfg(test)]
mod tests;
pub mod zero;
