//! Everything of the trainer that touches tensors.

#[cfg(test)]
mod golden_tests;
pub mod learner;
pub mod objective;
<<<<<<< HEAD
mod prompt_groups;
=======
pub mod optimizer;
mod range;
>>>>>>> b6e7962a40566e4cc77bc6f20c63599666361a20
mod targets;
#[cfg(test)]
mod tests;
pub mod zero;
