//! Packing sequences, or bundles of them, into micro-batches under a token budget.
//!
//! First fit decreasing: at most 11/9 of the optimal number of micro-batches, and a pure function of the lengths,
//! so every rank knows how many micro-batches every other rank has.

use std::cmp::Reverse;

/// Indices of the sequences of each micro-batch, in order of their first sequence. One that is over `budget` tokens is
/// alone.
#[must_use]
pub fn pack(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> = (0..lengths.len()).collect();
    longest_first.sort_by_key(|&index| (Reverse(lengths[index]), index));
    let mut packs: Vec<(usize, Vec<usize>)> = Vec::new();
    for index in longest_first {
        match packs.iter_mut().find(|(tokens, _)| tokens + lengths[index] <= budget) {
            Some((tokens, indices)) => {
                *tokens += lengths[index];
                indices.push(index);
            }
            None => packs.push((lengths[index], vec![index])),
        }
    }
    let mut packs: Vec<Vec<usize>> = packs.into_iter().map(|(_, indices)| indices).collect();
    packs.iter_mut().for_each(|indices| indices.sort_unstable());
    packs.sort_unstable();
    packs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::derive_seed;

    #[test]
    fn packs_hold_every_sequence_once_within_the_budget() {
        for case in 0..500 {
            let draw = |index: u64, bound: u64| derive_seed(case, &[index]) % bound;
            let budget = 50 + draw(0, 500) as usize;
            let lengths: Vec<usize> =
                (0..draw(1, 80)).map(|index| 1 + draw(2 + index, budget as u64) as usize).collect();
            let packs = pack(&lengths, budget);
            let mut seen: Vec<usize> = packs.concat();
            seen.sort_unstable();
            assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            let loads: Vec<usize> =
                packs.iter().map(|pack| pack.iter().map(|&index| lengths[index]).sum::<usize>()).collect();
            assert!(loads.iter().all(|&load| load <= budget));
            // Any two packs together exceed the budget, or first fit would have joined them.
            for (index, load) in loads.iter().enumerate() {
                assert!(loads[..index].iter().all(|other| other + load > budget), "{loads:?} under {budget}");
            }
        }
    }
}
