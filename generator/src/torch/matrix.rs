//! A weight as the CPU kernels read it: exact, or in 8 bits.

use aha_core::config::Quantization;
use aha_nn::kernels::cpu::{PackedMatrix, Pool, QuantizedMatrix};

/// Projections of the same input, stacked along their outputs.
#[derive(Debug)]
pub(super) enum Matrix {
    Exact(PackedMatrix),
    Int8(QuantizedMatrix),
}

impl Matrix {
    /// # Shapes
    /// - weights: each `[out_i, in_features]`.
    pub(super) fn pack(quantization: Quantization, pool: &Pool, weights: &[&[f32]], in_features: usize) -> Self {
        match quantization {
            Quantization::None => Self::Exact(PackedMatrix::pack(pool, weights, in_features)),
            Quantization::Int8 => Self::Int8(QuantizedMatrix::pack(pool, weights, in_features)),
        }
    }

    /// A matrix `[out, in]` to be filled by [`Matrix::repack`].
    pub(super) fn zeros(quantization: Quantization, shape: [usize; 2]) -> Self {
        match quantization {
            Quantization::None => Self::Exact(PackedMatrix::zeros(shape)),
            Quantization::Int8 => Self::Int8(QuantizedMatrix::zeros(shape)),
        }
    }

    /// Replaces the values, in place.
    pub(super) fn repack(&mut self, pool: &Pool, weights: &[&[f32]]) {
        match self {
            Self::Exact(matrix) => matrix.repack(pool, weights),
            Self::Int8(matrix) => matrix.repack(pool, weights),
        }
    }

    pub(super) fn out_features(&self) -> usize {
        match self {
            Self::Exact(matrix) => matrix.out_features(),
            Self::Int8(matrix) => matrix.out_features(),
        }
    }

    /// `out = x * weight^T + bias`.
    ///
    /// # Shapes
    /// - x: `[m, in]`, bias: `[out]`, out: `[m, out]`.
    pub(super) fn gemm(&self, pool: &Pool, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        match self {
            Self::Exact(matrix) => matrix.gemm(pool, x, bias, out),
            Self::Int8(matrix) => matrix.gemm(pool, x, bias, out),
        }
    }

    /// `out += x * weight^T + bias`.
    ///
    /// # Shapes
    /// - As for [`Matrix::gemm`].
    pub(super) fn gemm_add(&self, pool: &Pool, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        match self {
            Self::Exact(matrix) => matrix.gemm_add(pool, x, bias, out),
            Self::Int8(matrix) => matrix.gemm_add(pool, x, bias, out),
        }
    }
}
