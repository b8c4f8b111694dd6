//! What a full block is registered under: everything that its keys and values depend on.

use aha_core::ids::{PolicyVersion, TokenId};
use xxhash_rust::xxh3::Xxh3;

/// The first whole blocks of a sequence, under one version of the weights.
///
/// A chain as in vLLM's v1 cache: the hash of a block covers its tokens and the hash of those before it. 128 bits of
/// xxh3, so that the tokens themselves need not be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Prefix {
    hash: u128,
    num_blocks: usize,
}

impl Prefix {
    /// Of no block yet.
    pub(super) fn new(version: PolicyVersion) -> Self {
        Self { hash: u128::from(version.0), num_blocks: 0 }
    }

    /// With one more block, of these tokens.
    pub(super) fn then(self, tokens: &[TokenId]) -> Self {
        let mut hasher = Xxh3::new();
        hasher.update(&self.hash.to_le_bytes());
        tokens.iter().for_each(|token| hasher.update(&token.to_le_bytes()));
        Self { hash: hasher.digest128(), num_blocks: self.num_blocks + 1 }
    }

    pub(super) fn num_blocks(self) -> usize {
        self.num_blocks
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Every token, their order, where blocks end, and the version: whatever differs gives another prefix.
    #[test]
    fn prefixes_are_equal_only_for_equal_tokens_under_equal_weights() {
        let mut seen = HashMap::new();
        for version in 0..3 {
            let mut level = vec![(Prefix::new(PolicyVersion(version)), Vec::new())];
            for _ in 0..4 {
                let longer = level.iter().flat_map(|(prefix, blocks): &(Prefix, Vec<[TokenId; 2]>)| {
                    let tokens = (0..3).flat_map(|first| (0..3).map(move |second| [first, second]));
                    tokens.map(|tokens| (prefix.then(&tokens), [&blocks[..], &[tokens]].concat()))
                });
                level = longer.collect();
                for (prefix, blocks) in &level {
                    assert_eq!(prefix.num_blocks(), blocks.len());
                    assert_eq!(seen.insert(*prefix, (version, blocks.clone())), None, "{blocks:?}");
                }
            }
        }
        assert_eq!(seen.len(), 3 * (9 + 81 + 729 + 6561));
        let same = Prefix::new(PolicyVersion(2)).then(&[0, 1]).then(&[2, 0]);
        assert_eq!(seen[&same], (2, vec![[0, 1], [2, 0]]));
    }
}
