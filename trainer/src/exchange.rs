//! Completions between ranks: each rolled out some of the step's prompts, and all get everything.
//!
//! Tokens and log-probs are small beside activations and weights. With all of them on every rank, advantages, the
//! partition and the packing are pure functions that each rank computes alike, and nothing else needs agreement.

use aha_core::rollout::{Completion, Group, Prompt};
use aha_nn::comm::{CommError, ProcessGroup};
use aha_proto::{BadMessage, v1};
use prost::Message;

#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error("rank {rank} sent completions that cannot be read: {reason}")]
    Unreadable { rank: usize, reason: String },
    #[error("{prompt} has completions {got:?} after the exchange, not 0..{expected}")]
    Incomplete { prompt: aha_core::ids::PromptId, got: Vec<u32>, expected: usize },
}

/// The prompts of a step that `rank` rolls out: every `world_size`-th.
#[must_use]
pub fn share(prompts: &[Prompt], rank: usize, world_size: usize) -> Vec<Prompt> {
    prompts.iter().skip(rank).step_by(world_size).cloned().collect()
}

/// Gives every rank the groups of all `prompts`, in their order, each with `num_generations` completions; `None` for those
/// that their rank has not.
///
/// # Errors
/// If a collective fails, or a group is not complete: a rank that lost a completion must not train.
pub fn exchange(
    group: &ProcessGroup,
    prompts: Vec<Prompt>,
    own: Vec<Option<Group>>,
    num_generations: usize,
) -> Result<Vec<Option<Group>>, ExchangeError> {
    let mut bytes = Vec::new();
    for completion in own.into_iter().flatten().flat_map(|group| group.completions) {
        let message = v1::Completion::from(completion);
        message.encode_length_delimited(&mut bytes).expect("a vector grows as long as there is memory");
    }
    let mut by_rank = Vec::new();
    for (rank, bytes) in group.all_gather_bytes(&bytes)?.iter().enumerate() {
        let completions = decode(bytes).map_err(|reason| ExchangeError::Unreadable { rank, reason })?;
        by_rank.push(completions.into_iter().peekable());
    }
    let world_size = by_rank.len();
    prompts
        .into_iter()
        .enumerate()
        .map(|(index, prompt)| {
            let sent = &mut by_rank[index % world_size];
            if sent.peek().is_none_or(|next| next.prompt_id != prompt.id) {
                return Ok(None);
            }
            let completions: Vec<Completion> = sent.take(num_generations).collect();
            let complete = completions.len() == num_generations
                && completions.iter().all(|completion| completion.prompt_id == prompt.id)
                && completions.iter().map(|completion| completion.sample_index).eq(0..num_generations as u32);
            if !complete {
                let got = completions.iter().map(|completion| completion.sample_index).collect();
                return Err(ExchangeError::Incomplete { prompt: prompt.id, got, expected: num_generations });
            }
            Ok(Some(Group { prompt, completions }))
        })
        .collect()
}

fn decode(mut bytes: &[u8]) -> Result<Vec<Completion>, String> {
    let mut completions = Vec::new();
    while !bytes.is_empty() {
        let message = v1::Completion::decode_length_delimited(&mut bytes).map_err(|error| error.to_string())?;
        completions.push(message.try_into().map_err(|error: BadMessage| error.to_string())?);
    }
    Ok(completions)
}

#[cfg(test)]
mod tests {
    use aha_core::ids::{PolicyVersion, PromptId};
    use aha_core::rollout::{FinishReason, Origin, Span};
    use tch::Device;

    use super::*;

    fn group(id: u64, num_completions: u32) -> Group {
        let prompt = Prompt {
            id: PromptId(id),
            text: String::new(),
            token_ids: vec![1],
            columns: serde_json::Map::new(),
            origin: Origin::default(),
        };
        let completions = (0..num_completions)
            .map(|sample_index| Completion {
                prompt_id: PromptId(id),
                sample_index,
                token_ids: vec![sample_index],
                logprobs: vec![-0.1],
                spans: vec![Span { version: PolicyVersion(1), num_tokens: 1 }],
                finish_reason: FinishReason::Stop,
                text: "x".to_owned(),
                rewards: Vec::new(),
                raw_logprobs: Vec::new(),
                prompt_logprobs: Vec::new(),
            })
            .collect();
        Group { prompt, completions }
    }

    #[test]
    fn groups_come_back_in_the_order_of_prompts_and_complete() {
        let solo = ProcessGroup::solo("test", Device::Cpu);
        let prompts = vec![group(5, 2).prompt, group(3, 2).prompt];
        for groups in [[Some(group(5, 2)), Some(group(3, 2))], [None, Some(group(3, 2))], [Some(group(5, 2)), None]] {
            assert_eq!(exchange(&solo, prompts.clone(), groups.to_vec(), 2).unwrap(), groups);
        }
        let error = exchange(&solo, prompts, vec![Some(group(5, 2)), Some(group(3, 1))], 2).unwrap_err().to_string();
        assert!(error.contains("prompt 3") && error.contains("[0]"), "{error}");
    }

    #[test]
    fn ranks_share_the_prompts() {
        let prompts: Vec<Prompt> = (0..5).map(|id| group(id, 0).prompt).collect();
        let ids = |rank| share(&prompts, rank, 2).iter().map(|prompt| prompt.id.0).collect::<Vec<_>>();
        assert_eq!((ids(0), ids(1)), (vec![0, 2, 4], vec![1, 3]));
    }
}
