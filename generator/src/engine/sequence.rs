//! One sample of a request: its tokens, and how it goes on.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use aha_core::ids::TokenId;
use aha_core::random::sampling_uniform;
use aha_core::rollout::{FinishReason, Sampling};

use super::batch::{Ahead, Choose};
use super::block_manager::{BlockManager, BlockTable};
use super::prefix::Prefix;
use super::request::RequestKey;

/// Names a sequence inside the scheduler, in order of arrival: the smaller, the older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SequenceId(pub(super) u64);

/// What the samples of a request have in common.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) key: RequestKey,
    pub(super) prompt: Vec<TokenId>,
    /// `allowed_token_ids` is ascending, none twice.
    pub(super) sampling: Arc<Sampling>,
    pub(super) seed: u64,
    /// Tokens that end a completion, sorted.
    stop_token_ids: Arc<[TokenId]>,
    nothing: Arc<[TokenId]>,
}

impl Task {
    pub(super) fn new(
        key: RequestKey,
        prompt: Vec<TokenId>,
        mut sampling: Sampling,
        seed: u64,
        eos_token_ids: &[TokenId],
    ) -> Self {
        let stop_token_ids: BTreeSet<TokenId> = match sampling.ignore_eos {
            true => BTreeSet::new(),
            false => eos_token_ids.iter().chain(&sampling.stop_token_ids).copied().collect(),
        };
        let stop_token_ids = stop_token_ids.into_iter().collect();
        sampling.allowed_token_ids.sort_unstable();
        sampling.allowed_token_ids.dedup();
        Self { key, prompt, sampling: Arc::new(sampling), seed, stop_token_ids, nothing: Arc::new([]) }
    }

    /// Tokens of the prompt whose keys and values its samples share. The last one is computed by every sample for
    /// itself: from its row comes the sample's first token.
    pub(super) fn num_shared_tokens(&self) -> usize {
        self.prompt.len() - 1
    }
}

/// One sample and what has been sampled so far: all that is needed to compute it again from nothing.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) task: Arc<Task>,
    pub(super) sample_index: u32,
    pub(super) completion: Vec<TokenId>,
    /// Of [`Choose::counts`]: a function of prompt and completion.
    counts: Vec<(TokenId, u32)>,
}

impl Sequence {
    pub(super) fn new(task: Arc<Task>, sample_index: u32) -> Self {
        let mut counts = Vec::new();
        if task.sampling.repetition_penalty != 1.0 {
            counts.extend(task.prompt.iter().map(|&token| (token, 0)));
            counts.sort_unstable();
            counts.dedup();
        }
        Self { task, sample_index, completion: Vec::new(), counts }
    }

    pub(super) fn num_tokens(&self) -> usize {
        self.task.prompt.len() + self.completion.len()
    }

    /// Tokens at `positions`, of prompt and completion together.
    pub(super) fn tokens(&self, positions: Range<usize>) -> Vec<TokenId> {
        let split = self.task.prompt.len();
        let prompt = &self.task.prompt[positions.start.min(split)..positions.end.min(split)];
        let completion = &self.completion[positions.start.max(split) - split..positions.end.max(split) - split];
        [prompt, completion].concat()
    }

    /// Tokens of one whole block.
    pub(super) fn block(&self, index: usize, block_size: usize) -> Vec<TokenId> {
        self.tokens(index * block_size..(index + 1) * block_size)
    }

    /// How the next token is to be sampled, or the next `num_tokens` ones.
    pub(super) fn choose(&self, num_tokens: usize) -> Choose {
        let position = self.completion.len() as u32;
        let suppress =
            if position < self.task.sampling.min_tokens { &self.task.stop_token_ids } else { &self.task.nothing };
        Choose {
            sampling: Arc::clone(&self.task.sampling),
            uniform: sampling_uniform(self.task.seed, self.sample_index, position),
            suppress: Arc::clone(suppress),
            counts: self.counts.clone(),
            ahead: (num_tokens > 1).then(|| Ahead {
                num_tokens,
                seed: self.task.seed,
                sample_index: self.sample_index,
                num_generated: position,
                stop_token_ids: Arc::clone(&self.task.stop_token_ids),
            }),
        }
    }

    /// Tokens that may be sampled yet.
    pub(super) fn num_left(&self) -> usize {
        (self.task.sampling.max_tokens as usize).saturating_sub(self.completion.len())
    }

    /// Whether the host must see each token before the next one is sampled.
    pub(super) fn needs_host(&self) -> bool {
        let Task { sampling, stop_token_ids, .. } = &*self.task;
        sampling.edits_logits() || sampling.logprobs > 0 || stop_token_ids.len() > Ahead::MAX_STOPS
    }

    /// Takes the next token; says why if the sequence ends with it.
    pub(super) fn push(&mut self, token: TokenId) -> Option<FinishReason> {
        self.completion.push(token);
        let Sampling { min_tokens, max_tokens, .. } = *self.task.sampling;
        if self.task.sampling.has_penalties() {
            match self.counts.binary_search_by_key(&token, |&(counted, _)| counted) {
                Ok(place) => self.counts[place].1 += 1,
                Err(place) => self.counts.insert(place, (token, 1)),
            }
        }
        let may_stop = self.completion.len() > min_tokens as usize;
        if may_stop && self.task.stop_token_ids.binary_search(&token).is_ok() {
            Some(FinishReason::Stop)
        } else if self.completion.len() >= max_tokens as usize {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

/// A sequence with blocks of the KV cache.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) sequence: Sequence,
    pub(super) block_table: BlockTable,
    /// Tokens whose keys and values are in the cache; under the number of tokens.
    pub(super) num_computed: usize,
    /// Its blocks that are registered.
    pub(super) prefix: Prefix,
    /// Whether weights changed since it was admitted: its oldest keys and values may be of other ones.
    pub(super) ran_across_swap: bool,
}

impl Running {
    pub(super) fn num_uncomputed(&self) -> usize {
        self.sequence.num_tokens() - self.num_computed
    }

    /// Tokens of the prompt that other samples can take over: all that they share, or else all whole blocks of those.
    pub(super) fn num_tokens_to_share(&self, block_size: usize) -> Option<usize> {
        let all = self.sequence.task.num_shared_tokens();
        let whole_blocks = all - all % block_size;
        if self.num_computed >= all {
            Some(all)
        } else {
            (0 < whole_blocks && whole_blocks <= self.num_computed).then_some(whole_blocks)
        }
    }

    /// Registers the blocks that are computed to their end.
    pub(super) fn register_computed(&mut self, blocks: &mut BlockManager, block_size: usize) {
        for index in self.prefix.num_blocks()..self.num_computed / block_size {
            self.prefix = self.prefix.then(&self.sequence.block(index, block_size));
            blocks.register(&self.block_table, self.prefix);
        }
    }

    /// Whether only the newest token is to be computed, and it was sampled.
    pub(super) fn is_decoding(&self) -> bool {
        self.num_uncomputed() == 1 && !self.sequence.completion.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(sampling: Sampling) -> Sequence {
        let task = Task::new(RequestKey(1), vec![10, 11, 12], sampling, 7, &[2]);
        Sequence::new(Arc::new(task), 3)
    }

    #[track_caller]
    fn check_end(sampling: Sampling, tokens: &[TokenId], expect: Option<FinishReason>) {
        let mut sequence = sequence(sampling);
        for (index, &token) in tokens.iter().enumerate() {
            let finish = sequence.push(token);
            assert_eq!(finish, if index + 1 == tokens.len() { expect } else { None }, "after {} tokens", index + 1);
        }
    }

    #[test]
    fn a_completion_ends_by_eos_a_stop_token_or_its_length() {
        let sampling = Sampling { max_tokens: 3, stop_token_ids: vec![9], ..Sampling::default() };
        check_end(sampling.clone(), &[5, 2], Some(FinishReason::Stop));
        check_end(sampling.clone(), &[9], Some(FinishReason::Stop));
        check_end(sampling.clone(), &[5, 5, 5], Some(FinishReason::Length));
        check_end(sampling.clone(), &[5, 5, 9], Some(FinishReason::Stop));
        check_end(sampling.clone(), &[5, 5], None);
        check_end(Sampling { ignore_eos: true, ..sampling }, &[2, 9, 2], Some(FinishReason::Length));
    }

    #[test]
    fn nothing_ends_a_completion_before_min_tokens() {
        let sampling = Sampling { min_tokens: 2, ..Sampling::default() };
        check_end(sampling.clone(), &[5, 2, 2], Some(FinishReason::Stop));
        let mut sequence = sequence(sampling);
        let mut suppressed = Vec::new();
        for _ in 0..3 {
            suppressed.push(sequence.choose(1).suppress.to_vec());
            sequence.push(5);
        }
        assert_eq!(suppressed, [vec![2], vec![2], vec![]]);
    }

    #[test]
    fn penalties_count_the_prompt_once_and_the_completion_as_it_grows() {
        let counts = |sampling| {
            let mut sequence = sequence(sampling);
            for token in [20, 11, 20, 5] {
                sequence.push(token);
            }
            sequence.choose(1).counts
        };
        let penalty = |repetition_penalty, frequency_penalty| Sampling {
            repetition_penalty,
            frequency_penalty,
            ..Sampling::default()
        };
        assert_eq!(counts(penalty(1.1, 0.0)), [(5, 1), (10, 0), (11, 1), (12, 0), (20, 2)]);
        assert_eq!(counts(penalty(1.0, -0.1)), [(5, 1), (11, 1), (20, 2)]);
        assert_eq!(counts(Sampling { presence_penalty: 1.0, ..penalty(1.0, 0.0) }), [(5, 1), (11, 1), (20, 2)]);
        assert_eq!(counts(penalty(1.0, 0.0)), []);
    }

    #[test]
    fn tokens_and_randomness_go_by_position() {
        let mut sequence = sequence(Sampling::default());
        sequence.push(20);
        sequence.push(21);
        assert_eq!(sequence.tokens(0..5), [10, 11, 12, 20, 21]);
        assert_eq!(sequence.tokens(1..2), [11]);
        assert_eq!(sequence.tokens(2..4), [12, 20]);
        assert_eq!(sequence.tokens(4..5), [21]);
        assert_eq!(sequence.choose(1).uniform, sampling_uniform(7, 3, 2));
    }
}
