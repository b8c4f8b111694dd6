//! Which optimizer updates the weights.

use serde::{Deserialize, Serialize};

/// Named as TRL and transformers name their `optim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum OptimizerKind {
    /// fp32 moments (`adamw_torch` there).
    #[default]
    #[serde(rename = "adamw")]
    Adamw,
    /// Moments in 8 bits, block by block, as bitsandbytes keeps them (Dettmers et al., arXiv 2110.02861).
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// Momentum made orthogonal for the matrices of layers (Jordan et al., 2024), AdamW for everything else.
    #[serde(rename = "muon")]
    Muon,
}

/// What Muon's learning rate is multiplied by for a matrix of `rows` and `columns`; the names are torch's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MuonAdjustLr {
    /// `sqrt(max(1, rows / columns))`: the update's spectral norm is what counts.
    Original,
    /// `0.2 sqrt(max(rows, columns))`: the update is as large as AdamW's usually is, so that AdamW's learning rate and
    /// weight decay serve both (arXiv 2502.16982).
    #[default]
    MatchRmsAdamw,
}

/// The optimizer of a run, beside the numbers that change from step to step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct OptimizerOptions {
    pub kind: OptimizerKind,
    pub muon: MuonOptions,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MuonOptions {
    pub adjust_lr: MuonAdjustLr,
    /// Learning rate of the matrices of layers per learning rate of the rest.
    pub lr_ratio: f64,
}

impl Default for MuonOptions {
    fn default() -> Self {
        Self { adjust_lr: MuonAdjustLr::default(), lr_ratio: 1.0 }
    }
}

impl MuonAdjustLr {
    #[must_use]
    pub fn factor(self, rows: i64, columns: i64) -> f64 {
        let (rows, columns) = (rows as f64, columns as f64);
        match self {
            Self::Original => (rows / columns).max(1.0).sqrt(),
            Self::MatchRmsAdamw => 0.2 * rows.max(columns).sqrt(),
        }
    }
}
