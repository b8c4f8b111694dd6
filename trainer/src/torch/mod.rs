//! Everything of the trainer that touches tensors.

pub mod learner;
pub mod objective;
mod prompt_groups;
#[cfg(test)]
mod tests;
pub mod zero;
