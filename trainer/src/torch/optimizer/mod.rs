//! The optimizer: the state of the elements that one rank owns, and the update of their weights.
//!
//! It works on one unit's owned range at a time, which begins at a multiple of [`SHARD_BLOCK`] elements, and knows
//! nothing of stages, gradients' reductions or files. A range of any world size is updated as the whole unit would be.
//!
//! [`SHARD_BLOCK`]: aha_core::manifest::SHARD_BLOCK

mod adamw;
mod adamw_8bit;
mod blocks;
mod muon;
mod selection;
#[cfg(test)]
mod tests;

use aha_core::manifest::UnitSpec;
use aha_core::optimizer::{OptimizerKind, OptimizerOptions};
use aha_nn::comm::{CommError, ProcessGroup};
use aha_nn::optim::{AdamW, AdamWError, has_gpu_adamw};
use tch::{Kind, Tensor};

use super::range::Range;
use adamw::Adamw;
use adamw_8bit::Adamw8bit;
use muon::Muon;
use selection::Selection;

pub(crate) use adamw_8bit::LEAST_NUMEL as LEAST_8BIT_NUMEL;
pub(crate) use muon::serves as muon_serves;

/// The optimizer's state of the elements of one unit that this rank updates.
#[derive(Debug)]
pub struct ShardOptimizer {
    rule: Rule,
    /// fp32 copy of the owned weights, `[owned]`, where the weights themselves are not fp32.
    master: Option<Tensor>,
    /// What is owned, padding left out.
    real: Range,
    /// Elements of the unit, padding left out.
    numel: i64,
    /// Ranges within the owned elements that weight decay applies to: matrices, not norms and biases. transformers
    /// decays the same. Those that Muon updates it decays itself.
    decayed: Vec<Range>,
}

/// How gradients become updates.
#[derive(Debug)]
enum Rule {
    Adamw(Adamw),
    Adamw8bit(Adamw8bit),
    Muon(Muon),
}

/// What one update needs beside weights and gradients.
#[derive(Debug)]
pub struct Update<'a> {
    /// Gradients are multiplied by it first.
    pub scale: f64,
    /// Counts updates from 1 and includes this one.
    pub step: u64,
    pub options: &'a AdamW,
    /// The ranks that own the rest of the unit in equal shards, in their order; `None` where this one owns all of it.
    pub group: Option<&'a ProcessGroup>,
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

#[derive(Debug, thiserror::Error)]
pub enum OptimizerError {
    #[error(transparent)]
    AdamW(#[from] AdamWError),
    #[error(transparent)]
    Comm(#[from] CommError),
}

impl ShardOptimizer {
    /// A fresh state for the elements `owned` of `unit`, which may reach into the padding. `weights` are theirs,
    /// `[owned]`; the state lies on their device.
    #[must_use]
    pub fn new(unit: &UnitSpec, owned: Range, weights: &Tensor, options: &OptimizerOptions) -> Self {
        let device = weights.device();
        let numel = unit.numel() as i64;
        let whole = Range { start: 0, len: numel };
        let real = owned.intersection(whole).unwrap_or(Range { start: numel, len: 0 });
        let rule = match options.kind {
            OptimizerKind::Adamw => Rule::Adamw(Adamw::zeros(Selection::new(&[whole], owned), device)),
            OptimizerKind::Adamw8bit => Rule::Adamw8bit(Adamw8bit::zeros(unit, (owned, real), device)),
            OptimizerKind::Muon => Rule::Muon(Muon::zeros(unit, owned, options.muon, device)),
        };
        let by_muon = options.kind == OptimizerKind::Muon && muon::serves(unit);
        let matrices = param_ranges(unit).filter(|(_, shape)| shape.len() == 2 && !by_muon);
        let part = |(range, _): (Range, &[usize])| Some(range.intersection(owned)?.relative_to(owned.start));
        Self {
            rule,
            master: (weights.kind() != Kind::Float).then(|| weights.to_kind(Kind::Float)),
            real,
            numel,
            decayed: matrices.filter_map(part).collect(),
        }
    }

    /// Updates the owned weights, `[owned]`, in place. `grad`, `[owned]` in fp32, may be overwritten. Where there is a
    /// group, all its ranks call this for the same units in the same order.
    ///
    /// # Errors
    /// If a tensor does not fit the state, or a collective fails.
    pub fn update(
        &mut self,
        weights: &mut Tensor,
        grad: &mut Tensor,
        update: &Update<'_>,
    ) -> Result<(), OptimizerError> {
        let options = update.options;
        let target = self.master.as_ref().unwrap_or(weights);
        if let (Rule::Adamw(adamw), true) = (&mut self.rule, has_gpu_adamw(target.device())) {
            let copy = self.master.as_ref().map(|_| &*weights);
            return Ok(adamw.update_on_gpu((target, copy), grad, &self.decayed, update)?);
        }
        if update.scale != 1.0 {
            *grad *= update.scale;
        }
        if options.weight_decay > 0.0 {
            for range in &self.decayed {
                let mut part = range.of(target);
                part *= 1.0 - options.lr * options.weight_decay;
            }
        }
        match &mut self.rule {
            Rule::Adamw(adamw) => adamw.update(target, grad, update.step, options)?,
            Rule::Adamw8bit(adamw) => adamw.update(target, grad, update.step, options)?,
            Rule::Muon(muon) => muon.update(target, grad, update)?,
        }
        if let Some(master) = &self.master {
            tch::no_grad(|| weights.copy_(master));
        }
        Ok(())
    }

    /// The state's tensors, `master` last where there is one.
    #[must_use]
    pub fn tensors(&self) -> Vec<StateTensor> {
        let mut tensors = match &self.rule {
            Rule::Adamw(adamw) => adamw.tensors(),
            Rule::Adamw8bit(adamw) => adamw.tensors(),
            Rule::Muon(muon) => muon.tensors(),
        };
        tensors.extend(self.master.as_ref().map(|master| StateTensor {
            name: "master",
            tensor: master.narrow(0, 0, self.real.len),
            offset: self.real.start,
            whole_len: self.numel,
        }));
        tensors
    }

    /// Makes the master copy from the weights, `[owned]`, for a checkpoint that has none.
    pub fn reset_master(&mut self, weights: &Tensor) {
        if let Some(master) = &mut self.master {
            tch::no_grad(|| master.copy_(weights));
        }
    }

    /// Memory that the state takes, padding left out.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let tensors = self.tensors();
        tensors.iter().map(|state| state.tensor.numel() * state.tensor.kind().elt_size_in_bytes()).sum()
    }
}

impl StateTensor {
    /// The state of the selected elements, kept one after the other.
    fn selected(name: &'static str, tensor: &Tensor, selection: &Selection) -> Self {
        let tensor = tensor.shallow_clone();
        Self { name, tensor, offset: selection.offset, whole_len: selection.whole_len }
    }
}

/// Where the parameters of a unit lie, with their shapes.
fn param_ranges(unit: &UnitSpec) -> impl Iterator<Item = (Range, &[usize])> {
    unit.params.iter().scan(0, |start, param| {
        let range = Range { start: *start, len: param.numel() as i64 };
        *start = range.end();
        Some((range, param.shape.as_slice()))
    })
}
