//! The optimizer: the state of the elements that one rank owns, and the update of their weights.
//!
//! It works on one unit's owned range at a time and knows nothing of stages, gradients' reductions or files.

mod adamw;

use aha_core::manifest::UnitSpec;
use aha_nn::optim::{AdamW, AdamWError};
use tch::{Kind, Tensor};

use super::range::Range;
use adamw::Moments;

/// The optimizer's state of the elements of one unit that this rank updates.
#[derive(Debug)]
pub struct ShardOptimizer {
    moments: Moments,
    /// fp32 copy of the owned weights, `[owned]`, where the weights themselves are not fp32.
    master: Option<Tensor>,
    /// What is owned, padding left out.
    real: Range,
    /// Elements of the unit, padding left out.
    numel: i64,
    /// Ranges within the owned elements that weight decay applies to: matrices, not norms and biases.
    decayed: Vec<Range>,
}

/// The numbers of one update.
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    /// Gradients are multiplied by it first.
    pub scale: f64,
    /// Counts updates from 1 and includes this one.
    pub step: u64,
    pub options: &'a AdamW,
}

/// One tensor of the state as checkpoints know it: the part of a whole that the owned range has.
#[derive(Debug)]
pub struct StateTensor {
    pub name: &'static str,
    /// A view of the state without padding, flat.
    pub tensor: Tensor,
    /// Where the part begins in the unit's whole tensor of that name.
    pub offset: i64,
    /// Elements of the whole.
    pub whole_len: i64,
}

impl ShardOptimizer {
    /// Zero moments for the elements `owned` of `unit`, which may reach into the padding. `weights` are theirs,
    /// `[owned]`; the state lies on their device.
    #[must_use]
    pub fn new(unit: &UnitSpec, owned: Range, weights: &Tensor) -> Self {
        let numel = unit.numel() as i64;
        let real = owned.intersection(Range { start: 0, len: numel });
        Self {
            moments: Moments::zeros(owned.len, weights.device()),
            master: (weights.kind() != Kind::Float).then(|| weights.to_kind(Kind::Float)),
            real: real.unwrap_or(Range { start: numel, len: 0 }),
            numel,
            decayed: decayed(unit, owned),
        }
    }

    /// Updates the owned weights, `[owned]`, in place. `grad`, `[owned]` in fp32, is scaled in place.
    ///
    /// # Errors
    /// If a tensor does not fit the state.
    pub fn update(&mut self, weights: &mut Tensor, grad: &mut Tensor, update: Update<'_>) -> Result<(), AdamWError> {
        let Update { scale, step, options } = update;
        if scale != 1.0 {
            *grad *= scale;
        }
        let target = self.master.as_mut().unwrap_or(weights);
        if options.weight_decay > 0.0 {
            for range in &self.decayed {
                let mut part = range.of(target);
                part *= 1.0 - options.lr * options.weight_decay;
            }
        }
        self.moments.update(target, grad, step, options)?;
        if let Some(master) = &self.master {
            tch::no_grad(|| weights.copy_(master));
        }
        Ok(())
    }

    /// The state's tensors, `master` last where there is one.
    #[must_use]
    pub fn tensors(&self) -> Vec<StateTensor> {
        let mut named = self.moments.named();
        named.extend(self.master.as_ref().map(|master| ("master", master)));
        let Range { start: offset, len } = self.real;
        let part = |(name, tensor): (&'static str, &Tensor)| StateTensor {
            name,
            tensor: tensor.narrow(0, 0, len),
            offset,
            whole_len: self.numel,
        };
        named.into_iter().map(part).collect()
    }

    /// Makes the master copy from the weights, `[owned]`, for a checkpoint that has none.
    pub fn reset_master(&mut self, weights: &Tensor) {
        if let Some(master) = &mut self.master {
            tch::no_grad(|| master.copy_(weights));
        }
    }

    /// Memory that the state takes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let moments = self.moments.named();
        let tensors = moments.into_iter().map(|(_, tensor)| tensor).chain(&self.master);
        tensors.map(|tensor| tensor.numel() * tensor.kind().elt_size_in_bytes()).sum()
    }
}

/// The parts of `owned` that lie in matrices, relative to its start. transformers decays the same parameters.
fn decayed(unit: &UnitSpec, owned: Range) -> Vec<Range> {
    let mut start = 0;
    let mut ranges = Vec::new();
    for param in &unit.params {
        let range = Range { start, len: param.numel() as i64 };
        if param.shape.len() == 2 {
            ranges.extend(range.intersection(owned).map(|part| part.relative_to(owned.start)));
        }
        start = range.end();
    }
    ranges
}
