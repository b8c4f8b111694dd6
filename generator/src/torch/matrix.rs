//! A weight as the CPU kernels read it: as it is, or in 8 bits.

use aha_core::config::Quantization;
use aha_nn::kernels::cpu::{PackedMatrix, Pool, QuantizedMatrix};
use aha_nn::tensor_data::{bf16_slice, f32_slice};
use half::bf16;
use tch::{Kind, Tensor};

/// Projections of the same input, stacked along their outputs, in the type that they came in or in 8 bits.
#[derive(Debug)]
pub(super) enum Matrix {
    Fp32(PackedMatrix<f32>),
    Bf16(PackedMatrix<bf16>),
    Int8(QuantizedMatrix),
}

impl Matrix {
    /// A matrix of this shape and type, to be filled by [`Matrix::repack`]. It takes memory as it is filled.
    ///
    /// # Shapes
    /// - weights: each `[out_i, in]`, fp32 or bf16; what they hold is not looked at.
    pub(super) fn zeros(quantization: Quantization, weights: &[Tensor]) -> Self {
        let num_outputs = weights.iter().map(|part| part.size()[0] as usize).sum();
        let shape = [num_outputs, weights[0].size()[1] as usize];
        match (quantization, weights[0].kind()) {
            (Quantization::Int8, _) => Self::Int8(QuantizedMatrix::zeros(shape)),
            (Quantization::None, Kind::BFloat16) => Self::Bf16(PackedMatrix::zeros(shape)),
            (Quantization::None, Kind::Float) => Self::Fp32(PackedMatrix::zeros(shape)),
            (Quantization::None, kind) => unreachable!("weights are fp32 or bf16, not {kind:?}"),
        }
    }

    /// Replaces the values, in place where they are of the type of those before.
    ///
    /// # Shapes
    /// - weights: as given to [`Matrix::zeros`].
    pub(super) fn repack(&mut self, pool: &Pool, weights: &[Tensor]) {
        let is_bf16 = weights[0].kind() == Kind::BFloat16;
        match self {
            Self::Fp32(matrix) if !is_bf16 => matrix.repack(pool, &fp32_slices(weights)),
            Self::Bf16(matrix) if is_bf16 => matrix.repack(pool, &bf16_slices(weights)),
            Self::Int8(matrix) if is_bf16 => matrix.repack(pool, &bf16_slices(weights)),
            Self::Int8(matrix) => matrix.repack(pool, &fp32_slices(weights)),
            Self::Fp32(_) | Self::Bf16(_) => {
                *self = Self::zeros(Quantization::None, weights);
                self.repack(pool, weights);
            }
        }
    }

    pub(super) fn out_features(&self) -> usize {
        match self {
            Self::Fp32(matrix) => matrix.out_features(),
            Self::Bf16(matrix) => matrix.out_features(),
            Self::Int8(matrix) => matrix.out_features(),
        }
    }

    /// `out = x * weight^T + bias`.
    ///
    /// # Shapes
    /// - x: `[m, in]`, bias: `[out]`, out: `[m, out]`.
    pub(super) fn gemm(&self, pool: &Pool, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        match self {
            Self::Fp32(matrix) => matrix.gemm(pool, x, bias, out),
            Self::Bf16(matrix) => matrix.gemm(pool, x, bias, out),
            Self::Int8(matrix) => matrix.gemm(pool, x, bias, out),
        }
    }

    /// `out += x * weight^T + bias`.
    ///
    /// # Shapes
    /// - As for [`Matrix::gemm`].
    pub(super) fn gemm_add(&self, pool: &Pool, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        match self {
            Self::Fp32(matrix) => matrix.gemm_add(pool, x, bias, out),
            Self::Bf16(matrix) => matrix.gemm_add(pool, x, bias, out),
            Self::Int8(matrix) => matrix.gemm_add(pool, x, bias, out),
        }
    }
}

fn fp32_slices(weights: &[Tensor]) -> Vec<&[f32]> {
    weights.iter().map(f32_slice).collect()
}

fn bf16_slices(weights: &[Tensor]) -> Vec<&[bf16]> {
    weights.iter().map(bf16_slice).collect()
}
