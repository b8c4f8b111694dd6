//! The runner of the device at hand, and its weights.

use aha_core::config::Quantization;
use aha_core::ids::TokenId;
use aha_nn::comm::CommError;
use aha_nn::gpu::{CudaQueue, GpuWeights};
use aha_nn::kernels::cpu::Pool;
use aha_nn::model_config::ModelConfig;
use aha_nn::runtime;
use aha_nn::unit::ModelWeights;
use tch::{Device, Kind, Tensor};

use super::gpu_runner::GpuRunner;
use super::model_runner::CpuRunner;
use super::weights::ServingWeights;
use crate::engine::{BlockId, Runner, Sampled, StepBatch, StepTimes};

/// Whichever device serves.
#[derive(Debug)]
pub enum DeviceRunner {
    Cpu(Box<CpuRunner>),
    Gpu(Box<GpuRunner<CudaQueue>>),
}

/// A set of weights for the runner of the same device.
#[derive(Debug)]
pub enum DeviceWeights {
    Cpu(ServingWeights),
    Gpu(GpuWeights),
}

/// How weights are pushed, and how they serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightFormat {
    /// Type of the weights that trainers of this model push.
    pub pushed: Kind,
    /// Where they serve: in bf16 on a GPU.
    pub device: Device,
    /// On the CPU.
    pub quantization: Quantization,
}

impl DeviceWeights {
    /// A set to be filled unit by unit.
    ///
    /// # Errors
    /// If there is not enough memory on the GPU.
    pub fn empty(config: &ModelConfig, format: WeightFormat) -> anyhow::Result<Self> {
        match format.device {
            Device::Cpu => Ok(Self::Cpu(ServingWeights::empty(config, format.pushed, format.quantization))),
            device => Ok(Self::Gpu(GpuWeights::empty(config, device)?)),
        }
    }

    /// The memory of `weights` itself, where the runner can read it: whole, bf16, on its GPU.
    ///
    /// # Errors
    /// If ranks share the weights and cannot reach each other.
    pub fn borrowed(
        config: &ModelConfig,
        format: WeightFormat,
        weights: &dyn ModelWeights,
    ) -> Result<Option<Self>, CommError> {
        if !format.device.is_cuda() {
            return Ok(None);
        }
        let borrowed = weights.lend()?.and_then(|loan| GpuWeights::borrowed(config, loan, format.device));
        // Whoever lends them may have them written still.
        runtime::synchronize(format.device);
        Ok(borrowed.map(Self::Gpu))
    }

    /// Replaces the parameters of one unit by copies of `params`, given in the order of the manifest.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn set_unit(&mut self, unit_idx: usize, params: Vec<Tensor>, pool: &Pool) -> anyhow::Result<()> {
        match self {
            Self::Cpu(weights) => weights.set_unit(unit_idx, params, pool),
            Self::Gpu(weights) => weights.set_unit(unit_idx, &params)?,
        }
        Ok(())
    }
}

impl Runner for DeviceRunner {
    type Staged = DeviceWeights;

    fn run(&mut self, batch: &StepBatch) -> anyhow::Result<Vec<Sampled>> {
        match self {
            Self::Cpu(runner) => runner.run(batch),
            Self::Gpu(runner) => runner.run(batch),
        }
    }

    fn score(&mut self, tokens: &[TokenId], block_table: &[BlockId]) -> anyhow::Result<Vec<f32>> {
        match self {
            Self::Cpu(runner) => runner.score(tokens, block_table),
            Self::Gpu(runner) => runner.score(tokens, block_table),
        }
    }

    fn times(&self) -> StepTimes {
        match self {
            Self::Cpu(runner) => runner.times(),
            Self::Gpu(runner) => runner.times(),
        }
    }

    fn has_weights(&self) -> bool {
        match self {
            Self::Cpu(runner) => runner.has_weights(),
            Self::Gpu(runner) => runner.has_weights(),
        }
    }

    fn swap(&mut self, staged: DeviceWeights) -> anyhow::Result<Option<DeviceWeights>> {
        match (self, staged) {
            (Self::Cpu(runner), DeviceWeights::Cpu(staged)) => Ok(runner.swap(staged)?.map(DeviceWeights::Cpu)),
            (Self::Gpu(runner), DeviceWeights::Gpu(staged)) => Ok(runner.swap(staged)?.map(DeviceWeights::Gpu)),
            _ => anyhow::bail!("the new weights are for another device than the one that serves"),
        }
    }

    fn release_weights(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Cpu(runner) => runner.release_weights(),
            Self::Gpu(runner) => runner.release_weights(),
        }
    }

    fn release_cache(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Cpu(runner) => runner.release_cache(),
            Self::Gpu(runner) => runner.release_cache(),
        }
    }

    fn restore_cache(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Cpu(runner) => runner.restore_cache(),
            Self::Gpu(runner) => runner.restore_cache(),
        }
    }
}
