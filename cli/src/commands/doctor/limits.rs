//! What the system grants a process: files, locked memory, shared memory, threads.

use aha_core::config::RunConfig;
use aha_trainer::world::World;
use rustix::fs::statvfs;
use rustix::process::{Resource, getrlimit};

use super::finding::{Finding, gib};

/// A trainer with few generators gets by with so many files.
const FEWEST_FILES: u64 = 256;
/// A generator takes 512 connections, and has files of its own.
const ENOUGH_FILES: u64 = 1024;
/// NCCL's buffers between the ranks of one machine; containers have 64 MiB by default.
const ENOUGH_SHARED: u64 = 1 << 30;
/// What NCCL registers with a network card, for each rank.
const ENOUGH_LOCKED: u64 = 64 << 20;

pub(super) fn open_files() -> Finding {
    judge_files(getrlimit(Resource::Nofile).current)
}

/// `limit` is none where there is no bound; so below.
fn judge_files(limit: Option<u64>) -> Finding {
    let found = format!("{} files may be open", limit.map_or("any number of".to_owned(), |limit| limit.to_string()));
    let fix = "ulimit -n 65536, or LimitNOFILE= of a service, or --ulimit nofile=65536 of a container";
    match limit.unwrap_or(u64::MAX) {
        limit if limit < FEWEST_FILES => Finding::problem("open files", found, fix),
        limit if limit < ENOUGH_FILES => {
            Finding::warning("open files", format!("{found}; a generator with many clients needs {ENOUGH_FILES}"), fix)
        }
        _ => Finding::ok("open files", found),
    }
}

pub(super) fn locked_memory(num_gpus: usize) -> Finding {
    judge_locked(getrlimit(Resource::Memlock).current, num_gpus)
}

fn judge_locked(limit: Option<u64>, num_gpus: usize) -> Finding {
    let found = limit.map_or("without bound".to_owned(), |limit| format!("{} MiB may be locked", limit >> 20));
    if num_gpus > 0 && limit.is_some_and(|limit| limit < ENOUGH_LOCKED * num_gpus as u64) {
        let found = format!("{found}; NCCL over InfiniBand fails when it cannot lock its buffers");
        let fix = "ulimit -l unlimited, or LimitMEMLOCK=infinity of a service, or --ulimit memlock=-1 of a container";
        return Finding::warning("locked memory", found, fix);
    }
    Finding::ok("locked memory", found)
}

pub(super) fn shared_memory(num_gpus: usize) -> Finding {
    judge_shared(statvfs("/dev/shm").ok().map(|stat| stat.f_bavail * stat.f_frsize), num_gpus)
}

/// `free` is none where there is no `/dev/shm`.
fn judge_shared(free: Option<u64>, num_gpus: usize) -> Finding {
    let found = free.map_or("there is no /dev/shm".to_owned(), |free| format!("{} of /dev/shm are free", gib(free)));
    if num_gpus < 2 {
        return Finding::ok("shared memory", format!("{found}; only NCCL between GPUs of one machine needs it"));
    }
    let fix =
        "mount a larger one: --shm-size=8g or --ipc=host of a container, an emptyDir of medium Memory in Kubernetes";
    match free {
        None => Finding::problem("shared memory", found, fix),
        Some(free) if free < ENOUGH_SHARED => {
            let found = format!("{found}; NCCL between {num_gpus} GPUs may run out of it, and then fails or hangs");
            Finding::problem("shared memory", found, fix)
        }
        Some(_) => Finding::ok("shared memory", found),
    }
}

pub(super) fn threads(world: &World, config: Option<&RunConfig>, omp: Option<&str>) -> Vec<Finding> {
    let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let at_least = || config.map_or(0, |config| config.launch.trainers).max(world.local_rank + 1);
    let local_size = world.local_size.unwrap_or_else(at_least);
    let mut findings = vec![judge_threads(num_cores, local_size, config.map_or(0, |config| config.train.threads))];
    if let Some(omp) = omp {
        findings.push(match omp.trim().parse::<usize>() {
            Ok(count) if count > num_cores => Finding::warning(
                "threads",
                format!("OMP_NUM_THREADS is {count}, on {num_cores} cores"),
                "unset it: train.threads and generator.threads say how many threads compute",
            ),
            Ok(count) => Finding::ok("threads", format!("OMP_NUM_THREADS is {count}; train.threads counts, not this")),
            Err(_) => Finding::warning("threads", format!("OMP_NUM_THREADS is {omp:?}, no number"), "unset it"),
        });
    }
    findings
}

/// `per_rank` as in `train.threads`: 0 shares the cores out.
fn judge_threads(num_cores: usize, num_ranks: usize, per_rank: usize) -> Finding {
    let each = if per_rank > 0 { per_rank } else { (num_cores / num_ranks).max(1) };
    let found = format!("{num_ranks} trainer ranks of {each} threads on {num_cores} cores");
    if each * num_ranks <= num_cores {
        return Finding::ok("threads", found);
    }
    let fix = match per_rank {
        0 => format!("start at most {num_cores} trainer ranks on this machine"),
        _ => format!("set train.threads to {} at most, or to 0", (num_cores / num_ranks).max(1)),
    };
    Finding::warning("threads", format!("{found}: they take turns, and wait for each other at every collective"), fix)
}

#[cfg(test)]
mod tests {
    use super::super::finding::Severity::{Ok, Problem, Warning};
    use super::*;

    #[test]
    fn limits_are_judged_by_what_needs_them() {
        let files = [None, Some(1024), Some(1023), Some(255)].map(|limit| judge_files(limit).severity);
        assert_eq!(files, [Ok, Ok, Warning, Problem]);
        let locked = [(Some(8 << 20), 0), (Some(8 << 20), 1), (None, 8), (Some(512 << 20), 8)];
        assert_eq!(locked.map(|(limit, gpus)| judge_locked(limit, gpus).severity), [Ok, Warning, Ok, Ok]);
        let shared = [(None, 1), (None, 2), (Some(64 << 20), 2), (Some(64 << 20), 0), (Some(1 << 30), 8)];
        assert_eq!(shared.map(|(free, gpus)| judge_shared(free, gpus).severity), [Ok, Problem, Problem, Ok, Ok]);
    }

    #[test]
    fn more_threads_than_cores_are_found() {
        let threads = [(8, 2, 0), (8, 2, 4), (8, 2, 5), (2, 4, 0)];
        let severities = threads.map(|(cores, ranks, each)| judge_threads(cores, ranks, each).severity);
        assert_eq!(severities, [Ok, Ok, Warning, Warning]);
        assert!(judge_threads(8, 2, 5).fix.unwrap().contains("train.threads to 4"));
        let omp = |value| threads_of(value);
        assert_eq!([omp("1"), omp("1000000"), omp("all")], [Ok, Warning, Warning]);
    }

    #[test]
    fn the_ranks_of_this_machine_count() {
        let world = World { size: 1 << 20, local_size: Some(1 << 20), ..World::single() };
        assert_eq!(threads(&world, None, None)[0].severity, Warning);
        assert_eq!(threads(&World { local_size: Some(1), ..world }, None, None)[0].severity, Ok);
    }

    fn threads_of(omp: &str) -> super::super::finding::Severity {
        threads(&World::single(), None, Some(omp))[1].severity
    }
}
