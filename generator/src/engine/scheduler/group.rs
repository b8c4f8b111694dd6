//! Groups of samples: how waiting ones are admitted and get their prompt, and who leaves it to them.

use std::ops::Range;

use super::{Scheduler, WATERMARK_DIVISOR};
use crate::engine::block_manager::{BlockCopy, BlockTable};
use crate::engine::request::RequestKey;
use crate::engine::sequence::{Running, SequenceId, Task};

/// The samples of one request; gone when the last one ends.
#[derive(Debug)]
pub(super) struct Group {
    /// Ids of its sequences, ended ones included.
    pub(super) members: Range<SequenceId>,
    /// Blocks of the prompt's shared tokens, left by a sample that ended for the next one to be admitted. Nobody else
    /// of the group has them.
    pub(super) parked_prompt: Option<BlockTable>,
}

/// Where a waiting sample gets the shared tokens of its prompt from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PromptSource {
    /// A running sample that has them in the cache.
    Running(SequenceId),
    Parked,
    /// The leader is computing them: wait for it.
    InProgress,
    /// Nobody: become the leader.
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
        let key = sequence.task.key;
        let (mut block_table, num_computed) = self.take_prompt(source, &sequence.task);
        let positions = num_computed..sequence.num_tokens();
        let watermark = if self.running.is_empty() { 0 } else { self.blocks.num_total() / WATERMARK_DIVISOR };
        let num_wanted = self.blocks.num_to_grow(&block_table, &positions) + watermark;
        // What is still parked is for younger groups: an older one's would have been taken before this sequence's turn.
        while self.blocks.num_free() < num_wanted && self.drop_parked_prompt() {}
        if self.blocks.num_free() >= num_wanted
            && let Ok(copy) = self.blocks.grow(&mut block_table, positions)
        {
            copies.extend(copy);
            self.running.insert(id, Running { sequence, block_table, num_computed, version: self.version });
            return true;
        }
        self.waiting.insert(id, sequence);
        match self.groups.get_mut(&key) {
            Some(group) if source == PromptSource::Parked => group.parked_prompt = Some(block_table),
            _ => self.blocks.free(block_table),
        }
        false
    }

    fn prompt_source(&self, key: RequestKey) -> PromptSource {
        let group = &self.groups[&key];
        let mut source = if group.parked_prompt.is_some() { PromptSource::Parked } else { PromptSource::Absent };
        for (&id, member) in self.running.range(group.members.clone()) {
            if member.version != self.version {
                continue;
            }
            if member.has_prompt() {
                return PromptSource::Running(id);
            }
            source = PromptSource::InProgress;
        }
        source
    }

    /// A table over the shared tokens of a prompt, and how many tokens are computed in it.
    fn take_prompt(&mut self, source: PromptSource, task: &Task) -> (BlockTable, usize) {
        let parked = match source {
            PromptSource::Running(donor) => {
                let donor = &self.running[&donor].block_table;
                Some(self.blocks.fork(donor, task.num_shared_tokens()))
            }
            PromptSource::Parked => self.groups.get_mut(&task.key).and_then(|group| group.parked_prompt.take()),
            PromptSource::InProgress | PromptSource::Absent => None,
        };
        parked.map_or((BlockTable::default(), 0), |table| (table, task.num_shared_tokens()))
    }

    /// Takes a sequence that ended out of the scheduler.
    pub(super) fn retire(&mut self, id: SequenceId) {
        let key = if let Some(running) = self.running.remove(&id) {
            let key = running.sequence.task.key;
            self.park_or_free(running);
            key
        } else if let Some(sequence) = self.waiting.remove(&id) {
            sequence.task.key
        } else {
            return;
        };
        let members = self.groups[&key].members.clone();
        if self.waiting.range(members.clone()).next().is_none() && self.running.range(members).next().is_none() {
            let group = self.groups.remove(&key);
            group.and_then(|group| group.parked_prompt).into_iter().for_each(|table| self.blocks.free(table));
        }
    }

    /// Frees the blocks of a sequence that ended, but for the prompt's if it was the last to have the prompt and others
    /// of its group wait.
    fn park_or_free(&mut self, ended: Running) {
        let task = &ended.sequence.task;
        let is_usable = ended.has_prompt() && ended.version == self.version;
        let is_last = self.prompt_source(task.key) == PromptSource::Absent;
        match self.groups.get_mut(&task.key) {
            Some(group) if is_usable && is_last && self.waiting.range(group.members.clone()).next().is_some() => {
                group.parked_prompt = Some(self.blocks.truncate(ended.block_table, task.num_shared_tokens()));
            }
            _ => self.blocks.free(ended.block_table),
        }
    }

    /// Frees the prompt that is parked for the youngest group; false if none is parked.
    pub(super) fn drop_parked_prompt(&mut self) -> bool {
        let parked = self.groups.values_mut().filter(|group| group.parked_prompt.is_some());
        let youngest = parked.max_by_key(|group| group.members.start);
        match youngest.and_then(|group| group.parked_prompt.take()) {
            Some(table) => {
                self.blocks.free(table);
                true
            }
            None => false,
        }
    }

    /// Says what is wrong if the parts of the scheduler contradict each other.
    pub(super) fn check_invariants(&self) -> Result<(), String> {
        let parked = self.groups.values().filter_map(|group| group.parked_prompt.as_ref());
        let tables = self.running.values().map(|running| &running.block_table).chain(parked);
        self.blocks.check_invariants(tables)?;
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
            if group.parked_prompt.is_some() && running.iter().any(|running| running.version == self.version) {
                return Err(format!("{key} has a parked prompt and a running sample"));
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
