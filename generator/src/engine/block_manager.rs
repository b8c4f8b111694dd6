//! The KV cache as numbered blocks: which are free, how many tables hold each of the others, and which can be found
//! again by what they hold.
//!
//! A block has room for the keys and values of `block_size` consecutive tokens. Tables may share blocks, and a shared
//! block is never written: [`BlockManager::grow`] first replaces it in the writer's table. The scheme is that of
//! PagedAttention (Kwon et al., SOSP 2023).
//!
//! A full block may be registered under the [`Prefix`] that ends with it. When no table holds it any more it is free
//! and can be found all the same, until it is taken for something else: those that hold nothing of use are taken first,
//! then registered ones, the one that has been free longest first. Everything is O(1) per block that changes hands.

use std::collections::HashMap;
use std::ops::Range;

use super::free_queue::FreeQueue;
use super::prefix::Prefix;

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
    /// `[num_blocks]`
    blocks: Vec<Block>,
    /// Blocks that no table holds: those that are not registered, the last one freed first, then the registered ones,
    /// the first one freed first.
    free: FreeQueue,
    registered: HashMap<Prefix, BlockId>,
    /// Of the free blocks, those that are registered.
    num_cached: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// Tables that hold it.
    num_holders: u32,
    /// What it is registered under.
    prefix: Option<Prefix>,
}

impl BlockManager {
    pub(super) fn new(num_blocks: usize, block_size: usize) -> Self {
        let blocks = vec![Block::default(); num_blocks];
        Self { block_size, blocks, free: FreeQueue::full(num_blocks), registered: HashMap::new(), num_cached: 0 }
    }

    pub(super) fn num_total(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn num_free(&self) -> usize {
        self.free.len()
    }

    pub(super) fn num_used(&self) -> usize {
        self.num_total() - self.num_free()
    }

    /// Blocks that are free and can be found.
    pub(super) fn num_cached(&self) -> usize {
        self.num_cached
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
        if self.num_to_grow(table, &positions) > self.num_free() {
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
            } else {
                self.unregister(from);
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
        blocks.iter().for_each(|&block| self.block_mut(block).num_holders += 1);
        BlockTable(blocks)
    }

    pub(super) fn free(&mut self, table: BlockTable) {
        // Backwards: the end of a prefix is of no use without its start, and so is to be taken first.
        table.0.into_iter().rev().for_each(|block| self.release(block));
    }

    /// Registers the block of `table` that `prefix` ends with, whose keys and values are complete. If another block is
    /// registered under it already, that one stays.
    pub(super) fn register(&mut self, table: &BlockTable, prefix: Prefix) {
        let block = table.0[prefix.num_blocks() - 1];
        if self.block(block).prefix.is_none() && !self.registered.contains_key(&prefix) {
            self.registered.insert(prefix, block);
            self.block_mut(block).prefix = Some(prefix);
        }
    }

    /// Appends the block that is registered under `prefix` to a table of those before it; false if there is none.
    pub(super) fn append_registered(&mut self, table: &mut BlockTable, prefix: Prefix) -> bool {
        debug_assert_eq!(table.0.len() + 1, prefix.num_blocks());
        let Some(&block) = self.registered.get(&prefix) else { return false };
        if self.block(block).num_holders == 0 {
            self.free.remove(block);
            self.num_cached -= 1;
        }
        self.block_mut(block).num_holders += 1;
        table.0.push(block);
        true
    }

    /// Forgets what the blocks hold: none of them is found any more. O(registered blocks).
    pub(super) fn unregister_all(&mut self) {
        for block in std::mem::take(&mut self.registered).into_values() {
            self.block_mut(block).prefix = None;
        }
        self.num_cached = 0;
    }

    /// Says what is wrong if `tables`, which are all that exist, do not account for every block.
    pub(super) fn check_invariants<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut held = vec![0_u32; self.blocks.len()];
        for block in tables.flat_map(BlockTable::ids) {
            held[block.0 as usize] += 1;
        }
        for (index, (&held, block)) in held.iter().zip(&self.blocks).enumerate() {
            if held != block.num_holders {
                return Err(format!("block {index} is held {held} times and counted {} times", block.num_holders));
            }
            let found = block.prefix.map(|prefix| self.registered.get(&prefix));
            if found.is_some_and(|found| found != Some(&BlockId(index as u32))) {
                return Err(format!("block {index} is not found under its own prefix"));
            }
        }
        for block in self.free.iter() {
            if std::mem::replace(&mut held[block.0 as usize], 1) != 0 {
                return Err(format!("block {} is free, and held or free a second time", block.0));
            }
        }
        if let Some(lost) = held.iter().position(|&count| count == 0) {
            return Err(format!("block {lost} is neither free nor held"));
        }
        let is_registered: Vec<bool> = self.free.iter().map(|block| self.block(block).prefix.is_some()).collect();
        let num_cached = is_registered.iter().filter(|&&is_registered| is_registered).count();
        if num_cached != self.num_cached || !is_registered.is_sorted() {
            return Err(format!("{} blocks are cached by count, in the free queue {is_registered:?}", self.num_cached));
        }
        let num_registered = self.blocks.iter().filter(|block| block.prefix.is_some()).count();
        if num_registered != self.registered.len() {
            return Err(format!("{num_registered} blocks have a prefix, {} are registered", self.registered.len()));
        }
        Ok(())
    }

    fn is_shared(&self, block: BlockId) -> bool {
        self.block(block).num_holders > 1
    }

    fn take(&mut self) -> BlockId {
        let block = self.free.pop_front().expect("grow compares what it needs with the free queue first");
        if self.unregister(block) {
            self.num_cached -= 1;
        }
        self.block_mut(block).num_holders = 1;
        block
    }

    fn release(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        block.num_holders -= 1;
        match block {
            Block { num_holders: 0, prefix: Some(_) } => {
                self.free.push_back(id);
                self.num_cached += 1;
            }
            Block { num_holders: 0, prefix: None } => self.free.push_front(id),
            Block { .. } => {}
        }
    }

    /// Whether it was registered.
    fn unregister(&mut self, block: BlockId) -> bool {
        let prefix = self.block_mut(block).prefix.take();
        prefix.is_some_and(|prefix| self.registered.remove(&prefix).is_some())
    }

    fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }
}

#[cfg(test)]
mod tests;
