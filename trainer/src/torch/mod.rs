//! Everything of the trainer that touches tensors.

pub mod adapted;
#[cfg(test)]
mod adapted_tests;
#[cfg(test)]
mod emulated_gpu;
#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod half_tests;
mod head;
pub mod learner;
pub mod objective;
pub mod optimizer;
pub mod parameters;
mod prompt_groups;
mod range;
mod step_times;
mod targets;
#[cfg(test)]
mod tests;
mod unread;
pub mod zero;
