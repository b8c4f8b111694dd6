//! What the whole-run tests share: golden models, the aha binary, and small configurations.
#![forbid(unsafe_code)]

pub mod binary;
pub mod formula;
pub mod golden;
pub mod small_run;
