//! Optimizer state, gradients and their communication, sharded over ranks as in ZeRO (arXiv 1910.02054).
//!
//! Every unit of the model is one flat buffer that the world size divides. Stage 0 keeps everything on every rank,
//! stage 1 shards the optimizer's state, stage 2 the gradients as well, stage 3 the weights as well. A unit's gradient is
//! reduced while the backward pass of the next one computes: in stages 2 and 3 with every micro-batch, before them with
//! the last of a step. All ranks call these methods in the same order, unit for unit, whatever their own data: that is
//! what keeps the collectives matched. What the optimizer keeps, and how it updates, is in `optimizer`.

use std::collections::VecDeque;
use std::sync::Arc;

use aha_core::optimizer::OptimizerOptions;
use aha_nn::comm::{CommError, ProcessGroup, ReduceOp, Work};
use aha_nn::optim::{AdamW, sum_of_squares};
use aha_nn::storage::memory_bytes;
use aha_nn::unit::ModelWeights;
use aha_nn::weights::{Weights, split};
use tch::{Device, Kind, Tensor};

use super::optimizer::{OptimizerError, ShardOptimizer, StateTensor, Update};
use super::parameters::{Parameters, Sharding};
use super::range::Range;

/// Reductions in flight while the backward pass goes on; each holds one unit's gradient.
const MAX_PENDING: usize = 2;

/// The weights of one rank with what is needed to update them.
#[derive(Debug)]
pub struct Zero {
    sharding: Sharding,
    group: Arc<ProcessGroup>,
    weights: Parameters,
    units: Vec<UnitState>,
    pending: VecDeque<Pending>,
    stage: Option<HostStage>,
    /// Updates so far.
    num_updates: u64,
}

/// What one rank holds of one unit beside its weights.
#[derive(Debug)]
struct UnitState {
    /// Sum of the gradients of this step: `[padded]` in stages 0 and 1, the shard in stages 2 and 3. fp32.
    grad: Tensor,
    optimizer: ShardOptimizer,
    /// Elements of the unit that this rank updates.
    owned: Range,
}

/// A reduction on its way.
#[derive(Debug)]
struct Pending {
    unit_idx: usize,
    work: Work,
    /// What becomes the gradient, or is added to it; none where it is reduced in place.
    shard: Option<Tensor>,
}

/// The CPU's side of an update whose state is there: room for one unit's owned elements, pinned where the device is a GPU.
#[derive(Debug)]
struct HostStage {
    grad: Tensor,
    weights: Tensor,
}

/// Memory that a rank holds between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldBytes {
    pub weights: usize,
    pub gradients: usize,
    pub optimizer: usize,
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
    #[error("the engine in this process reads the weights: it must sleep before they are updated")]
    Lent,
    #[error("the checkpoint has no {name} for unit {unit}: it was written under another train.optimizer")]
    MissingState { name: &'static str, unit: String },
    #[error(
        "the checkpoint has {found} elements of {name} for unit {unit}, and {expected} are due: it was written under another train.optimizer, or is not whole"
    )]
    UnevenState { name: &'static str, unit: String, found: usize, expected: i64 },
}

impl Zero {
    /// Takes over `weights`, which are equal on all ranks and padded for the size of `group`, with AdamW.
    pub fn new(sharding: impl Into<Sharding>, group: ProcessGroup, weights: Weights) -> Self {
        let (sharding, group) = (sharding.into(), Arc::new(group));
        let weights = Parameters::of(sharding, &group, weights);
        Self::with(sharding, group, weights, &OptimizerOptions::default()).expect("weights at hand wait for no rank")
    }

    /// As [`Zero::new`], for weights that are sharded as `sharding` says already, and any optimizer.
    ///
    /// # Errors
    /// If ranks cannot reach each other.
    pub fn with(
        sharding: Sharding,
        group: Arc<ProcessGroup>,
        weights: Parameters,
        optimizer: &OptimizerOptions,
    ) -> Result<Self, ZeroError> {
        let units: Vec<UnitState> = (0..weights.manifest().units.len())
            .map(|unit_idx| UnitState::new((sharding, optimizer), &group, &weights, unit_idx))
            .collect::<Result<_, _>>()?;
        let stage = sharding.offload_optimizer.then(|| {
            let longest = units.iter().map(|unit| unit.owned.len).max().unwrap_or(0);
            HostStage::new(longest, weights.kind(), weights.device())
        });
        Ok(Self { sharding, group, weights, units, pending: VecDeque::new(), stage, num_updates: 0 })
    }

    pub fn weights(&self) -> &Parameters {
        &self.weights
    }

    pub fn group(&self) -> &ProcessGroup {
        &self.group
    }

    /// Optimizer updates since the start of training.
    pub fn num_updates(&self) -> u64 {
        self.num_updates
    }

    /// What this rank holds between steps.
    #[must_use]
    pub fn held_bytes(&self) -> HeldBytes {
        HeldBytes {
            weights: self.weights.num_bytes(),
            gradients: self.units.iter().map(|unit| memory_bytes(&unit.grad)).sum(),
            optimizer: self.units.iter().map(|unit| unit.optimizer.num_bytes()).sum(),
        }
    }

    /// Where the gradients of a unit's parameters may be added, fp32, in their shapes and in manifest order. `None` where
    /// ranks sum them before they are added up.
    pub fn gradients(&mut self, unit_idx: usize) -> Option<Vec<Tensor>> {
        if self.group.size() > 1 && self.sharding.stage > 1 {
            return None;
        }
        self.units[unit_idx].hold_gradient();
        Some(split(&self.units[unit_idx].grad, self.weights.manifest(), unit_idx))
    }

    /// Adds to the gradient of a unit; `grads` are those of its parameters, in manifest order, or none from a rank that
    /// has no data left. One that was added by way of [`Zero::gradients`] is `None`. `is_last` with what is the last of the
    /// step for this unit, on all ranks alike.
    pub fn accumulate(&mut self, unit_idx: usize, grads: &[Option<Tensor>], is_last: bool) -> Result<(), ZeroError> {
        let flat = if let Some(sums) = self.gradients(unit_idx) {
            // In place, without a flat copy of them.
            for (mut sum, grad) in sums.into_iter().zip(grads) {
                if let Some(grad) = grad {
                    sum += grad.to_kind(Kind::Float);
                }
            }
            if self.group.size() == 1 || !is_last {
                return Ok(());
            }
            self.units[unit_idx].grad.shallow_clone()
        } else {
            self.units[unit_idx].hold_gradient();
            self.flat_gradient(unit_idx, grads)
        };
        self.reduce(unit_idx, flat)?;
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
        // A rank whose sequences were all left out has none yet.
        self.units.iter_mut().for_each(UnitState::hold_gradient);
        // One sum of squares a unit, added in a fixed order in f64, so that the norm does not depend on the stage.
        let squares: Vec<Tensor> = self.units.iter().map(|unit| sum_of_squares(&unit.grad)).collect();
        let mut total = Tensor::stack(&squares, 0).sum(Kind::Double).view([1]);
        if self.sharding.stage > 0 {
            self.group.all_reduce(&mut total, ReduceOp::Sum)?;
        }
        Ok(total.double_value(&[0]).sqrt())
    }

    /// Scales the gradients by `scale`, updates the owned weights, and gathers everyone's, which whoever uses a unit next
    /// waits for. Gradients are zero after.
    ///
    /// # Errors
    /// If the weights are lent, ranks cannot reach each other, or the optimizer fails.
    pub fn update(&mut self, scale: f64, options: &AdamW) -> Result<(), ZeroError> {
        if self.weights.is_lent() {
            return Err(ZeroError::Lent);
        }
        self.num_updates += 1;
        let group = (self.sharding.stage > 0).then_some(&*self.group);
        let update = Update { scale, step: self.num_updates, options, group };
        for (unit_idx, unit) in self.units.iter_mut().enumerate() {
            let mut owned = self.weights.owned(unit_idx, unit.owned)?;
            let mut grad = unit.grad.narrow(0, 0, unit.owned.len);
            match &mut self.stage {
                Some(stage) => stage.update(&mut unit.optimizer, &mut owned, &grad, &update)?,
                None => {
                    // The same memory, unless weights are kept on the CPU and their state is not.
                    let mut beside = owned.to_device(grad.device());
                    unit.optimizer.update(&mut beside, &mut grad, &update)?;
                    if beside.device() != owned.device() {
                        tch::no_grad(|| owned.copy_(&beside));
                    }
                }
            }
            if self.sharding.stage > 0 && self.group.size() > 1 {
                self.weights.gather(unit_idx, &owned, &self.group)?;
            }
        }
        self.zero_gradients();
        Ok(())
    }

    /// Drops the gradients of the step.
    pub fn zero_gradients(&mut self) {
        for (unit, spec) in self.units.iter_mut().zip(&self.weights.manifest().units) {
            let len = unit.grad.size()[0];
            let padded = spec.padded_numel(self.group.size()) as i64;
            if self.sharding.stage < 2 && len < padded {
                unit.grad = Tensor::zeros([padded], (Kind::Float, unit.grad.device()));
            } else {
                unit.grad = unit.grad.zero_();
            }
        }
    }

    /// Gives the memory of the gradients back until the next ones come. They must be zero.
    pub fn release_gradients(&mut self) {
        for unit in &mut self.units {
            unit.grad = no_gradient(unit.grad.size()[0], unit.grad.device());
        }
    }

    /// What this rank contributes to a checkpoint. In stage 0 all ranks hold the same, and rank 0 speaks for them.
    pub fn state(&self) -> Vec<ShardState> {
        if self.sharding.stage == 0 && self.group.rank() > 0 {
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
            let unit_name = || self.weights.manifest().units[unit_idx].name.clone();
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
                        unit.optimizer.reset_master(&self.weights.owned(unit_idx, unit.owned)?);
                    }
                    None => return Err(ZeroError::MissingState { name, unit: unit_name() }),
                }
            }
        }
        self.num_updates = num_updates;
        Ok(())
    }

    /// Begins to sum `flat`, `[padded]`, over ranks.
    fn reduce(&mut self, unit_idx: usize, mut flat: Tensor) -> Result<(), ZeroError> {
        let (work, shard) = if self.sharding.stage == 0 {
            (self.group.all_reduce_async(&mut flat, ReduceOp::Sum)?, None)
        } else {
            let mut shard = Tensor::empty([self.units[unit_idx].owned.len], (Kind::Float, flat.device()));
            (self.group.reduce_scatter_async(&flat, &mut shard, ReduceOp::Sum)?, Some(shard))
        };
        self.pending.push_back(Pending { unit_idx, work, shard });
        Ok(())
    }

    fn finish_oldest(&mut self) -> Result<(), ZeroError> {
        let Some(Pending { unit_idx, work, shard }) = self.pending.pop_front() else { return Ok(()) };
        work.wait()?;
        let grad = &mut self.units[unit_idx].grad;
        match shard {
            Some(shard) if self.sharding.stage == 1 => *grad = shard,
            Some(shard) => *grad += shard,
            None => {}
        }
        Ok(())
    }

    /// The gradients of a unit's parameters as one padded fp32 tensor.
    fn flat_gradient(&self, unit_idx: usize, grads: &[Option<Tensor>]) -> Tensor {
        let unit = &self.weights.manifest().units[unit_idx];
        let padded = unit.padded_numel(self.group.size()) as i64;
        let options = (Kind::Float, self.weights.device());
        if grads.is_empty() {
            return Tensor::zeros([padded], options);
        }
        let flat = |grad: &Option<Tensor>| {
            let grad = grad.as_ref().expect("only gradients that are added up here may be added elsewhere");
            grad.to_kind(Kind::Float).reshape([-1])
        };
        let mut parts: Vec<Tensor> = grads.iter().map(flat).collect();
        let padding = padded - unit.numel() as i64;
        if padding > 0 {
            parts.push(Tensor::zeros([padding], options));
        }
        Tensor::cat(&parts, 0)
    }
}

impl UnitState {
    fn new(
        (sharding, optimizer): (Sharding, &OptimizerOptions),
        group: &ProcessGroup,
        weights: &Parameters,
        unit_idx: usize,
    ) -> Result<Self, CommError> {
        let unit = &weights.manifest().units[unit_idx];
        let padded = unit.padded_numel(group.size()) as i64;
        let owned = sharding.owned(padded, (group.rank(), group.size()));
        let grad_len = if sharding.stage < 2 { padded } else { owned.len };
        let grad = no_gradient(grad_len, weights.device());
        let state_device = if sharding.offload_optimizer { Device::Cpu } else { weights.device() };
        let owned_weights = weights.owned(unit_idx, owned)?.to_device(state_device);
        let optimizer = ShardOptimizer::new(unit, owned, &owned_weights, optimizer);
        Ok(Self { grad, optimizer, owned })
    }

    /// Takes the memory of the gradient where it was given back.
    fn hold_gradient(&mut self) {
        if !self.grad.is_contiguous() {
            self.grad = self.grad.contiguous();
        }
    }
}

/// Zeros without their memory: one element stands for all.
fn no_gradient(len: i64, device: Device) -> Tensor {
    Tensor::zeros([1], (Kind::Float, device)).expand([len], false)
}

impl HostStage {
    fn new(len: i64, kind: Kind, device: Device) -> Self {
        let buffer = |kind: Kind| {
            let buffer = Tensor::zeros([len], (kind, Device::Cpu));
            if device.is_cuda() { buffer.pin_memory(device) } else { buffer }
        };
        Self { grad: buffer(Kind::Float), weights: buffer(kind) }
    }

    /// Updates `owned` by way of the CPU.
    fn update(
        &mut self,
        optimizer: &mut ShardOptimizer,
        owned: &mut Tensor,
        grad: &Tensor,
        update: &Update<'_>,
    ) -> Result<(), OptimizerError> {
        let len = grad.size()[0];
        let [mut host_grad, mut host_weights] = [&self.grad, &self.weights].map(|buffer| buffer.narrow(0, 0, len));
        tch::no_grad(|| {
            host_grad.copy_(grad);
            host_weights.copy_(owned);
        });
        optimizer.update(&mut host_weights, &mut host_grad, update)?;
        tch::no_grad(|| owned.copy_(&host_weights));
        Ok(())
    }
}
