//! The KV cache as numbered blocks: which are free, and how many tables hold each of the others.
//!
//! A block has room for the keys and values of `block_size` consecutive tokens. Tables may share blocks, and a shared
//! block is never written: [`BlockManager::grow`] first replaces it in the writer's table. Everything is O(1) per block
//! that changes hands. The scheme is that of PagedAttention (Kwon et al., SOSP 2023).

use std::ops::Range;

/// A block of the KV cache, `0..num_blocks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// Keys and values of all slots of `from`, in every layer, go to `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: BlockId,
    pub to: BlockId,
}

/// The blocks of one sequence, in order of positions. Holds references: it goes back by [`BlockManager::free`].
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct BlockTable(Vec<BlockId>);

impl BlockTable {
    pub(super) fn ids(&self) -> &[BlockId] {
        &self.0
    }
}

/// More blocks are needed than are free; nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OutOfBlocks;

/// Who owns what in the KV cache.
#[derive(Debug)]
pub(super) struct BlockManager {
    block_size: usize,
    /// `[num_blocks]`, tables that hold each block.
    ref_counts: Vec<u32>,
    /// Blocks that no table holds; the last one freed is taken first.
    free: Vec<BlockId>,
}

impl BlockManager {
    pub(super) fn new(num_blocks: usize, block_size: usize) -> Self {
        let free = (0..num_blocks as u32).rev().map(BlockId).collect();
        Self { block_size, ref_counts: vec![0; num_blocks], free }
    }

    pub(super) fn num_total(&self) -> usize {
        self.ref_counts.len()
    }

    pub(super) fn num_free(&self) -> usize {
        self.free.len()
    }

    pub(super) fn num_used(&self) -> usize {
        self.num_total() - self.num_free()
    }

    /// Free blocks that [`BlockManager::grow`] would take.
    pub(super) fn num_to_grow(&self, table: &BlockTable, positions: &Range<usize>) -> usize {
        let (first, end) = (positions.start / self.block_size, positions.end.div_ceil(self.block_size));
        let held = &table.0[first..end.min(table.0.len()).max(first)];
        held.iter().filter(|&&block| self.is_shared(block)).count() + end.saturating_sub(table.0.len())
    }

    /// Makes `positions` of `table` writable, where all positions before them are held already: appends blocks, and
    /// puts fresh ones in the place of shared ones. If the first of these holds earlier positions too, the copy to
    /// perform before writing comes back.
    ///
    /// # Errors
    /// If there are not enough free blocks.
    pub(super) fn grow(
        &mut self,
        table: &mut BlockTable,
        positions: Range<usize>,
    ) -> Result<Option<BlockCopy>, OutOfBlocks> {
        if self.num_to_grow(table, &positions) > self.free.len() {
            return Err(OutOfBlocks);
        }
        let (first, end) = (positions.start / self.block_size, positions.end.div_ceil(self.block_size));
        let mut copy = None;
        for index in first..end.min(table.0.len()) {
            let from = table.0[index];
            if self.is_shared(from) {
                let to = self.take();
                self.release(from);
                table.0[index] = to;
                if index == first && !positions.start.is_multiple_of(self.block_size) {
                    copy = Some(BlockCopy { from, to });
                }
            }
        }
        while table.0.len() < end {
            table.0.push(self.take());
        }
        Ok(copy)
    }

    /// A second table over the blocks that hold the first `num_tokens` tokens of `table`.
    pub(super) fn fork(&mut self, table: &BlockTable, num_tokens: usize) -> BlockTable {
        let blocks = table.0[..num_tokens.div_ceil(self.block_size)].to_vec();
        blocks.iter().for_each(|block| self.ref_counts[block.0 as usize] += 1);
        BlockTable(blocks)
    }

    /// `table` without the blocks beyond its first `num_tokens` tokens.
    pub(super) fn truncate(&mut self, mut table: BlockTable, num_tokens: usize) -> BlockTable {
        for block in table.0.drain(num_tokens.div_ceil(self.block_size)..) {
            self.release(block);
        }
        table
    }

    pub(super) fn free(&mut self, table: BlockTable) {
        self.truncate(table, 0);
    }

    /// Says what is wrong if `tables`, which are all that exist, do not account for every block.
    pub(super) fn check_invariants<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut held = vec![0_u32; self.ref_counts.len()];
        for block in tables.flat_map(BlockTable::ids) {
            held[block.0 as usize] += 1;
        }
        for (index, (&held, &counted)) in held.iter().zip(&self.ref_counts).enumerate() {
            if held != counted {
                return Err(format!("block {index} is held {held} times and counted {counted} times"));
            }
        }
        for block in &self.free {
            if std::mem::replace(&mut held[block.0 as usize], 1) != 0 {
                return Err(format!("block {} is free, and held or free a second time", block.0));
            }
        }
        match held.iter().position(|&count| count == 0) {
            Some(lost) => Err(format!("block {lost} is neither free nor held")),
            None => Ok(()),
        }
    }

    fn is_shared(&self, block: BlockId) -> bool {
        self.ref_counts[block.0 as usize] > 1
    }

    fn take(&mut self) -> BlockId {
        let block = self.free.pop().expect("grow compares what it needs with the free list first");
        self.ref_counts[block.0 as usize] = 1;
        block
    }

    fn release(&mut self, block: BlockId) {
        let count = &mut self.ref_counts[block.0 as usize];
        *count -= 1;
        if *count == 0 {
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Random;
    use super::*;

    const BLOCK_SIZE: usize = 4;

    fn manager(num_blocks: usize) -> BlockManager {
        BlockManager::new(num_blocks, BLOCK_SIZE)
    }

    fn table_of(manager: &mut BlockManager, num_tokens: usize) -> BlockTable {
        let mut table = BlockTable::default();
        assert_eq!(manager.grow(&mut table, 0..num_tokens), Ok(None));
        table
    }

    #[test]
    fn a_group_holds_the_full_blocks_of_its_prompt_once() {
        let mut manager = manager(100);
        let leader = table_of(&mut manager, 10);
        let mut siblings: Vec<BlockTable> = (0..7).map(|_| manager.fork(&leader, 10)).collect();
        assert_eq!(manager.num_used(), 3);
        for sibling in &mut siblings {
            let copy = manager.grow(sibling, 10..11).unwrap();
            assert_eq!(copy, Some(BlockCopy { from: leader.ids()[2], to: sibling.ids()[2] }));
            assert_eq!(sibling.ids()[..2], leader.ids()[..2]);
        }
        assert_eq!(manager.num_used(), 2 + 8);
        manager.check_invariants(siblings.iter().chain([&leader])).unwrap();
    }

    #[test]
    fn a_block_that_is_written_from_its_first_slot_is_replaced_without_a_copy() {
        let mut manager = manager(4);
        let leader = table_of(&mut manager, 8);
        let mut sibling = manager.fork(&leader, 8);
        assert_eq!(manager.grow(&mut sibling, 4..8), Ok(None));
        assert_eq!(sibling.ids()[0], leader.ids()[0]);
        assert_ne!(sibling.ids()[1], leader.ids()[1]);
    }

    #[test]
    fn the_last_holder_of_a_block_writes_it_in_place() {
        let mut manager = manager(4);
        let leader = table_of(&mut manager, 6);
        let mut sibling = manager.fork(&leader, 6);
        manager.free(leader);
        assert_eq!(manager.num_to_grow(&sibling, &(6..7)), 0);
        assert_eq!(manager.grow(&mut sibling, 6..7), Ok(None));
    }

    #[test]
    fn growing_beyond_the_free_blocks_changes_nothing() {
        let mut manager = manager(3);
        let mut table = table_of(&mut manager, 8);
        assert_eq!(manager.grow(&mut table, 8..13), Err(OutOfBlocks));
        assert_eq!((table.ids().len(), manager.num_free()), (2, 1));
        manager.check_invariants([&table].into_iter()).unwrap();
    }

    /// What a table holds, and what each slot of the cache holds, as a model beside the manager: a write gives a fresh
    /// value to a position of one table, and no other table may see it.
    #[derive(Debug, Default)]
    struct Model {
        tables: Vec<(BlockTable, Vec<u64>)>,
        slots: Vec<u64>,
        num_writes: u64,
    }

    impl Model {
        fn write(&mut self, manager: &mut BlockManager, index: usize, positions: Range<usize>) -> bool {
            let (table, values) = &mut self.tables[index];
            let needed = manager.num_to_grow(table, &positions);
            let free = manager.num_free();
            let Ok(copy) = manager.grow(table, positions.clone()) else {
                assert!(needed > free && manager.num_free() == free);
                return false;
            };
            assert_eq!(free - manager.num_free(), needed);
            if let Some(BlockCopy { from, to }) = copy {
                let from = from.0 as usize * BLOCK_SIZE;
                self.slots.copy_within(from..from + BLOCK_SIZE, to.0 as usize * BLOCK_SIZE);
            }
            values.truncate(positions.start);
            for position in positions {
                self.num_writes += 1;
                values.push(self.num_writes);
                self.slots[slot(table, position)] = self.num_writes;
            }
            true
        }

        fn check(&self, manager: &BlockManager) {
            manager.check_invariants(self.tables.iter().map(|(table, _)| table)).unwrap();
            for (table, values) in &self.tables {
                for (position, &value) in values.iter().enumerate() {
                    assert_eq!(self.slots[slot(table, position)], value);
                }
            }
        }
    }

    fn slot(table: &BlockTable, position: usize) -> usize {
        table.ids()[position / BLOCK_SIZE].0 as usize * BLOCK_SIZE + position % BLOCK_SIZE
    }

    #[test]
    fn invariants_hold_through_100_000_random_operations() {
        let (mut random, mut manager) = (Random::new(1), manager(24));
        let mut model = Model { slots: vec![0; 24 * BLOCK_SIZE], ..Model::default() };
        let mut counts = [0_u32; 5];
        for _ in 0..100_000 {
            let operation = random.below(5);
            counts[operation] += 1;
            let index = random.below(model.tables.len().max(1));
            match operation {
                // A new sequence; if it does not fit, the youngest is preempted.
                0 => {
                    model.tables.push((BlockTable::default(), Vec::new()));
                    let youngest = model.tables.len() - 1;
                    if !model.write(&mut manager, youngest, 0..1 + random.below(20)) {
                        model.tables.pop().into_iter().for_each(|(table, _)| manager.free(table));
                        model.tables.pop().into_iter().for_each(|(table, _)| manager.free(table));
                    }
                }
                _ if model.tables.is_empty() => {}
                1 => {
                    let len = model.tables[index].1.len();
                    let start = len - random.below(len.min(3) + 1);
                    model.write(&mut manager, index, start..start + 1 + random.below(6));
                }
                2 => {
                    let (table, values) = &model.tables[index];
                    let num_tokens = random.below(values.len() + 1);
                    let forked = (manager.fork(table, num_tokens), values[..num_tokens].to_vec());
                    model.tables.push(forked);
                }
                3 => {
                    let (table, mut values) = model.tables.swap_remove(index);
                    values.truncate(random.below(values.len() + 1));
                    model.tables.push((manager.truncate(table, values.len()), values));
                }
                _ => manager.free(model.tables.swap_remove(index).0),
            }
            model.check(&manager);
        }
        assert!(counts.iter().all(|&count| count > 15_000), "{counts:?}");
        model.tables.into_iter().for_each(|(table, _)| manager.free(table));
        assert_eq!(manager.num_free(), 24);
        manager.check_invariants(std::iter::empty()).unwrap();
    }
}
