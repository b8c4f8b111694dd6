//! Which sequences of a micro-batch share a prompt.

use std::collections::HashMap;

use aha_core::batch::TrainSequence;
use aha_nn::autograd_ops::PromptGroup;

/// Indices of the sequences of each group, in order of their first; sequences with equal prompts are one group if
/// prompts are to be shared.
pub(super) fn prompt_groups(sequences: &[TrainSequence], indices: &[usize], share_prompts: bool) -> Vec<Vec<usize>> {
    if !share_prompts {
        return indices.iter().map(|&index| vec![index]).collect();
    }
    let mut known: HashMap<&[u32], usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for &index in indices {
        let group_idx = *known.entry(prompt(&sequences[index])).or_insert(groups.len());
        if group_idx == groups.len() {
            groups.push(Vec::new());
        }
        groups[group_idx].push(index);
    }
    groups
}

/// The tokens of a group. What is alone is one piece.
pub(super) fn tokens<'a>(sequences: &'a [TrainSequence], group: &[usize]) -> PromptGroup<'a> {
    match group {
        [index] => PromptGroup { prompt: &sequences[*index].token_ids, completions: Vec::new() },
        _ => PromptGroup {
            prompt: prompt(&sequences[group[0]]),
            completions: group
                .iter()
                .map(|&index| &sequences[index].token_ids[sequences[index].num_prompt_tokens..])
                .collect(),
        },
    }
}

fn prompt(sequence: &TrainSequence) -> &[u32] {
    &sequence.token_ids[..sequence.num_prompt_tokens]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(prompt: &[u32], completion: &[u32]) -> TrainSequence {
        TrainSequence {
            token_ids: [prompt, completion].concat(),
            num_prompt_tokens: prompt.len(),
            ..TrainSequence::default()
        }
    }

    #[test]
    fn equal_prompts_are_one_group_wherever_they_stand() {
        let sequences =
            [sequence(&[1, 2], &[3]), sequence(&[1], &[2, 3]), sequence(&[1, 2], &[4, 5]), sequence(&[1, 2], &[])];
        assert_eq!(prompt_groups(&sequences, &[0, 1, 2], true), [vec![0, 2], vec![1]]);
        assert_eq!(prompt_groups(&sequences, &[3, 1, 2], true), [vec![3, 2], vec![1]]);
        assert_eq!(prompt_groups(&sequences, &[0, 2], false), [vec![0], vec![2]]);
        let shared = tokens(&sequences, &[0, 2]);
        assert_eq!((shared.prompt, shared.completions), (&[1, 2][..], vec![&[3][..], &[4, 5]]));
        let alone = tokens(&sequences, &[1]);
        assert_eq!((alone.prompt, alone.completions.len()), (&[1, 2, 3][..], 0));
    }
}
