//! Sequences that are trained on together, because they share a prompt that is then computed once.

use crate::batch::TrainSequence;

/// Bundles of a rank that its load is made of, at least, so that ranks can be given nearly equal ones. Each more costs a
/// prompt for every group that it cuts.
const BUNDLES_PER_RANK: usize = 4;

/// Sequences with the same prompt, for one micro-batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// Indices of the sequences.
    pub indices: Vec<usize>,
    /// The prompt once, and all completions.
    pub num_tokens: usize,
}

/// A sequence that no micro-batch can hold.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "sequence {index} has {length} tokens, over the budget of {budget} tokens of a micro-batch: raise \\
         train.micro_batch_tokens or shorten prompts and completions"
)]
pub struct SequenceTooLong {
    pub index: usize,
    pub length: usize,
    pub budget: usize,
}

/// Cuts `members` into bundles: neighbours with equal prompts where `shared_by` says for how many ranks, of at most
/// `budget` tokens and, where there are several ranks, a part of a rank's load; else each alone.
///
/// # Errors
/// If a sequence alone is over `budget` tokens.
pub fn bundles(
    sequences: &[TrainSequence],
    members: &[usize],
    budget: usize,
    shared_by: Option<usize>,
) -> Result<Vec<Bundle>, SequenceTooLong> {
    let length = |index: usize| sequences[index].token_ids.len();
    if let Some(&index) = members.iter().find(|&&index| length(index) > budget) {
        return Err(SequenceTooLong { index, length: length(index), budget });
    }
    let total: usize = members.iter().map(|&index| length(index)).sum();
    let most = match shared_by {
        None => 0,
        Some(1) => budget,
        Some(world_size) => budget.min(total / (world_size * BUNDLES_PER_RANK)),
    };
    let mut bundles: Vec<Bundle> = Vec::new();
    for &index in members {
        let sequence = &sequences[index];
        let more = sequence.num_completion_tokens();
        match bundles.last_mut() {
            Some(bundle)
                if bundle.num_tokens + more <= most && prompt(&sequences[bundle.indices[0]]) == prompt(sequence) =>
            {
                bundle.indices.push(index);
                bundle.num_tokens += more;
            }
            _ => bundles.push(Bundle { indices: vec![index], num_tokens: length(index) }),
        }
    }
    Ok(bundles)
}

fn prompt(sequence: &TrainSequence) -> &[u32] {
    &sequence.token_ids[..sequence.num_prompt_tokens]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::derive_seed;

    fn sequence(prompt: u32, prompt_length: usize, completion_length: usize) -> TrainSequence {
        let token_ids = [vec![prompt; prompt_length], vec![7; completion_length]].concat();
        TrainSequence { token_ids, num_prompt_tokens: prompt_length, ..TrainSequence::default() }
    }

    #[test]
    fn bundles_hold_every_sequence_once_and_one_prompt_each() {
        for case in 0..300 {
            let draw = |index: u64, bound: u64| (derive_seed(case, &[index]) % bound) as usize;
            let (budget, world_size) = (60 + draw(0, 300), 1 + draw(1, 4));
            let sequences: Vec<TrainSequence> = (0..draw(2, 40) as u64)
                .map(|index| sequence(index as u32 / 5, 1 + draw(3 + index / 5, 20), draw(100 + index, 40)))
                .collect();
            let members: Vec<usize> = (0..sequences.len()).filter(|&index| draw(200 + index as u64, 4) > 0).collect();
            let bundles = bundles(&sequences, &members, budget, Some(world_size)).unwrap();
            let seen: Vec<usize> = bundles.iter().flat_map(|bundle| bundle.indices.clone()).collect();
            assert_eq!(seen, members);
            for bundle in &bundles {
                let first = &sequences[bundle.indices[0]];
                assert!(bundle.indices.iter().all(|&index| prompt(&sequences[index]) == prompt(first)));
                let completions: usize =
                    bundle.indices.iter().map(|&index| sequences[index].num_completion_tokens()).sum();
                assert_eq!(bundle.num_tokens, first.num_prompt_tokens + completions);
                assert!(bundle.num_tokens <= budget);
            }
        }
    }

    #[test]
    fn a_group_is_one_bundle_where_it_fits() {
        let sequences: Vec<_> = [(1, 5), (1, 6), (1, 7), (2, 5)].map(|(id, len)| sequence(id, 10, len)).into();
        let cut = |budget, shared_by| -> Vec<Vec<usize>> {
            let bundles = bundles(&sequences, &[0, 1, 2, 3], budget, shared_by).unwrap();
            bundles.into_iter().map(|bundle| bundle.indices).collect()
        };
        assert_eq!(cut(28, Some(1)), [vec![0, 1, 2], vec![3]]);
        assert_eq!(cut(27, Some(1)), [vec![0, 1], vec![2], vec![3]]);
        assert_eq!(cut(100, None), [vec![0], vec![1], vec![2], vec![3]]);
    }

    #[test]
    fn a_sequence_over_the_budget_is_named() {
        let sequences = [sequence(1, 1, 2), sequence(1, 2, 7)];
        assert_eq!(bundles(&sequences, &[0, 1], 8, Some(1)), Err(SequenceTooLong { index: 1, length: 9, budget: 8 }));
        assert_eq!(bundles(&[], &[], 8, Some(1)), Ok(vec![]));
    }
}
