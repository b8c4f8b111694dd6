//! Tables of rotary angles.

use tch::{Device, Kind, Tensor};

use crate::model_config::ModelConfig;

/// Cosines and sines of every position, computed once in f64.
#[derive(Debug)]
pub struct RotaryTable {
    /// `[T_max, D / 2]`, fp32.
    pub cos: Tensor,
    /// `[T_max, D / 2]`, fp32.
    pub sin: Tensor,
}

impl RotaryTable {
    /// Angles of positions `0..num_positions`.
    #[must_use]
    pub fn new(config: &ModelConfig, num_positions: usize, device: Device) -> Self {
        // transformers keeps frequencies and angles in fp32; the same rounding keeps long positions equal to it.
        let frequencies: Vec<f32> =
            config.rope.inverse_frequencies(config.head_dim).iter().map(|&frequency| frequency as f32).collect();
        let frequencies = Tensor::from_slice(&frequencies);
        let positions = Tensor::arange(num_positions as i64, (Kind::Float, Device::Cpu));
        let angles = positions.outer(&frequencies); // [T_max, D / 2]
        Self { cos: angles.cos().to_device(device), sin: angles.sin().to_device(device) }
    }

    /// Rows for the given positions, doubled to a head's width for the halves convention.
    ///
    /// # Shapes
    /// - positions: `[N]`, i64; returns cos and sin, each `[N, 1, D]` of type `kind`.
    pub fn rows(&self, positions: &Tensor, kind: Kind) -> [Tensor; 2] {
        [&self.cos, &self.sin].map(|table| {
            let half = table.index_select(0, positions); // [N, D / 2]
            Tensor::cat(&[&half, &half], -1).unsqueeze(1).to_kind(kind) // [N, 1, D]
        })
    }
}
