//! Which rank this process is, and where rank 0 can be reached: torchrun's variables.

use std::collections::BTreeMap;
use std::time::Duration;

use aha_nn::comm::address_towards;

const RANK: &str = "RANK";
const WORLD_SIZE: &str = "WORLD_SIZE";
const LOCAL_RANK: &str = "LOCAL_RANK";
const LOCAL_WORLD_SIZE: &str = "LOCAL_WORLD_SIZE";
const MASTER_ADDR: &str = "MASTER_ADDR";
const MASTER_PORT: &str = "MASTER_PORT";
/// Where one of them is set, all are; LOCAL_WORLD_SIZE may join them.
const NAMES: [&str; 5] = [RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT];

/// The trainer ranks of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    /// This process, `0..size`.
    pub rank: usize,
    /// Number of ranks, `W`.
    pub size: usize,
    /// This process among those of its machine; picks its GPU.
    pub local_rank: usize,
    /// Number of ranks of its machine, where that is known.
    pub local_size: Option<usize>,
    /// Host name or address of rank 0, which the other ranks and the generators can reach.
    pub master_addr: String,
    /// Port on which rank 0 serves the store where ranks meet; 0 in a world of one.
    pub master_port: u16,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorldError {
    #[error(
        "{present} set, but {missing} missing: set all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT \
         (torchrun and `aha launch` do), or none for a single rank",
        present = are(present),
        missing = are(missing)
    )]
    Incomplete { present: Vec<&'static str>, missing: Vec<&'static str> },
    #[error("{name} must be {expected}, got {value:?}")]
    Invalid { name: &'static str, expected: String, value: String },
}

impl World {
    /// The world that `variables`, such as those of the process, describe: a single rank where none of torchrun's is
    /// set.
    ///
    /// # Errors
    /// Names the variables that are missing, or the one that makes no sense.
    pub fn from_variables(variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, WorldError> {
        let is_ours = |name: &str| NAMES.contains(&name) || name == LOCAL_WORLD_SIZE;
        let values: BTreeMap<String, String> = variables.into_iter().filter(|(name, _)| is_ours(name)).collect();
        if values.is_empty() {
            return Ok(Self::single());
        }
        let (mut present, missing): (Vec<_>, Vec<_>) = NAMES.into_iter().partition(|name| values.contains_key(*name));
        if !missing.is_empty() {
            present.extend(values.contains_key(LOCAL_WORLD_SIZE).then_some(LOCAL_WORLD_SIZE));
            return Err(WorldError::Incomplete { present, missing });
        }
        let invalid = |name, expected: &str| WorldError::Invalid {
            name,
            expected: expected.to_owned(),
            value: values[name].clone(),
        };
        let number = |name| values[name].trim().parse().map_err(|_| invalid(name, "a whole number"));
        let (rank, size, local_rank): (usize, usize, usize) = (number(RANK)?, number(WORLD_SIZE)?, number(LOCAL_RANK)?);
        if rank >= size {
            return Err(invalid(RANK, &format!("less than WORLD_SIZE, which is {size}")));
        }
        let local_size = values.contains_key(LOCAL_WORLD_SIZE).then(|| number(LOCAL_WORLD_SIZE)).transpose()?;
        if let Some(local_size) = local_size {
            if !(1..=size).contains(&local_size) {
                return Err(invalid(LOCAL_WORLD_SIZE, &format!("from 1 to WORLD_SIZE, which is {size}")));
            }
            if local_rank >= local_size {
                return Err(invalid(LOCAL_RANK, &format!("less than LOCAL_WORLD_SIZE, which is {local_size}")));
            }
        }
        let master_port: u16 = values[MASTER_PORT].trim().parse().map_err(|_| invalid(MASTER_PORT, "a port"))?;
        if master_port == 0 && size > 1 {
            return Err(invalid(MASTER_PORT, "a port that all ranks know"));
        }
        let master_addr = values[MASTER_ADDR].trim().to_owned();
        if master_addr.is_empty() {
            return Err(invalid(MASTER_ADDR, "a host name or address"));
        }
        Ok(Self { rank, size, local_rank, local_size, master_addr, master_port })
    }

    /// One rank on its own, with generators on the same machine.
    #[must_use]
    pub fn single() -> Self {
        let master_addr = "127.0.0.1".to_owned();
        Self { rank: 0, size: 1, local_rank: 0, local_size: None, master_addr, master_port: 0 }
    }

    /// A rank's share of this machine's `num_cores`: all ranks of the world are taken to be here where it is not known how
    /// many are.
    #[must_use]
    pub fn cores_of_rank(&self, num_cores: usize) -> usize {
        (num_cores / self.local_size.unwrap_or(self.size)).max(1)
    }

    /// Whether this rank speaks for all: logs, writes the run folder, calls the generators.
    #[must_use]
    pub fn is_main(&self) -> bool {
        self.rank == 0
    }

    /// Address of this machine at which the other ranks reach it: the one on its route to rank 0, whose name may take
    /// `limit` to become known.
    #[must_use]
    pub fn own_address(&self, limit: Duration) -> String {
        let address = address_towards(&self.master_addr, self.master_port, limit);
        address.map_or_else(|_| self.master_addr.clone(), |address| address.to_string())
    }
}

fn are(names: &[&str]) -> String {
    format!("{} {}", names.join(", "), if names.len() == 1 { "is" } else { "are" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: [(&str, &str); 5] = [
        ("RANK", "2"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "10.0.0.7"),
        ("MASTER_PORT", "29500"),
    ];

    /// [`WHOLE`] with one variable changed, or taken away.
    fn world(name: &str, value: Option<&str>) -> Result<World, WorldError> {
        let changed = value.map(|value| (name, value));
        let variables = WHOLE.into_iter().filter(|(other, _)| *other != name).chain(changed);
        World::from_variables(variables.map(|(name, value)| (name.to_owned(), value.to_owned())))
    }

    #[track_caller]
    fn check_refused(name: &str, value: Option<&str>, message: &str) {
        let error = world(name, value).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn torchruns_variables_are_read() {
        let (local_size, master_addr) = (None, "10.0.0.7".to_owned());
        let expect = World { rank: 2, size: 4, local_rank: 0, local_size, master_addr, master_port: 29500 };
        assert_eq!(world("PATH", Some("/bin")), Ok(expect.clone()));
        assert_eq!(world("LOCAL_WORLD_SIZE", Some("2")), Ok(World { local_size: Some(2), ..expect }));
    }

    #[test]
    fn cores_are_shared_by_the_ranks_of_the_machine() {
        let share = |local_size, num_cores| world("LOCAL_WORLD_SIZE", local_size).unwrap().cores_of_rank(num_cores);
        assert_eq!([share(Some("2"), 16), share(Some("1"), 16), share(None, 16), share(Some("4"), 3)], [8, 16, 4, 1]);
        assert_eq!(World::single().cores_of_rank(16), 16);
    }

    #[test]
    fn no_variables_are_a_world_of_one() {
        let world = World::from_variables([("HOME".to_owned(), "/".to_owned())]).unwrap();
        assert_eq!((world.rank, world.size, world.is_main()), (0, 1, true));
    }

    #[test]
    fn the_own_address_is_the_one_that_peers_reach() {
        assert_eq!(World::single().own_address(Duration::ZERO), "127.0.0.1");
        let nowhere = World { master_addr: "no such host".to_owned(), ..World::single() };
        assert_eq!(nowhere.own_address(Duration::ZERO), "no such host");
    }

    #[test]
    fn what_is_missing_or_senseless_is_named() {
        check_refused(
            "LOCAL_RANK",
            None,
            "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set, but LOCAL_RANK is missing",
        );
        check_refused("RANK", Some("two"), "RANK must be a whole number, got \"two\"");
        check_refused("RANK", Some("4"), "RANK must be less than WORLD_SIZE, which is 4, got \"4\"");
        for (value, message) in [
            ("two", "LOCAL_WORLD_SIZE must be a whole number, got \"two\""),
            ("0", "LOCAL_WORLD_SIZE must be from 1 to WORLD_SIZE, which is 4, got \"0\""),
            ("5", "LOCAL_WORLD_SIZE must be from 1 to WORLD_SIZE, which is 4, got \"5\""),
        ] {
            check_refused("LOCAL_WORLD_SIZE", Some(value), message);
        }
        let local = [("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "2")];
        let others = WHOLE.into_iter().filter(|(name, _)| *name != "LOCAL_RANK");
        let variables = others.chain(local).map(|(name, value)| (name.to_owned(), value.to_owned()));
        let error = World::from_variables(variables).unwrap_err().to_string();
        assert_eq!(error, "LOCAL_RANK must be less than LOCAL_WORLD_SIZE, which is 2, got \"2\"");
        let alone = World::from_variables([("LOCAL_WORLD_SIZE".to_owned(), "2".to_owned())]).unwrap_err().to_string();
        assert!(alone.starts_with("LOCAL_WORLD_SIZE is set, but RANK, WORLD_SIZE, "), "{alone}");
        check_refused("WORLD_SIZE", Some("-1"), "WORLD_SIZE must be a whole number, got \"-1\"");
        check_refused("MASTER_PORT", Some("70000"), "MASTER_PORT must be a port, got \"70000\"");
        check_refused("MASTER_PORT", Some("0"), "MASTER_PORT must be a port that all ranks know");
        check_refused("MASTER_ADDR", Some(" "), "MASTER_ADDR must be a host name or address");
    }
}
