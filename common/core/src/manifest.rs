//! The weight manifest: which parameters a model has, in which unit, and how they travel.
//!
//! A unit is what is gathered, sharded and pushed as one: the embedding, each layer, the final norm with the head.
//! Its parameters lie one after the other in one flat buffer, in the order of the manifest. Trainer and generator
//! derive the manifest from the same configuration and compare its hash before any weight moves.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

/// Shards begin at multiples of so many elements, whatever the world size: what is computed block by block, such as
/// moments in 8 bits, comes out the same.
pub const SHARD_BLOCK: usize = 256;

/// One parameter under its Hugging Face name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamSpec {
    pub name: String,
    pub shape: Vec<usize>,
}

impl ParamSpec {
    pub fn new(name: impl Into<String>, shape: &[usize]) -> Self {
        Self { name: name.into(), shape: shape.to_vec() }
    }

    #[must_use]
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The parameters of one unit, in the order of its flat buffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitSpec {
    /// `embedding`, `layers.0`, ..., `head`.
    pub name: String,
    pub params: Vec<ParamSpec>,
}

impl UnitSpec {
    #[must_use]
    pub fn numel(&self) -> usize {
        self.params.iter().map(ParamSpec::numel).sum()
    }

    /// Elements of the flat buffer: padded so that `world_size` ranks hold equal shards of whole [`SHARD_BLOCK`]s.
    #[must_use]
    pub fn padded_numel(&self, world_size: usize) -> usize {
        self.numel().next_multiple_of(world_size * SHARD_BLOCK)
    }
}

/// All units of a model, in the order of the forward pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub units: Vec<UnitSpec>,
}

/// A run of elements of one unit that is broadcast at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    pub unit_idx: usize,
    pub offset: usize,
    pub numel: usize,
    /// The trainer rank that broadcasts it.
    pub owner: usize,
}

impl Manifest {
    #[must_use]
    pub fn numel(&self) -> usize {
        self.units.iter().map(UnitSpec::numel).sum()
    }

    pub fn params(&self) -> impl Iterator<Item = &ParamSpec> {
        self.units.iter().flat_map(|unit| &unit.params)
    }

    /// Equal for equal names, shapes and order.
    #[must_use]
    pub fn hash(&self) -> u64 {
        let mut text = String::new();
        for unit in &self.units {
            text.push_str(&format!("{}:", unit.name));
            for param in &unit.params {
                text.push_str(&format!("{}{:?};", param.name, param.shape));
            }
        }
        xxh3_64(text.as_bytes())
    }

    /// The order in which a push sends the weights: unit by unit, owners taking turns, no bucket over
    /// `max_numel` elements.
    #[must_use]
    pub fn buckets(&self, num_owners: usize, max_numel: usize) -> Vec<Bucket> {
        let mut buckets = Vec::new();
        for (unit_idx, unit) in self.units.iter().enumerate() {
            let numel = unit.numel();
            for offset in (0..numel).step_by(max_numel.max(1)) {
                let owner = unit_idx % num_owners.max(1);
                buckets.push(Bucket { unit_idx, offset, numel: max_numel.min(numel - offset), owner });
            }
        }
        buckets
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::derive_seed;

    fn unit(name: &str, shapes: &[&[usize]]) -> UnitSpec {
        let params =
            shapes.iter().enumerate().map(|(i, shape)| ParamSpec::new(format!("{name}.p{i}"), shape)).collect();
        UnitSpec { name: name.to_owned(), params }
    }

    #[test]
    fn buckets_cover_every_element_once_in_order() {
        for case in 0..300 {
            let draw = |index: u64, bound: u64| 1 + (derive_seed(case, &[index]) % bound) as usize;
            let units: Vec<UnitSpec> = (0..draw(0, 6))
                .map(|index| unit(&format!("u{index}"), &[&[draw(10 + index as u64, 90), 3], &[draw(1, 9)]]))
                .collect();
            let manifest = Manifest { units };
            let (owners, max_numel) = (draw(2, 4), draw(3, 100));
            let mut next = vec![0; manifest.units.len()];
            for bucket in manifest.buckets(owners, max_numel) {
                assert_eq!(bucket.offset, next[bucket.unit_idx]);
                assert!(bucket.numel > 0 && bucket.numel <= max_numel && bucket.owner < owners);
                next[bucket.unit_idx] += bucket.numel;
            }
            assert_eq!(next, manifest.units.iter().map(UnitSpec::numel).collect::<Vec<_>>());
        }
    }

    #[test]
    fn padding_makes_equal_shards() {
        let unit = unit("u", &[&[50, 20], &[1]]);
        assert_eq!(
            (unit.numel(), unit.padded_numel(1), unit.padded_numel(3), unit.padded_numel(5)),
            (1001, 1024, 1536, 1280)
        );
    }

    #[test]
    fn the_hash_sees_names_shapes_and_order() {
        let manifest = |units: Vec<UnitSpec>| Manifest { units }.hash();
        let (a, b) = (unit("a", &[&[2, 3]]), unit("b", &[&[3, 2]]));
        assert_eq!(manifest(vec![a.clone(), b.clone()]), manifest(vec![a.clone(), b.clone()]));
        assert_ne!(manifest(vec![a.clone(), b.clone()]), manifest(vec![b, a.clone()]));
        assert_ne!(manifest(vec![a]), manifest(vec![unit("a", &[&[3, 2]])]));
    }
}
