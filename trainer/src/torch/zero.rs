//! Optimizer state, gradients and their communication, sharded over ranks as in ZeRO (arXiv 1910.02054).
//!
//! Every unit of the model is one flat buffer that the world size divides. Stage 0 keeps everything on every rank,
//! stage 1 shards the optimizer's state, stage 2 the gradients as well: a unit's gradient is reduce-scattered while the
//! backward pass of the next one computes. All ranks call these methods in the same order, unit for unit, whatever
//! their own data: that is what keeps the collectives matched. What the optimizer keeps, and how it updates, is in
//! `optimizer`.

use std::collections::VecDeque;

use aha_core::optimizer::OptimizerOptions;
use aha_nn::comm::{CommError, ProcessGroup, ReduceOp, Work};
use aha_nn::optim::AdamW;
use aha_nn::weights::Weights;
use tch::{Kind, Tensor};

use super::optimizer::{OptimizerError, ShardOptimizer, StateTensor, Update};
use super::range::Range;

/// Reductions in flight while the backward pass goes on; each holds one unit's gradient.
const MAX_PENDING: usize = 2;

/// The weights of one rank with what is needed to update them.
#[derive(Debug)]
pub struct Zero {
    stage: u8,
    group: ProcessGroup,
    weights: Weights,
    units: Vec<UnitState>,
    pending: VecDeque<Pending>,
    /// Updates so far.
    num_updates: u64,
}

/// What one rank holds of one unit beside its weights.
#[derive(Debug)]
struct UnitState {
    /// Sum of the gradients of this step: `[padded]` in stages 0 and 1, the shard in stage 2. fp32.
    grad: Tensor,
    optimizer: ShardOptimizer,
    /// Elements of the unit that this rank updates.
    owned: Range,
}

#[derive(Debug)]
struct Pending {
    unit_idx: usize,
    work: Work,
    shard: Tensor,
}

/// One rank's part of one tensor of the optimizer's state of one unit, without padding.
#[derive(Debug)]
pub struct ShardState {
    pub unit_idx: usize,
    /// As the optimizer calls it, or `master`.
    pub name: &'static str,
    /// Where the part starts in the whole tensor.
    pub offset: usize,
    /// `[n]`, on the CPU.
    pub tensor: Tensor,
}

/// One tensor of the optimizer's state of one unit, put together again.
#[derive(Debug)]
pub struct FullState {
    pub unit_idx: usize,
    pub name: String,
    /// Flat, without padding.
    pub tensor: Tensor,
}

#[derive(Debug, thiserror::Error)]
pub enum ZeroError {
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    #[error("the checkpoint has no {name} for unit {unit}: it was written under another train.optimizer")]
    MissingState { name: &'static str, unit: String },
    #[error(
        "the checkpoint has {found} elements of {name} for unit {unit}, and {expected} are due: it was written under another train.optimizer, or is not whole"
    )]
    UnevenState { name: &'static str, unit: String, found: usize, expected: i64 },
}

impl Zero {
    /// Takes over `weights`, which are equal on all ranks and padded for the size of `group`, with AdamW.
    pub fn new(stage: u8, group: ProcessGroup, weights: Weights) -> Self {
        Self::with_optimizer(stage, group, weights, &OptimizerOptions::default())
    }

    /// The same with another optimizer.
    pub fn with_optimizer(stage: u8, group: ProcessGroup, weights: Weights, optimizer: &OptimizerOptions) -> Self {
        let unit = |unit_idx| UnitState::new((stage, optimizer), &group, &weights, unit_idx);
        let units = (0..weights.num_units()).map(unit).collect();
        Self { stage, group, weights, units, pending: VecDeque::new(), num_updates: 0 }
    }

    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    pub fn group(&self) -> &ProcessGroup {
        &self.group
    }

    /// Optimizer updates since the start of training.
    pub fn num_updates(&self) -> u64 {
        self.num_updates
    }

    /// Adds to the gradient of a unit; `grads` are those of its parameters, in manifest order, or none from a rank that
    /// has no data left.
    pub fn accumulate(&mut self, unit_idx: usize, grads: &[Tensor]) -> Result<(), ZeroError> {
        if self.stage < 2 {
            self.units[unit_idx].add(grads);
            return Ok(());
        }
        let flat = self.flat_gradient(unit_idx, grads);
        let mut shard = self.units[unit_idx].grad.empty_like();
        let work = self.group.reduce_scatter_async(&flat, &mut shard, ReduceOp::Sum)?;
        self.pending.push_back(Pending { unit_idx, work, shard });
        while self.pending.len() > MAX_PENDING {
            self.finish_oldest()?;
        }
        Ok(())
    }

    /// Completes the gradients of the step and returns their norm over all parameters and ranks.
    pub fn reduce_gradients(&mut self) -> Result<f64, ZeroError> {
        while !self.pending.is_empty() {
            self.finish_oldest()?;
        }
        for unit in &mut self.units {
            match self.stage {
                0 => self.group.all_reduce(&mut unit.grad, ReduceOp::Sum)?,
                1 => {
                    let mut shard = Tensor::empty([unit.owned.len], (Kind::Float, unit.grad.device()));
                    self.group.reduce_scatter(&unit.grad, &mut shard, ReduceOp::Sum)?;
                    unit.grad = shard;
                }
                _ => {}
            }
        }
        // One sum of squares a unit, added in a fixed order in f64, so that the norm does not depend on the stage.
        let squares: Vec<Tensor> =
            self.units.iter().map(|unit| unit.grad.to_kind(Kind::Double).square().sum(Kind::Double)).collect();
        let mut total = Tensor::stack(&squares, 0).sum(Kind::Double).view([1]);
        if self.stage > 0 {
            self.group.all_reduce(&mut total, ReduceOp::Sum)?;
        }
        Ok(total.double_value(&[0]).sqrt())
    }

    /// Scales the gradients by `scale`, updates the owned weights, and gathers everyone's. Gradients are zero after.
    pub fn update(&mut self, scale: f64, options: &AdamW) -> Result<(), ZeroError> {
        self.num_updates += 1;
        let group = (self.stage > 0).then_some(&self.group);
        let update = Update { scale, step: self.num_updates, options, group };
        let mut gathers = Vec::new();
        for (unit_idx, unit) in self.units.iter_mut().enumerate() {
            let mut owned = unit.owned.of(self.weights.flat(unit_idx));
            let mut grad = unit.grad.narrow(0, 0, unit.owned.len);
            unit.optimizer.update(&mut owned, &mut grad, &update)?;
            if self.stage > 0 {
                let mut flat = self.weights.flat(unit_idx).shallow_clone();
                gathers.push(self.group.all_gather_async(&owned.copy(), &mut flat)?);
            }
        }
        for gather in gathers {
            gather.wait()?;
        }
        self.zero_gradients();
        Ok(())
    }

    /// Drops the gradients of the step.
    pub fn zero_gradients(&mut self) {
        for (unit_idx, unit) in self.units.iter_mut().enumerate() {
            if self.stage == 1 {
                unit.grad = self.weights.flat(unit_idx).zeros_like().to_kind(Kind::Float);
            } else {
                unit.grad = unit.grad.zero_();
            }
        }
    }

    /// What this rank contributes to a checkpoint. In stage 0 all ranks hold the same, and rank 0 speaks for them.
    pub fn state(&self) -> Vec<ShardState> {
        if self.stage == 0 && self.group.rank() > 0 {
            return Vec::new();
        }
        let mut shards = Vec::new();
        for (unit_idx, unit) in self.units.iter().enumerate() {
            for StateTensor { name, tensor, offset, .. } in unit.optimizer.tensors() {
                if tensor.numel() > 0 {
                    let tensor = tensor.to_device(tch::Device::Cpu);
                    shards.push(ShardState { unit_idx, name, offset: offset as usize, tensor });
                }
            }
        }
        shards
    }

    /// Takes the optimizer's state back, from a run of any world size and stage.
    ///
    /// # Errors
    /// If a unit's state is not there, or not whole. A missing master is made from the weights.
    pub fn load_state(&mut self, num_updates: u64, states: &[FullState]) -> Result<(), ZeroError> {
        for (unit_idx, unit) in self.units.iter_mut().enumerate() {
            let unit_name = || self.weights.manifest.units[unit_idx].name.clone();
            for StateTensor { name, mut tensor, offset, whole_len } in unit.optimizer.tensors() {
                match states.iter().find(|state| state.unit_idx == unit_idx && state.name == name) {
                    Some(state) if state.tensor.size() == [whole_len] => {
                        let source = state.tensor.narrow(0, offset, tensor.numel() as i64);
                        tch::no_grad(|| tensor.copy_(&source));
                    }
                    Some(state) => {
                        let found = state.tensor.numel();
                        return Err(ZeroError::UnevenState { name, unit: unit_name(), found, expected: whole_len });
                    }
                    // Nobody writes what has no elements.
                    None if whole_len == 0 => {}
                    None if name == "master" => {
                        unit.optimizer.reset_master(&unit.owned.of(self.weights.flat(unit_idx)));
                    }
                    None => return Err(ZeroError::MissingState { name, unit: unit_name() }),
                }
            }
        }
        self.num_updates = num_updates;
        Ok(())
    }

    fn finish_oldest(&mut self) -> Result<(), ZeroError> {
        if let Some(Pending { unit_idx, work, shard }) = self.pending.pop_front() {
            work.wait()?;
            let grad = &mut self.units[unit_idx].grad;
            *grad += shard;
        }
        Ok(())
    }

    /// The gradients of a unit's parameters as one padded fp32 tensor.
    fn flat_gradient(&self, unit_idx: usize, grads: &[Tensor]) -> Tensor {
        let flat = self.weights.flat(unit_idx);
        let padded = flat.size()[0];
        let options = (Kind::Float, flat.device());
        if grads.is_empty() {
            return Tensor::zeros([padded], options);
        }
        let mut parts: Vec<Tensor> = grads.iter().map(|grad| grad.to_kind(Kind::Float).reshape([-1])).collect();
        let padding = padded - self.weights.manifest.units[unit_idx].numel() as i64;
        if padding > 0 {
            parts.push(Tensor::zeros([padding], options));
        }
        Tensor::cat(&parts, 0)
    }
}

impl UnitState {
    fn new(
        (stage, optimizer): (u8, &OptimizerOptions),
        group: &ProcessGroup,
        weights: &Weights,
        unit_idx: usize,
    ) -> Self {
        let flat = weights.flat(unit_idx);
        let padded = flat.size()[0];
        let owned = if stage == 0 {
            Range { start: 0, len: padded }
        } else {
            let len = padded / group.size() as i64;
            Range { start: group.rank() as i64 * len, len }
        };
        let grad = Tensor::zeros([if stage == 2 { owned.len } else { padded }], (Kind::Float, flat.device()));
        let optimizer = ShardOptimizer::new(&weights.manifest.units[unit_idx], owned, &owned.of(flat), optimizer);
        Self { grad, optimizer, owned }
    }

    /// Adds the gradients of the parameters in place, without a flat copy of them.
    fn add(&mut self, grads: &[Tensor]) {
        let mut offset = 0;
        for grad in grads {
            let numel = grad.numel() as i64;
            let mut target = self.grad.narrow(0, offset, numel);
            target += grad.to_kind(Kind::Float).reshape([-1]);
            offset += numel;
        }
    }
}
