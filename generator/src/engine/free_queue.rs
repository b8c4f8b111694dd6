//! The blocks that no table holds, in the order in which they are taken.

use super::block_manager::BlockId;

/// A queue of distinct blocks with room for all there are; any of them can be removed, and everything is O(1).
#[derive(Debug)]
pub(super) struct FreeQueue {
    /// `[num_blocks + 1]`, a circle: the last one stands between the queue's end and its start.
    links: Vec<Link>,
    len: usize,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    previous: BlockId,
    next: BlockId,
}

impl FreeQueue {
    /// Holds all of `num_blocks`, the smallest first.
    pub(super) fn full(num_blocks: usize) -> Self {
        let end = BlockId(num_blocks as u32);
        let mut queue = Self { links: vec![Link { previous: end, next: end }; num_blocks + 1], len: 0 };
        (0..num_blocks as u32).for_each(|block| queue.push_back(BlockId(block)));
        queue
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push_front(&mut self, block: BlockId) {
        self.insert(self.end(), block);
    }

    pub(super) fn push_back(&mut self, block: BlockId) {
        self.insert(self.link(self.end()).previous, block);
    }

    pub(super) fn pop_front(&mut self) -> Option<BlockId> {
        let first = self.link(self.end()).next;
        (first != self.end()).then(|| {
            self.remove(first);
            first
        })
    }

    /// Takes a block out that is in the queue.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Link { previous, next } = self.link(block);
        self.join(previous, next);
        self.len -= 1;
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = BlockId> {
        let first = self.link(self.end()).next;
        // Bounded by its length, so that even a broken circle ends.
        std::iter::successors(Some(first), |&block| Some(self.link(block).next)).take(self.len)
    }

    fn insert(&mut self, previous: BlockId, block: BlockId) {
        let next = self.link(previous).next;
        self.join(previous, block);
        self.join(block, next);
        self.len += 1;
    }

    fn join(&mut self, previous: BlockId, next: BlockId) {
        self.links[previous.0 as usize].next = next;
        self.links[next.0 as usize].previous = previous;
    }

    fn link(&self, block: BlockId) -> Link {
        self.links[block.0 as usize]
    }

    fn end(&self) -> BlockId {
        BlockId(self.links.len() as u32 - 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::super::testing::Random;
    use super::*;

    #[test]
    fn it_behaves_as_a_deque_through_10_000_random_operations() {
        let (mut queue, mut random) = (FreeQueue::full(12), Random::new(1));
        let mut model: VecDeque<BlockId> = (0..12).map(BlockId).collect();
        for _ in 0..10_000 {
            let block = BlockId(random.below(12) as u32);
            match (random.below(3), model.iter().position(|&free| free == block)) {
                (0, _) => assert_eq!(queue.pop_front(), model.pop_front()),
                (_, Some(index)) => {
                    queue.remove(block);
                    model.remove(index);
                }
                (1, None) => {
                    queue.push_front(block);
                    model.push_front(block);
                }
                (_, None) => {
                    queue.push_back(block);
                    model.push_back(block);
                }
            }
            assert!(queue.iter().eq(model.iter().copied()) && queue.len() == model.len());
        }
    }
}
