//! Which rank trains on which sequence: equal numbers of tokens, as nearly as a greedy split gets them.
//!
//! Longest processing time first (Graham 1969): at most 4/3 of the optimum. Every rank computes the same partition
//! from the same lengths, so nothing needs to be agreed on.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Indices of the sequences of each rank, ascending within a rank.
///
/// # Panics
/// If `world_size` is 0.
#[must_use]
pub fn partition_by_tokens(lengths: &[usize], world_size: usize) -> Vec<Vec<usize>> {
    assert!(world_size > 0, "a world has at least one rank");
    let mut longest_first: Vec<usize> = (0..lengths.len()).collect();
    longest_first.sort_by_key(|&index| (Reverse(lengths[index]), index));
    // The rank with the fewest tokens takes the next sequence; ties go to the lowest rank.
    let mut ranks: BinaryHeap<Reverse<(usize, usize)>> = (0..world_size).map(|rank| Reverse((0, rank))).collect();
    let mut partition = vec![Vec::new(); world_size];
    for index in longest_first {
        if let Some(Reverse((tokens, rank))) = ranks.pop() {
            partition[rank].push(index);
            ranks.push(Reverse((tokens + lengths[index], rank)));
        }
    }
    partition.iter_mut().for_each(|indices| indices.sort_unstable());
    partition
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::derive_seed;

    #[test]
    fn every_sequence_goes_to_one_rank_and_loads_are_close() {
        for case in 0..500 {
            let draw = |index: u64, bound: u64| derive_seed(case, &[index]) % bound;
            let world_size = 1 + draw(0, 7) as usize;
            let lengths: Vec<usize> = (0..draw(1, 60)).map(|index| 1 + draw(2 + index, 900) as usize).collect();
            let partition = partition_by_tokens(&lengths, world_size);
            let mut seen: Vec<usize> = partition.concat();
            seen.sort_unstable();
            assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            let loads: Vec<usize> =
                partition.iter().map(|indices| indices.iter().map(|&index| lengths[index]).sum()).collect();
            let spread = loads.iter().max().unwrap_or(&0) - loads.iter().min().unwrap_or(&0);
            assert!(spread <= lengths.iter().copied().max().unwrap_or(0), "{loads:?}");
        }
    }
}
