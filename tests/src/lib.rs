//! What the whole-run tests share: golden models, the aha binary, a network that fails, and small
//! configurations.
#![forbid(unsafe_code)]

pub mod binary;
pub mod chaos;
pub mod docs;
pub mod formula;
pub mod golden;
pub mod markov;
pub mod small_run;
