//! The optimizer's state in files: each rank writes its parts of the units, and any number of ranks reads them whole.
//!
//! A tensor is named `unit/name/offset`: `layers.0/exp_avg/4096` begins at element 4096 of the `exp_avg` of the unit
//! `layers.0`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use aha_core::manifest::Manifest;
use tch::Tensor;

use super::{CheckpointError, STATE_DIR};
use crate::failpoint;
use crate::torch::zero::{FullState, ShardState};

const PREFIX: &str = "optimizer-";

/// A part of one tensor of one unit.
#[derive(Debug)]
struct Part {
    offset: usize,
    tensor: Tensor,
    /// For messages.
    path: PathBuf,
}

/// Parts of the optimizer's state by unit and name.
type Parts = BTreeMap<(usize, String), Vec<Part>>;

/// Writes one rank's parts below `folder`. Returns the file's path within it, or none where the rank has no part.
pub(super) fn write(
    folder: &Path,
    (rank, world_size): (usize, usize),
    manifest: &Manifest,
    shards: &[ShardState],
) -> Result<Option<String>, CheckpointError> {
    if shards.is_empty() {
        return Ok(None);
    }
    let file = format!("{STATE_DIR}/{PREFIX}{rank:05}-of-{world_size:05}.safetensors");
    let path = folder.join(&file);
    let mut tensors = Vec::new();
    for ShardState { unit_idx, name, offset, tensor } in shards {
        let unit = &manifest.units[*unit_idx].name;
        tensors.push((format!("{unit}/{name}/{offset}"), tensor));
    }
    failpoint::reached();
    Tensor::write_safetensors(&tensors, &path).map_err(|error| CheckpointError::unwritable(&path, error))?;
    Ok(Some(file))
}

/// Reads the state of all units from those of `files`, paths within `folder`, that ranks wrote.
pub(super) fn read<'a>(
    folder: &Path,
    files: impl Iterator<Item = &'a String>,
    manifest: &Manifest,
) -> Result<Vec<FullState>, CheckpointError> {
    let mut parts = Parts::new();
    let prefix = format!("{STATE_DIR}/{PREFIX}");
    for path in files.filter(|file| file.starts_with(&prefix)).map(|file| folder.join(file)) {
        let tensors = Tensor::read_safetensors(&path).map_err(|error| CheckpointError::unreadable(&path, error))?;
        for (name, tensor) in tensors {
            let (key, offset) = parse(&name, manifest).ok_or_else(|| CheckpointError::Damaged {
                path: path.clone(),
                problem: format!("tensor {name:?} belongs to no unit of the model"),
            })?;
            parts.entry(key).or_default().push(Part { offset, tensor, path: path.clone() });
        }
    }
    parts.into_iter().map(|((unit_idx, name), parts)| join(manifest, (unit_idx, name), parts)).collect()
}

fn parse(name: &str, manifest: &Manifest) -> Option<((usize, String), usize)> {
    let mut fields = name.split('/');
    let (unit, name, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let unit_idx = manifest.units.iter().position(|known| known.name == unit)?;
    let offset = offset.parse().ok()?;
    fields.next().is_none().then(|| ((unit_idx, name.to_owned()), offset))
}

/// Puts the parts of one tensor after each other, without gap or overlap. How long the whole must be is the optimizer's
/// business.
fn join(
    manifest: &Manifest,
    (unit_idx, name): (usize, String),
    mut parts: Vec<Part>,
) -> Result<FullState, CheckpointError> {
    let unit = &manifest.units[unit_idx];
    let damaged = |path: &Path, problem: String| CheckpointError::Damaged {
        path: path.to_owned(),
        problem: format!("{name} of unit {}: {problem}", unit.name),
    };
    parts.sort_by_key(|part| part.offset);
    let mut covered = 0;
    for Part { offset, tensor, path } in &parts {
        if *offset != covered || tensor.dim() != 1 {
            let problem = format!("a part of shape {:?} begins at {offset}, and {covered} was due", tensor.size());
            return Err(damaged(path, problem));
        }
        covered += tensor.numel();
    }
    let tensors: Vec<&Tensor> = parts.iter().map(|part| &part.tensor).collect();
    Ok(FullState { unit_idx, tensor: Tensor::cat(&tensors, 0), name })
}

#[cfg(test)]
mod tests {
    use aha_core::manifest::{ParamSpec, UnitSpec};
    use aha_core::random::derive_seed;
    use tch::{Device, Kind};

    use super::*;

    fn manifest(numels: &[usize]) -> Manifest {
        let unit = |(index, numel): (usize, &usize)| UnitSpec {
            name: format!("layers.{index}"),
            params: vec![ParamSpec::new(format!("p{index}"), &[*numel])],
        };
        Manifest { units: numels.iter().enumerate().map(unit).collect() }
    }

    fn full(numel: usize, seed: u64) -> Tensor {
        let values: Vec<f32> = (0..numel as u64).map(|index| derive_seed(seed, &[index]) as f32).collect();
        Tensor::from_slice(&values)
    }

    fn shard(unit_idx: usize, offset: usize, len: usize, tensors: &[(&'static str, Tensor)]) -> Vec<ShardState> {
        let part = |(name, tensor): &(&'static str, Tensor)| {
            let tensor = tensor.narrow(0, offset as i64, len as i64);
            ShardState { unit_idx, name, offset, tensor }
        };
        tensors.iter().map(part).collect()
    }

    /// Writes each rank's shards to a file of its own, and reads them all.
    fn round_trip(manifest: &Manifest, by_rank: &[Vec<ShardState>]) -> Result<Vec<FullState>, CheckpointError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(STATE_DIR)).unwrap();
        let world_size = by_rank.len();
        let write = |(rank, shards): (usize, &Vec<ShardState>)| {
            write(folder.path(), (rank, world_size), manifest, shards).unwrap()
        };
        let files: Vec<String> = by_rank.iter().enumerate().filter_map(write).collect();
        read(folder.path(), files.iter(), manifest)
    }

    #[test]
    fn any_number_of_ranks_gives_the_same_state() {
        for case in 0..60 {
            let draw = |index: u64, bound: u64| (derive_seed(case, &[index]) % bound) as usize;
            let numels: Vec<usize> = (0..1 + draw(0, 4) as u64).map(|unit| 1 + draw(10 + unit, 50)).collect();
            let manifest = manifest(&numels);
            let world_size = 1 + draw(1, 5);
            let states: Vec<[(&str, Tensor); 2]> = (0_u64..)
                .zip(&numels)
                .map(|(unit, &numel)| [("exp_avg", full(numel, unit)), ("exp_avg_sq", full(numel, 100 + unit))])
                .collect();
            // Each unit is cut at random places; a rank may have several parts of it, or none.
            let mut by_rank: Vec<Vec<ShardState>> = (0..world_size).map(|_| Vec::new()).collect();
            for (unit_idx, &numel) in numels.iter().enumerate() {
                let mut offset = 0;
                while offset < numel {
                    let len = 1 + draw((1000 * unit_idx + offset) as u64, (numel - offset) as u64);
                    let rank = draw((5000 + 1000 * unit_idx + offset) as u64, world_size as u64);
                    by_rank[rank].extend(shard(unit_idx, offset, len, &states[unit_idx]));
                    offset += len;
                }
            }
            let read = round_trip(&manifest, &by_rank).unwrap();
            assert_eq!(read.len(), 2 * numels.len());
            for FullState { unit_idx, name, tensor } in read {
                let (_, expect) = states[unit_idx].iter().find(|(known, _)| *known == name).unwrap();
                assert!(tensor.equal(expect), "unit {unit_idx}, {name}");
            }
        }
    }

    #[track_caller]
    fn check_damaged(by_rank: &[Vec<ShardState>], expect: &str) {
        let message = round_trip(&manifest(&[10]), by_rank).unwrap_err().to_string();
        assert!(message.contains(expect), "{message}");
    }

    #[test]
    fn gaps_overlaps_and_strange_tensors_are_refused() {
        let state = [("exp_avg", full(12, 0))];
        let part = |offset, len| shard(0, offset, len, &state);
        check_damaged(
            &[part(0, 4), part(5, 5)],
            "exp_avg of unit layers.0: a part of shape [5] begins at 5, and 4 was due",
        );
        check_damaged(&[part(0, 6), part(5, 5)], "begins at 5, and 6 was due");
        let strange = [("exp/avg", Tensor::zeros([10], (Kind::Float, Device::Cpu)))];
        check_damaged(&[shard(0, 0, 10, &strange)], "tensor \"layers.0/exp/avg/0\" belongs to no unit of the model");
    }
}
