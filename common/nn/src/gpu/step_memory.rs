//! The integers of a step: what the host says, and what came out, in one piece of memory that is copied at once.

use tch::{Kind, Tensor};

use super::queue::{GpuError, Queue};
use crate::kernels::cuda::{DevicePtr, StateField};

/// A part of the memory. Log-probs, uniforms and sampling parameters are fp32, by their bits.
///
/// `S` sequences, `N` rows, `K` steps between two looks of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Region {
    /// `[S, K]`.
    LoggedTokens,
    /// `[S, K]`.
    LoggedLogProbs,
    /// `[S]`: what was sampled last, as are the next two.
    Tokens,
    LogProbs,
    Statuses,
    /// `[StateField::COUNT, S]`.
    State,
    /// `[S, 4]`.
    Params,
    /// `[S, max_stops]`.
    Stops,
    /// `[S]`: of rows that decode in a step with prompts.
    ContextLens,
    /// `[S, 3]`: chunks of prompts.
    Spans,
    /// `[N]`: of all rows in a step with prompts, as are the next two.
    InputTokens,
    Positions,
    Slots,
    /// `[N]`: rows whose logits are wanted.
    Selected,
    /// `[S, max_blocks]`. Last, so that only the rows in use need to be copied.
    BlockTables,
}

/// How large a step may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// `S`.
    pub sequences: usize,
    /// `N`.
    pub rows: usize,
    /// `K`.
    pub steps: usize,
    pub stops: usize,
    pub blocks: usize,
}

/// On the host, and on the device.
#[derive(Debug)]
pub(super) struct StepMemory {
    pub(super) bounds: Bounds,
    /// What the host has written, and what it has read.
    ints: Vec<i32>,
    /// The same where copies are fast, `[len]`.
    host: Tensor,
    /// `[len]`.
    device: Tensor,
}

const NUM_REGIONS: usize = Region::BlockTables as usize + 1;

impl Bounds {
    fn lens(&self) -> [usize; NUM_REGIONS] {
        let Self { sequences: s, rows: n, steps: k, stops, blocks } = *self;
        [s * k, s * k, s, s, s, StateField::COUNT * s, 4 * s, stops * s, s, 3 * s, n, n, n, n, blocks * s]
    }

    fn start(&self, region: Region) -> usize {
        self.lens()[..region as usize].iter().sum()
    }
}

impl StepMemory {
    pub(super) fn new(queue: &impl Queue, bounds: Bounds) -> Result<Self, GpuError> {
        let len = bounds.lens().iter().sum();
        let host = queue.host_memory(len)?;
        let device = Tensor::f_zeros([len as i64], (Kind::Int, queue.device()))?;
        Ok(Self { bounds, ints: vec![0; len], host, device })
    }

    /// The element `index` of a region in the device's memory.
    pub(super) fn address(&self, region: Region, index: usize) -> DevicePtr {
        DevicePtr::of(&self.device).at(self.bounds.start(region) + index, size_of::<i32>())
    }

    pub(super) fn state(&self, field: StateField, row: usize) -> DevicePtr {
        field.address(self.address(Region::State, row), self.bounds.sequences)
    }

    /// What was read last, or is written next.
    pub(super) fn region(&mut self, region: Region) -> &mut [i32] {
        let start = self.bounds.start(region);
        &mut self.ints[start..start + self.bounds.lens()[region as usize]]
    }

    pub(super) fn field(&mut self, field: StateField) -> &mut [i32] {
        let sequences = self.bounds.sequences;
        &mut self.region(Region::State)[field as usize * sequences..][..sequences]
    }

    /// Writes the row `index` of a region whose rows are as long as `values`.
    pub(super) fn put(&mut self, region: Region, index: usize, values: &[i32]) {
        self.region(region)[index * values.len()..][..values.len()].copy_from_slice(values);
    }

    /// Writes the row `index` of the stop tokens or block tables, negative past its end.
    pub(super) fn put_ids(&mut self, region: Region, index: usize, ids: &[u32]) {
        let width = if region == Region::Stops { self.bounds.stops } else { self.bounds.blocks };
        let row = &mut self.region(region)[index * width..][..width];
        let (ids_part, rest) = row.split_at_mut(ids.len());
        ids_part.iter_mut().zip(ids).for_each(|(target, &id)| *target = id as i32);
        rest.fill(-1);
    }

    /// No row is in use.
    pub(super) fn clear(&mut self) {
        self.region(Region::State).fill(0);
        self.field(StateField::Slot).fill(-1);
        self.region(Region::Stops).fill(-1);
    }

    /// Copies all that the host writes to the device, with the block tables of `num_tables` sequences.
    pub(super) fn upload(&mut self, num_tables: usize) -> Result<(), GpuError> {
        let start = self.bounds.start(Region::State);
        let len = self.bounds.start(Region::BlockTables) + num_tables * self.bounds.blocks - start;
        let [mut host, mut device] = [&self.host, &self.device].map(|all| all.narrow(0, start as i64, len as i64));
        host.f_copy_(&Tensor::f_from_slice(&self.ints[start..start + len])?)?;
        Ok(device.f_copy_(&host)?)
    }

    /// Copies all that the device writes to the host, once everything before is done.
    pub(super) fn download(&mut self) -> Result<(), GpuError> {
        let len = self.bounds.start(Region::Params);
        let [mut host, device] = [&self.host, &self.device].map(|all| all.narrow(0, 0, len as i64));
        host.f_copy_(&device)?;
        host.f_copy_data(&mut self.ints[..len], len)?;
        Ok(())
    }
}
