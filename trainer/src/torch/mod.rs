//! Everything of the trainer that touches tensors.

pub mod learner;
pub mod objective;
#[cfg(test)]
mod tests;
pub mod zero;
