//! Weights of which every rank keeps a shard, gathered a unit at a time for as long as it is used: stage 3 of ZeRO (arXiv
//! 1910.02054).
//!
//! A unit's flat tensor and its views always exist, and so may a graph that keeps them for its backward pass. What comes
//! and goes is their memory: a gather fills a buffer, which is then put under the flat tensor, and taken away when the last
//! [`Unit`] is dropped. (FSDP of PyTorch resizes the storage to the same end.)

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use aha_core::manifest::Manifest;
use tch::{Device, Kind, Tensor};

use crate::comm::{CommError, ProcessGroup, Work};
use crate::storage::{memory_bytes, swap_memory};
use crate::unit::{ModelWeights, Unit};
use crate::weights::split;

/// One rank's shards of a model.
#[derive(Debug)]
pub struct ShardedWeights {
    manifest: Manifest,
    kind: Kind,
    device: Device,
    group: Arc<ProcessGroup>,
    units: Vec<ShardedUnit>,
    pool: Rc<Pool>,
}

#[derive(Debug)]
struct ShardedUnit {
    /// `[padded / W]`.
    shard: Tensor,
    /// `[padded]`, with memory while it is used.
    flat: Tensor,
    state: RefCell<State>,
}

#[derive(Debug)]
enum State {
    Away,
    /// A gather fills the buffer.
    Coming(Work, Tensor),
    Here(Weak<Gathered>),
}

/// A unit's flat tensor with its memory.
#[derive(Debug)]
struct Gathered {
    flat: Tensor,
    /// The buffer whose memory it is.
    buffer: Tensor,
    pool: Rc<Pool>,
}

/// Buffers of whole units.
#[derive(Debug)]
struct Pool {
    /// How many units have this size. A buffer that fits one unit alone is not kept.
    num_units: BTreeMap<i64, usize>,
    free: RefCell<Vec<Tensor>>,
    num_used: Cell<usize>,
    most_used: Cell<usize>,
}

impl ShardedWeights {
    /// `shards` are this rank's, one a unit: `[padded / W]` of type `kind`, on the group's device or the CPU.
    #[must_use]
    pub fn new(manifest: Manifest, group: Arc<ProcessGroup>, shards: Vec<Tensor>) -> Self {
        let device = group.device();
        let kind = shards[0].kind();
        let mut num_units = BTreeMap::new();
        let units: Vec<ShardedUnit> = shards
            .into_iter()
            .map(|shard| {
                let padded = (shard.numel() * group.size()) as i64;
                *num_units.entry(padded).or_insert(0) += 1;
                let mut flat = Tensor::empty([padded], (kind, device));
                swap_memory(&mut flat, &mut Tensor::empty([0], (kind, device)));
                ShardedUnit { shard, flat, state: RefCell::new(State::Away) }
            })
            .collect();
        let pool = Pool { num_units, free: RefCell::default(), num_used: Cell::new(0), most_used: Cell::new(0) };
        Self { manifest, kind, device, group, units, pool: Rc::new(pool) }
    }

    /// This rank's part of a unit, to read or to write: `[padded / W]`.
    ///
    /// # Panics
    /// If the unit is gathered or being gathered: what is gathered would be of two times.
    pub fn shard(&self, unit_idx: usize) -> Tensor {
        let unit = &self.units[unit_idx];
        let is_away = match &*unit.state.borrow() {
            State::Away => true,
            State::Coming(..) => false,
            State::Here(gathered) => gathered.strong_count() == 0,
        };
        assert!(is_away, "the shard of unit {unit_idx} is asked for while the unit is gathered");
        unit.shard.shallow_clone()
    }

    /// The most units that ever were whole at once, those on their way included.
    #[must_use]
    pub fn most_gathered(&self) -> usize {
        self.pool.most_used.get()
    }

    /// Bytes of the shards, and of the buffers that are kept for units.
    #[must_use]
    pub fn num_bytes(&self) -> (usize, usize) {
        let shards = self.units.iter().map(|unit| memory_bytes(&unit.shard)).sum();
        (shards, self.pool.free.borrow().iter().map(memory_bytes).sum())
    }

    fn gather(&self, unit: &ShardedUnit) -> Result<(Work, Tensor), CommError> {
        let mut buffer = self.pool.take(&unit.flat);
        // From pinned memory the copy does not wait.
        let shard = unit.shard.to_device_(self.device, self.kind, true, false);
        let work = self.group.all_gather_async(&shard, &mut buffer)?;
        Ok((work, buffer))
    }
}

impl ModelWeights for ShardedWeights {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn device(&self) -> Device {
        self.device
    }

    fn unit(&self, unit_idx: usize) -> Result<Unit, CommError> {
        let unit = &self.units[unit_idx];
        let mut state = unit.state.borrow_mut();
        let present = match &*state {
            State::Here(gathered) => gathered.upgrade(),
            _ => None,
        };
        let gathered = match present {
            Some(gathered) => gathered,
            None => {
                let (work, mut buffer) = match std::mem::replace(&mut *state, State::Away) {
                    State::Coming(work, buffer) => (work, buffer),
                    _ => self.gather(unit)?,
                };
                work.wait()?;
                let mut flat = unit.flat.shallow_clone();
                swap_memory(&mut flat, &mut buffer);
                let gathered = Rc::new(Gathered { flat, buffer, pool: Rc::clone(&self.pool) });
                *state = State::Here(Rc::downgrade(&gathered));
                gathered
            }
        };
        let params = split(&unit.flat, &self.manifest, unit_idx);
        Ok(Unit::new(unit.flat.shallow_clone(), params, Some(gathered)))
    }

    fn prefetch(&self, unit_idx: usize) -> Result<(), CommError> {
        let unit = &self.units[unit_idx];
        let mut state = unit.state.borrow_mut();
        let is_away = match &*state {
            State::Away => true,
            State::Coming(..) => false,
            State::Here(gathered) => gathered.strong_count() == 0,
        };
        if is_away {
            let (work, buffer) = self.gather(unit)?;
            *state = State::Coming(work, buffer);
        }
        Ok(())
    }
}

impl Drop for Gathered {
    fn drop(&mut self) {
        swap_memory(&mut self.flat, &mut self.buffer);
        self.pool.give_back(self.buffer.shallow_clone());
    }
}

impl Pool {
    /// A buffer as large as `flat`.
    fn take(&self, flat: &Tensor) -> Tensor {
        self.num_used.set(self.num_used.get() + 1);
        self.most_used.set(self.most_used.get().max(self.num_used.get()));
        let mut free = self.free.borrow_mut();
        match free.iter().position(|buffer| buffer.size() == flat.size()) {
            Some(index) => free.swap_remove(index),
            None => Tensor::empty(flat.size(), (flat.kind(), flat.device())),
        }
    }

    fn give_back(&self, buffer: Tensor) {
        self.num_used.set(self.num_used.get() - 1);
        let numel = buffer.numel() as i64;
        if self.num_units.get(&numel).is_some_and(|&num_units| num_units > 1) {
            self.free.borrow_mut().push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use aha_core::random::derive_seed;

    use super::*;
    use crate::comm::ProcessGroup;
    use crate::model_config::ModelConfig;
    use crate::weights::Weights;

    /// Random calls: what is gathered is always what the shards say, and memory is there exactly while it is used.
    #[test]
    fn random_uses_always_see_the_current_shards() {
        let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 33, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2});
        let config = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
        let whole = Weights::random(&config, 7, 1, Kind::Float, Device::Cpu);
        let num_units = whole.num_units();
        for case in 0..40 {
            let group = Arc::new(ProcessGroup::solo("test", Device::Cpu));
            let shards = (0..num_units).map(|unit_idx| whole.flat(unit_idx).copy()).collect();
            let sharded = ShardedWeights::new(config.manifest(), group, shards);
            let mut expect: Vec<Tensor> = (0..num_units).map(|unit_idx| whole.flat(unit_idx).copy()).collect();
            let mut held: Vec<(usize, Unit)> = Vec::new();
            let mut coming: Vec<usize> = Vec::new();
            for turn in 0..60 {
                let draw = |what: u64, bound: u64| (derive_seed(case, &[turn, what]) % bound) as usize;
                let unit_idx = draw(1, num_units as u64);
                match draw(0, 4) {
                    0 if held.len() < 3 => {
                        held.push((unit_idx, sharded.unit(unit_idx).unwrap()));
                        coming.retain(|&other| other != unit_idx);
                    }
                    1 if held.iter().all(|(other, _)| *other != unit_idx) && !coming.contains(&unit_idx) => {
                        sharded.prefetch(unit_idx).unwrap();
                        coming.push(unit_idx);
                    }
                    2 if !held.is_empty() => drop(held.swap_remove(draw(2, held.len() as u64))),
                    3 if held.iter().all(|(other, _)| *other != unit_idx) && !coming.contains(&unit_idx) => {
                        let mut shard = sharded.shard(unit_idx);
                        shard += 1.0;
                        expect[unit_idx] = &expect[unit_idx] + 1.0;
                    }
                    _ => {}
                }
                for (unit_idx, unit) in &held {
                    assert!(unit.flat().equal(&expect[*unit_idx]), "case {case}, turn {turn}, unit {unit_idx}");
                    let first = unit.params().remove(0).reshape([-1]);
                    assert!(first.equal(&expect[*unit_idx].narrow(0, 0, first.numel() as i64)));
                }
                for (unit_idx, unit) in sharded.units.iter().enumerate() {
                    let is_held = held.iter().any(|(other, _)| *other == unit_idx);
                    assert_eq!(crate::storage::has_memory(&unit.flat), is_held);
                }
                let in_use: std::collections::BTreeSet<_> = held.iter().map(|(unit, _)| *unit).collect();
                assert_eq!(sharded.pool.num_used.get(), in_use.len() + coming.len());
            }
        }
    }
}
