//! Which tokens are computed in the next step: continuous batching with chunked prefill, as in vLLM's v1 scheduler.
//!
//! There is no prefill phase and no decode phase: a running sequence has tokens, of which some are computed, and a step
//! computes more of them. Rules:
//! - Older sequences come first, in everything. Of running ones, each that decodes gets its one token; what is left of
//!   the budget goes to prompts, in chunks; then waiting ones are admitted, in order.
//! - A sequence is admitted when blocks for all tokens it has are free. When a running one needs a block and none is
//!   free, the youngest running one is preempted: it loses its blocks, waits in its place by age, and is computed again.
//!   So the oldest always advances, and as every sequence fits when it is alone, every one finishes.
//! - The samples of a request share their prompt. The first admitted, the leader, computes it; the others wait for it,
//!   then fork its block table up to the last token of the prompt but one, and compute the last one themselves, each for
//!   a logits row of its own. They write that token's keys and values, so a block that it shares with earlier tokens is
//!   copied: what stays shared are the full blocks of the prompt without its last token. Any running sample that has
//!   the prompt can be forked. When the last such one ends while others wait, the prompt is parked for them; parked
//!   prompts are the first to go when blocks are short.
//! - Keys and values filled by other weights than those that serve are never forked or parked.
//! - A step in which every sequence decodes may sample several tokens of each, into blocks that are free: nobody is
//!   preempted for that.

mod group;

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use aha_core::config::KvPolicy;
use aha_core::ids::PolicyVersion;

use super::batch::{BatchItem, Sampled, StepBatch};
use super::block_manager::{BlockCopy, BlockManager, BlockTable};
use super::config::EngineConfig;
use super::request::{Refusal, RequestKey, TokenEvent};
use super::sequence::{Running, Sequence, SequenceId, Task};
use super::stats::Counters;
use group::Group;

/// Admission leaves one block in this many free, so that those already running can grow for a while before one of them
/// is preempted; vLLM's watermark.
const WATERMARK_DIVISOR: usize = 100;

/// All sequences in flight. Those that wait hold no blocks.
#[derive(Debug)]
pub(super) struct Scheduler {
    config: EngineConfig,
    blocks: BlockManager,
    /// Weights that serve.
    version: PolicyVersion,
    groups: BTreeMap<RequestKey, Group>,
    waiting: BTreeMap<SequenceId, Sequence>,
    running: BTreeMap<SequenceId, Running>,
    next_id: u64,
    counters: Counters,
}

/// What one step computes: goes to the runner, and back to [`Scheduler::complete`] with what was sampled.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub(super) batch: StepBatch,
    /// Sequence of every item of the batch.
    sequences: Vec<SequenceId>,
}

/// A token event and the request that it belongs to.
pub(super) type Output = (RequestKey, TokenEvent);

impl Scheduler {
    /// `config` has passed its check.
    pub(super) fn new(config: EngineConfig) -> Self {
        Self {
            blocks: BlockManager::new(config.num_blocks, config.block_size),
            version: config.version,
            config,
            groups: BTreeMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            next_id: 0,
            counters: Counters::default(),
        }
    }

    /// Queues one sequence for each of `sample_indices`.
    ///
    /// # Errors
    /// If the request can never be served, or its key is taken.
    pub(super) fn add(&mut self, task: Task, sample_indices: &[u32]) -> Result<(), Refusal> {
        self.check_request(&task, sample_indices)?;
        let (key, task) = (task.key, Arc::new(task));
        let first = SequenceId(self.next_id);
        for &sample_index in sample_indices {
            self.waiting.insert(SequenceId(self.next_id), Sequence::new(Arc::clone(&task), sample_index));
            self.next_id += 1;
        }
        self.groups.insert(key, Group { members: first..SequenceId(self.next_id) });
        Ok(())
    }

    /// Decides on the next step. It is empty only if nothing is in flight.
    pub(super) fn schedule(&mut self) -> Step {
        debug_assert_eq!(self.check_invariants(), Ok(()));
        let (mut copies, mut scheduled) = (Vec::new(), Vec::new());
        let num_decodes = self.running.values().filter(|running| running.is_decoding()).count();
        let mut budget = self.config.max_num_batched_tokens - num_decodes;
        let preemptions = self.counters.preemptions;
        let mut next = self.running.first_key_value().map(|(&id, _)| id);
        while let Some(id) = next {
            let decodes_now = self.running[&id].is_decoding();
            let num_tokens = if decodes_now { 1 } else { self.running[&id].num_uncomputed().min(budget) };
            if num_tokens > 0 && self.grow_or_preempt(id, num_tokens, &mut copies) {
                budget -= if decodes_now { 0 } else { num_tokens };
                scheduled.push((id, num_tokens));
            }
            next = self.running.range((Excluded(id), Unbounded)).next().map(|(&id, _)| id);
        }
        // Whoever was preempted just now would be admitted again at once, at the cost of those who needed the blocks.
        if self.counters.preemptions == preemptions {
            self.admit(budget, &mut copies, &mut scheduled);
        }
        scheduled.sort_by_cached_key(|(id, _)| !self.running[id].is_decoding());
        let num_sampled = self.look_ahead(&scheduled);
        self.step_of(copies, scheduled.into_iter().zip(num_sampled))
    }

    /// Takes what the runner made of a step. Between the two calls nothing else may be called.
    ///
    /// # Errors
    /// If there are not as many sampled tokens as were asked for.
    pub(super) fn complete(&mut self, step: &Step, sampled: Vec<Sampled>) -> anyhow::Result<Vec<Output>> {
        let num_sampled = sampled.len();
        let mut sampled = sampled.into_iter();
        let mut outputs = Vec::with_capacity(num_sampled);
        for (&id, item) in step.sequences.iter().zip(&step.batch.items) {
            let is_prompt = !self.running[&id].is_decoding();
            self.counters.prompt_tokens += if is_prompt { item.tokens.len() as u64 } else { 0 };
            self.take_computed(id, item.tokens.len());
            for index in 0..item.num_to_sample() {
                // Each token but the last was computed to sample the next one.
                self.take_computed(id, usize::from(index > 0));
                let Some(sampled) = sampled.next() else {
                    anyhow::bail!("the runner sampled {num_sampled} tokens, and more are wanted")
                };
                let output = self.take_sampled(id, sampled);
                let is_last = output.1.finish().is_some();
                outputs.push(output);
                if is_last {
                    break;
                }
            }
        }
        let num_wanted = outputs.len();
        anyhow::ensure!(num_sampled == num_wanted, "the runner sampled {num_sampled} tokens, {num_wanted} are wanted");
        self.counters.steps += 1;
        Ok(outputs)
    }

    /// Notes that keys and values of a running sequence's next tokens are in the cache.
    fn take_computed(&mut self, id: SequenceId, num_tokens: usize) {
        let running = self.running.get_mut(&id).expect("a sequence runs from its scheduling to its completion");
        running.num_computed += num_tokens;
        // One that ran across a swap has attended to keys and values of the weights before.
        if num_tokens > 0 && self.config.enable_prefix_caching && !running.ran_across_swap {
            running.register_computed(&mut self.blocks, self.config.block_size);
        }
    }

    /// Appends a token to a running sequence, which may end with it.
    fn take_sampled(&mut self, id: SequenceId, Sampled { token, logprob, raw }: Sampled) -> Output {
        let running = self.running.get_mut(&id).expect("a sequence runs until its last token");
        self.counters.generation_tokens += 1;
        let finish = running.sequence.push(token);
        let (key, sample_index) = (running.sequence.task.key, running.sequence.sample_index);
        if finish.is_some() {
            self.retire(id);
        }
        (key, TokenEvent::Token { sample_index, token, logprob, raw, version: self.version, finish })
    }

    /// Ends a sample that was found to have ended with its token number `num_tokens`. Nothing happens if it has ended
    /// already.
    pub(super) fn finish(&mut self, key: RequestKey, sample_index: u32, num_tokens: usize) {
        let Some(group) = self.groups.get(&key) else { return };
        let running = self.running.range(group.members.clone()).map(|(&id, running)| (id, &running.sequence));
        let waiting = self.waiting.range(group.members.clone()).map(|(&id, sequence)| (id, sequence));
        let Some((id, sequence)) = running.chain(waiting).find(|(_, sequence)| sequence.sample_index == sample_index)
        else {
            return;
        };
        self.counters.dropped_tokens += sequence.completion.len().saturating_sub(num_tokens) as u64;
        self.retire(id);
    }

    /// Ends a request; the indices of its samples that were not finished come back.
    pub(super) fn abort(&mut self, key: RequestKey) -> Vec<u32> {
        let Some(group) = self.groups.remove(&key) else { return Vec::new() };
        let mut unfinished = Vec::new();
        while let Some((&id, _)) = self.waiting.range(group.members.clone()).next() {
            unfinished.extend(self.waiting.remove(&id).map(|sequence| sequence.sample_index));
        }
        while let Some((&id, _)) = self.running.range(group.members.clone()).next() {
            unfinished.extend(self.running.remove(&id).map(|running| {
                self.blocks.free(running.block_table);
                running.sequence.sample_index
            }));
        }
        unfinished.sort_unstable();
        unfinished
    }

    /// Goes on under other weights.
    pub(super) fn set_version(&mut self, version: PolicyVersion) {
        match self.config.kv {
            KvPolicy::Recompute => self.release_all(),
            KvPolicy::Keep => {
                self.blocks.unregister_all();
                self.running.values_mut().for_each(|running| running.ran_across_swap = true);
            }
        }
        self.version = version;
    }

    /// Frees every block and forgets what it held: all running sequences wait, to be computed again.
    pub(super) fn release_all(&mut self) {
        while self.preempt_youngest() {}
        self.blocks.unregister_all();
    }

    /// A table of blocks for `num_tokens` tokens that belong to no sequence; [`Scheduler::give_back`] takes it back.
    /// Preempts where it must.
    ///
    /// # Errors
    /// If there are not as many blocks in all.
    pub(super) fn borrow_blocks(&mut self, num_tokens: usize) -> Result<BlockTable, Refusal> {
        self.config.check_fits(num_tokens, 0)?;
        let mut table = BlockTable::default();
        while self.blocks.grow(&mut table, 0..num_tokens).is_err() {
            assert!(self.preempt_youngest(), "{num_tokens} tokens do not fit into a cache that holds nothing else");
        }
        Ok(table)
    }

    pub(super) fn give_back(&mut self, table: BlockTable) {
        self.blocks.free(table);
    }

    pub(super) fn has_work(&self) -> bool {
        !self.groups.is_empty()
    }

    /// Whether a request has unfinished samples.
    pub(super) fn is_in_flight(&self, key: RequestKey) -> bool {
        self.groups.contains_key(&key)
    }

    pub(super) fn version(&self) -> PolicyVersion {
        self.version
    }

    pub(super) fn num_running(&self) -> usize {
        self.running.len()
    }

    pub(super) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn num_used_blocks(&self) -> usize {
        self.blocks.num_used()
    }

    pub(super) fn num_cached_blocks(&self) -> usize {
        self.blocks.num_cached()
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    fn check_request(&self, task: &Task, sample_indices: &[u32]) -> Result<(), Refusal> {
        let mut sorted = sample_indices.to_vec();
        sorted.sort_unstable();
        if task.prompt.is_empty() {
            Err(Refusal::EmptyPrompt)
        } else if task.sampling.max_tokens == 0 {
            Err(Refusal::NoTokensWanted)
        } else if sorted.is_empty() {
            Err(Refusal::NoSamples)
        } else if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Err(Refusal::DuplicateSample(twice[0]))
        } else if self.groups.contains_key(&task.key) {
            Err(Refusal::DuplicateKey(task.key))
        } else {
            self.config.check_fits(task.prompt.len(), task.sampling.max_tokens as usize)
        }
    }

    /// Makes the next `num_tokens` positions of a running sequence writable, at the cost of younger ones; false if it
    /// was itself the youngest and had to go.
    fn grow_or_preempt(&mut self, id: SequenceId, num_tokens: usize, copies: &mut Vec<BlockCopy>) -> bool {
        while let Some(running) = self.running.get_mut(&id) {
            let positions = running.num_computed..running.num_computed + num_tokens;
            if let Ok(copy) = self.blocks.grow(&mut running.block_table, positions) {
                copies.extend(copy);
                return true;
            }
            self.preempt_youngest();
        }
        false
    }

    fn preempt_youngest(&mut self) -> bool {
        let Some((id, running)) = self.running.pop_last() else { return false };
        tracing::debug!(request = %running.sequence.task.key, sample = running.sequence.sample_index, "preempted");
        self.blocks.free(running.block_table);
        self.waiting.insert(id, running.sequence);
        self.counters.preemptions += 1;
        true
    }

    /// How many tokens each scheduled sequence samples: one, or more where all do nothing but decode, as far as blocks
    /// are free. What waits could not be admitted to this step anyway.
    fn look_ahead(&mut self, scheduled: &[(SequenceId, usize)]) -> Vec<usize> {
        let most = self.config.steps_per_look;
        let goes_alone = |running: &Running| running.is_decoding() && !running.sequence.needs_host();
        if most == 1 || !scheduled.iter().all(|(id, _)| goes_alone(&self.running[id])) {
            return vec![1; scheduled.len()];
        }
        let mut num_to_sample = Vec::with_capacity(scheduled.len());
        for (id, _) in scheduled {
            let Some(Running { sequence, block_table, num_computed, .. }) = self.running.get_mut(id) else { continue };
            let most = most.min(sequence.num_left());
            // The block of the first token is its own already, so there is nothing to copy.
            let fits = |num: &usize| self.blocks.grow(block_table, *num_computed + 1..*num_computed + num).is_ok();
            num_to_sample.push((2..=most).rev().find(fits).unwrap_or(1));
        }
        num_to_sample
    }

    fn step_of(&self, copies: Vec<BlockCopy>, scheduled: impl Iterator<Item = ((SequenceId, usize), usize)>) -> Step {
        let mut step = Step { batch: StepBatch { copies, items: Vec::new() }, sequences: Vec::new() };
        for ((id, num_tokens), num_to_sample) in scheduled {
            let Running { sequence, block_table, num_computed, .. } = &self.running[&id];
            let end = num_computed + num_tokens;
            step.sequences.push(id);
            step.batch.items.push(BatchItem {
                tokens: sequence.tokens(*num_computed..end),
                start: *num_computed,
                block_table: block_table.ids().to_vec(),
                choose: (end == sequence.num_tokens()).then(|| sequence.choose(num_to_sample)),
            });
        }
        step
    }
}

#[cfg(test)]
mod tests;
