//! Where the weights of a model lie on this rank: whole, or a shard of every unit that is gathered for use.

use std::cell::RefCell;
use std::sync::Arc;

use aha_core::manifest::Manifest;
use aha_nn::comm::{CommError, ProcessGroup, Work};
use aha_nn::sharded_weights::ShardedWeights;
use aha_nn::storage::memory_bytes;
use aha_nn::unit::{Loan, ModelWeights, Unit};
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::range::Range;

/// What ranks share out, and what they keep in the CPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sharding {
    /// Of ZeRO: 0 shares nothing out, 1 the optimizer's state, 2 gradients as well, 3 weights as well.
    pub stage: u8,
    /// Keep the optimizer's state in the CPU's memory, and update there.
    pub offload_optimizer: bool,
    /// Keep the shards of stage 3 in the CPU's memory.
    pub offload_params: bool,
}

/// A model's weights on one rank.
#[derive(Debug)]
pub struct Parameters(Inner);

#[derive(Debug)]
enum Inner {
    /// With what other ranks have updated and is still on its way, by unit.
    Whole(Weights, Vec<RefCell<Option<Work>>>),
    Sharded(ShardedWeights),
}

/// Takes in a model unit by unit and keeps what this rank is to hold.
#[derive(Debug)]
pub struct ParametersBuilder {
    sharding: Sharding,
    group: Arc<ProcessGroup>,
    manifest: Manifest,
    kind: Kind,
    device: Device,
    kept: Vec<Tensor>,
}

impl From<u8> for Sharding {
    /// A stage without offload.
    fn from(stage: u8) -> Self {
        Self { stage, offload_optimizer: false, offload_params: false }
    }
}

impl Sharding {
    /// Whether a unit is whole only while it is used. A rank on its own has everything as it is, unless that is in the
    /// CPU's memory.
    #[must_use]
    pub fn gathers(self, world_size: usize) -> bool {
        self.stage == 3 && (world_size > 1 || self.offload_params)
    }

    /// The elements of a unit of `padded` that `rank` updates.
    #[must_use]
    pub fn owned(self, padded: i64, (rank, world_size): (usize, usize)) -> Range {
        if self.stage == 0 {
            return Range { start: 0, len: padded };
        }
        let len = padded / world_size as i64;
        Range { start: rank as i64 * len, len }
    }
}

impl ParametersBuilder {
    /// For the model of `manifest`, of type `kind`, computed on the group's device.
    #[must_use]
    pub fn new(sharding: Sharding, group: &Arc<ProcessGroup>, manifest: Manifest, kind: Kind) -> Self {
        let (group, device) = (Arc::clone(group), group.device());
        Self { sharding, group, manifest, kind, device, kept: Vec::new() }
    }

    /// Takes the next unit's parameters, of any type and device.
    ///
    /// # Panics
    /// If they are not what the manifest says.
    pub fn add(&mut self, params: &[Tensor]) {
        let unit = &self.manifest.units[self.kept.len()];
        assert_eq!(unit.params.len(), params.len(), "parameters of unit {}", unit.name);
        let padded = unit.padded_numel(self.group.size()) as i64;
        let gathers = self.sharding.gathers(self.group.size());
        // A unit that is not to stay need not be on the device.
        let device = if gathers { Device::Cpu } else { self.device };
        let flat = Tensor::zeros([padded], (self.kind, device));
        let mut offset = 0;
        for param in params {
            let numel = param.numel() as i64;
            tch::no_grad(|| flat.narrow(0, offset, numel).copy_(&param.reshape([-1])));
            offset += numel;
        }
        let kept = if gathers { self.shard(&flat) } else { flat };
        self.kept.push(kept);
    }

    /// # Panics
    /// If units are missing.
    #[must_use]
    pub fn finish(self) -> Parameters {
        assert_eq!(self.kept.len(), self.manifest.units.len(), "units of the model");
        Parameters(if self.sharding.gathers(self.group.size()) {
            Inner::Sharded(ShardedWeights::new(self.manifest, self.group, self.kept))
        } else {
            Inner::whole(Weights::from_flats(self.manifest, self.kept))
        })
    }

    /// This rank's part of a unit on the CPU, where it is to be kept.
    fn shard(&self, flat: &Tensor) -> Tensor {
        let owned = self.sharding.owned(flat.size()[0], (self.group.rank(), self.group.size()));
        let shard = owned.of(flat).copy();
        match (self.sharding.offload_params, self.device) {
            (true, device @ Device::Cuda(_)) => shard.pin_memory(device),
            (true, _) => shard,
            (false, device) => shard.to_device(device),
        }
    }
}

impl Parameters {
    /// Takes over weights that are at hand, padded for the size of `group`.
    #[must_use]
    pub fn of(sharding: Sharding, group: &Arc<ProcessGroup>, weights: Weights) -> Self {
        if !sharding.gathers(group.size()) {
            return Self(Inner::whole(weights));
        }
        let mut builder = ParametersBuilder::new(sharding, group, weights.manifest.clone(), weights.kind());
        for unit_idx in 0..weights.num_units() {
            builder.add(&weights.views(unit_idx));
        }
        builder.finish()
    }

    /// The elements that this rank updates, to read and to write.
    ///
    /// # Errors
    /// If what other ranks have updated does not come.
    pub(super) fn owned(&self, unit_idx: usize, owned: Range) -> Result<Tensor, CommError> {
        match &self.0 {
            Inner::Whole(weights, coming) => {
                arrive(&coming[unit_idx])?;
                Ok(owned.of(weights.flat(unit_idx)))
            }
            Inner::Sharded(weights) => Ok(weights.shard(unit_idx)),
        }
    }

    /// Begins to put together a whole unit after each rank has updated its part, where it is to be whole. Whoever uses it
    /// first waits for it.
    pub(super) fn gather(&self, unit_idx: usize, owned: &Tensor, group: &ProcessGroup) -> Result<(), CommError> {
        if let Inner::Whole(weights, coming) = &self.0 {
            let mut flat = weights.flat(unit_idx).shallow_clone();
            *coming[unit_idx].borrow_mut() = Some(group.all_gather_async(&owned.copy(), &mut flat)?);
        }
        Ok(())
    }

    /// Moves these weights towards `other`: `alpha * other + (1 - alpha) * self`. Both are sharded alike.
    pub(super) fn mix(&self, other: &Self, alpha: f64) -> Result<(), CommError> {
        let mix = |mut ours: Tensor, theirs: Tensor| {
            tch::no_grad(|| ours.copy_(&(&ours * (1.0 - alpha) + theirs * alpha)));
        };
        for unit_idx in 0..self.manifest().units.len() {
            match (&self.0, &other.0) {
                (Inner::Sharded(ours), Inner::Sharded(theirs)) => mix(ours.shard(unit_idx), theirs.shard(unit_idx)),
                _ => {
                    let [ours, theirs] = [self.unit(unit_idx)?, other.unit(unit_idx)?];
                    ours.params().into_iter().zip(theirs.params()).for_each(|(ours, theirs)| mix(ours, theirs));
                }
            }
        }
        Ok(())
    }

    /// Whether somebody has them by [`ModelWeights::lend`]: they are not to be written.
    #[must_use]
    pub fn is_lent(&self) -> bool {
        match &self.0 {
            Inner::Whole(weights, _) => weights.is_lent(),
            Inner::Sharded(_) => false,
        }
    }

    /// Bytes that stay between uses of units.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match &self.0 {
            Inner::Whole(weights, _) => (0..weights.num_units()).map(|unit| memory_bytes(weights.flat(unit))).sum(),
            Inner::Sharded(weights) => weights.num_bytes().0,
        }
    }

    /// The most units that ever were gathered at once; 0 where they are always whole.
    #[must_use]
    pub fn most_gathered(&self) -> usize {
        match &self.0 {
            Inner::Whole(..) => 0,
            Inner::Sharded(weights) => weights.most_gathered(),
        }
    }
}

impl Inner {
    fn whole(weights: Weights) -> Self {
        let coming = (0..weights.num_units()).map(|_| RefCell::default()).collect();
        Self::Whole(weights, coming)
    }

    fn weights(&self) -> &dyn ModelWeights {
        match self {
            Self::Whole(weights, _) => weights,
            Self::Sharded(weights) => weights,
        }
    }
}

impl From<Weights> for Parameters {
    fn from(weights: Weights) -> Self {
        Self(Inner::whole(weights))
    }
}

impl ModelWeights for Parameters {
    fn manifest(&self) -> &Manifest {
        self.0.weights().manifest()
    }

    fn kind(&self) -> Kind {
        self.0.weights().kind()
    }

    fn device(&self) -> Device {
        self.0.weights().device()
    }

    fn unit(&self, unit_idx: usize) -> Result<Unit, CommError> {
        if let Inner::Whole(_, coming) = &self.0 {
            arrive(&coming[unit_idx])?;
        }
        self.0.weights().unit(unit_idx)
    }

    fn prefetch(&self, unit_idx: usize) -> Result<(), CommError> {
        self.0.weights().prefetch(unit_idx)
    }

    fn lend(&self) -> Result<Option<Loan>, CommError> {
        if let Inner::Whole(_, coming) = &self.0 {
            coming.iter().try_for_each(arrive)?;
        }
        self.0.weights().lend()
    }
}

fn arrive(coming: &RefCell<Option<Work>>) -> Result<(), CommError> {
    coming.take().map_or(Ok(()), Work::wait)
}
