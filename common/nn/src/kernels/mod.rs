//! Hand-written kernels for the generator, by device.

pub mod cpu;
pub mod cuda;
