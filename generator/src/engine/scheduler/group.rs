//! Groups of samples: how waiting ones are admitted, and get their prompt from those that run.

use std::ops::Range;

use super::{Scheduler, WATERMARK_DIVISOR};
use crate::engine::block_manager::{BlockCopy, BlockTable};
use crate::engine::prefix::Prefix;
use crate::engine::request::RequestKey;
use crate::engine::sequence::{Running, Sequence, SequenceId};

/// The samples of one request; gone when the last one ends.
#[derive(Debug)]
pub(super) struct Group {
    /// Ids of its sequences, ended ones included.
    pub(super) members: Range<SequenceId>,
}

/// Where a waiting sample gets the shared tokens of its prompt from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PromptSource {
    /// A running sample that has so many of them in the cache.
    Running(SequenceId, usize),
    /// The leader is computing them: wait for it.
    InProgress,
    /// Nobody of the group: become the leader.
    Absent,
}

impl Scheduler {
    /// Moves waiting sequences into the step, oldest first, while there is room.
    pub(super) fn admit(
        &mut self,
        mut budget: usize,
        copies: &mut Vec<BlockCopy>,
        scheduled: &mut Vec<(SequenceId, usize)>,
    ) {
        let mut next = SequenceId(0);
        while budget > 0 && self.running.len() < self.config.max_num_seqs {
            let Some((&id, sequence)) = self.waiting.range(next..).next() else { return };
            let members = &self.groups[&sequence.task.key].members;
            let source = self.prompt_source(sequence.task.key);
            if source == PromptSource::InProgress {
                next = members.end;
                continue;
            }
            if !self.admit_one(id, source, copies) {
                return;
            }
            let num_tokens = self.running[&id].num_uncomputed().min(budget);
            budget -= num_tokens;
            scheduled.push((id, num_tokens));
            next = SequenceId(id.0 + 1);
        }
    }

    /// Gives a waiting sequence blocks for all the tokens it has; false if there are not enough.
    fn admit_one(&mut self, id: SequenceId, source: PromptSource, copies: &mut Vec<BlockCopy>) -> bool {
        let Some(sequence) = self.waiting.remove(&id) else { return false };
        let mut running = self.start(source, sequence);
        let (num_known, num_tokens) = (running.num_computed, running.sequence.num_tokens());
        let watermark = if self.running.is_empty() { 0 } else { self.blocks.num_total() / WATERMARK_DIVISOR };
        let num_wanted = self.blocks.num_to_grow(&running.block_table, &(num_known..num_tokens)) + watermark;
        if self.blocks.num_free() >= num_wanted
            && let Ok(copy) = self.blocks.grow(&mut running.block_table, num_known..num_tokens)
        {
            copies.extend(copy);
            self.running.insert(id, running);
            if self.config.enable_prefix_caching {
                self.counters.prefix_cache_queries += num_tokens as u64;
                self.counters.prefix_cache_hits += num_known as u64;
            }
            return true;
        }
        self.blocks.free(running.block_table);
        self.waiting.insert(id, running.sequence);
        false
    }

    /// A sequence with those of its tokens that are in the cache: registered ones, or what a sample of its group has
    /// where that is more.
    fn start(&mut self, source: PromptSource, sequence: Sequence) -> Running {
        let (mut block_table, prefix) = self.find_registered(&sequence);
        let mut num_computed = prefix.num_blocks() * self.config.block_size;
        if let PromptSource::Running(donor, num_shared) = source
            && num_shared > num_computed
        {
            let forked = self.blocks.fork(&self.running[&donor].block_table, num_shared);
            self.blocks.free(std::mem::replace(&mut block_table, forked));
            num_computed = num_shared;
        }
        Running { sequence, block_table, num_computed, prefix, ran_across_swap: false }
    }

    /// A table over the longest run of registered blocks that a sequence begins with. Its last token is never among
    /// them: the next one is sampled from its row.
    fn find_registered(&mut self, sequence: &Sequence) -> (BlockTable, Prefix) {
        let (mut block_table, mut prefix) = (BlockTable::default(), Prefix::new(self.version));
        let is_on = self.config.enable_prefix_caching;
        let most = if is_on { (sequence.num_tokens() - 1) / self.config.block_size } else { 0 };
        for index in 0..most {
            let longer = prefix.then(&sequence.block(index, self.config.block_size));
            if !self.blocks.append_registered(&mut block_table, longer) {
                break;
            }
            prefix = longer;
        }
        (block_table, prefix)
    }

    fn prompt_source(&self, key: RequestKey) -> PromptSource {
        let mut source = PromptSource::Absent;
        for (&id, member) in self.running.range(self.groups[&key].members.clone()) {
            if !member.ran_across_swap {
                match member.num_tokens_to_share(self.config.block_size) {
                    Some(num_tokens) => return PromptSource::Running(id, num_tokens),
                    None => source = PromptSource::InProgress,
                }
            }
        }
        source
    }

    /// Takes a sequence that ended out of the scheduler.
    pub(super) fn retire(&mut self, id: SequenceId) {
        let key = if let Some(running) = self.running.remove(&id) {
            self.blocks.free(running.block_table);
            running.sequence.task.key
        } else if let Some(sequence) = self.waiting.remove(&id) {
            sequence.task.key
        } else {
            return;
        };
        let members = self.groups[&key].members.clone();
        if self.waiting.range(members.clone()).next().is_none() && self.running.range(members).next().is_none() {
            self.groups.remove(&key);
        }
    }

    /// Says what is wrong if the parts of the scheduler contradict each other.
    pub(super) fn check_invariants(&self) -> Result<(), String> {
        self.blocks.check_invariants(self.running.values().map(|running| &running.block_table))?;
        if self.running.len() > self.config.max_num_seqs {
            return Err(format!("{} sequences are running", self.running.len()));
        }
        for (key, group) in &self.groups {
            let num_waiting = self.waiting.range(group.members.clone()).count();
            let running: Vec<&Running> =
                self.running.range(group.members.clone()).map(|(_, running)| running).collect();
            if num_waiting + running.len() == 0 {
                return Err(format!("{key} has no sequence left"));
            }
            for Running { sequence, block_table, num_computed, .. } in running {
                let num_slots = block_table.ids().len() * self.config.block_size;
                if *num_computed >= sequence.num_tokens() || *num_computed > num_slots {
                    return Err(format!(
                        "sample {} of {key} has {num_computed} computed tokens",
                        sequence.sample_index
                    ));
                }
            }
        }
        let members = self.groups.values().map(|group| (group.members.end.0 - group.members.start.0) as usize).sum();
        if self.waiting.len() + self.running.len() > members {
            return Err("a sequence belongs to no group".to_owned());
        }
        Ok(())
    }
}
