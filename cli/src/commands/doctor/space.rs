//! Room for a run: on the disk that its folder is on, and in memory.

use std::path::Path;

use aha_core::config::RunConfig;
use aha_nn::model_config::ModelConfig;
use rustix::fs::statvfs;
use tch::Kind;

use super::finding::{Finding, gib};
use crate::commands::plan::{self, Row};

const FLOAT: u64 = 4;
/// Completions, metrics and logs of a run.
const RECORDS: u64 = 1 << 30;
/// Part of a memory over which it is called nearly full.
const NEARLY: f64 = 0.9;

/// Whether the run's folder can be written, and holds the checkpoints that are kept beside the one in the making.
pub(super) fn disk(config: &RunConfig, model: Option<&ModelConfig>) -> Finding {
    let run_dir = config.run_dir();
    // What is to be created lies on the disk of the nearest folder that is there.
    let place = run_dir.ancestors().find(|folder| folder.exists()).filter(|folder| *folder != Path::new(""));
    let place = place.unwrap_or(Path::new("."));
    if let Err(error) = tempfile::NamedTempFile::new_in(place) {
        let found = format!("{}: nothing can be written there: {error}", place.display());
        return Finding::problem("run folder", found, "set run.output_dir to a folder that you may write to");
    }
    let free = match statvfs(place) {
        Ok(stat) => stat.f_bavail * stat.f_frsize,
        Err(error) => {
            let found = format!("{}: its free space is not known: {error}", place.display());
            return Finding::warning("run folder", found, "see that its disk holds two checkpoints at least");
        }
    };
    let checkpoint = model.filter(|_| !config.lora.is_on()).map_or(0, |model| checkpoint_bytes(config, model));
    judge_disk(&place.display().to_string(), free, checkpoint, config.train.save_total_limit as u64)
}

/// `num_kept` of 0 keeps all checkpoints.
fn judge_disk(place: &str, free: u64, checkpoint: u64, num_kept: u64) -> Finding {
    let found = format!("{place}: {} free, {} a checkpoint", gib(free), gib(checkpoint));
    let fix = "free the disk, set run.output_dir to another, or train.save_total_limit to fewer checkpoints";
    // One stays while the next is written.
    if free < 2 * checkpoint + RECORDS {
        return Finding::problem("run folder", format!("{found}: not enough for two and the run's records"), fix);
    }
    if num_kept > 0 && free < (num_kept + 1) * checkpoint + RECORDS {
        let found = format!("{found}: not enough for the {num_kept} that are kept beside the one in the making");
        return Finding::warning("run folder", found, fix);
    }
    Finding::ok("run folder", found)
}

/// Weights, two moments and, beside weights of bf16, their masters.
fn checkpoint_bytes(config: &RunConfig, model: &ModelConfig) -> u64 {
    let element = if plan::kind(config) == Kind::BFloat16 { FLOAT / 2 + FLOAT } else { FLOAT };
    model.manifest().numel() as u64 * (element + 2 * FLOAT)
}

/// Whether what `aha plan` predicts for the processes of this machine fits. `gpu_bytes` is of the smallest GPU.
pub(super) fn memory(
    config: &RunConfig,
    model: &ModelConfig,
    world_size: usize,
    gpu_bytes: Option<u64>,
) -> Vec<Finding> {
    let rows = plan::rows(config, model, world_size);
    let num_trainers = config.launch.trainers.max(1);
    let count = |row: &Row| if row.is_generator { config.launch.generators.max(1) } else { num_trainers };
    let mut findings = Vec::new();
    let is_on_gpu = plan::device(config).is_cuda();
    if let Some(bytes) = gpu_bytes.filter(|_| is_on_gpu) {
        for row in rows.iter().filter(|row| row.is_on_device) {
            findings.push(judge_memory(&row.process, row.plan.total() as u64, bytes, "of a GPU"));
        }
    }
    let on_host = rows.iter().filter(|row| !(is_on_gpu && row.is_on_device));
    let bytes: usize = on_host.map(|row| count(row) * row.plan.total()).sum();
    if let Some(available) = available_memory().filter(|_| bytes > 0) {
        findings.push(judge_memory("trainers and generators of this machine", bytes as u64, available, "available"));
    }
    findings
}

fn judge_memory(process: &str, need: u64, available: u64, of: &str) -> Finding {
    let found = format!("{process}: {} as aha plan predicts, {} {of}", gib(need), gib(available));
    let fix = "aha plan shows what takes it: train.micro_batch_tokens, gradient_checkpointing, zero_stage, offload and \
               generator.kv_cache_mib change it";
    match need as f64 / available as f64 {
        share if share > 1.0 => Finding::problem("memory", found, fix),
        share if share > NEARLY => Finding::warning("memory", found, fix),
        _ => Finding::ok("memory", found),
    }
}

/// Of this machine, or what a container's bound leaves of it.
fn available_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = meminfo(&read("/proc/meminfo")?, "MemAvailable:")?;
    let number = |path| read(path)?.trim().parse::<u64>().ok();
    let bound = number("/sys/fs/cgroup/memory.max");
    let used = number("/sys/fs/cgroup/memory.current").unwrap_or(0);
    Some(bound.map_or(machine, |bound| machine.min(bound.saturating_sub(used))))
}

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::super::finding::Severity::{Ok, Problem, Warning};
    use super::*;

    #[test]
    fn a_disk_must_hold_two_checkpoints_and_should_hold_those_that_are_kept() {
        let judge = |free: u64, kept| judge_disk("d", free << 30, 10 << 30, kept).severity;
        assert_eq!([judge(20, 2), judge(21, 2), judge(31, 2), judge(21, 0)], [Problem, Warning, Ok, Ok]);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_a_problem() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let mut config = RunConfig::default();
        config.run.name = "r".to_owned();
        config.run.output_dir = file.join("runs");
        let found = disk(&config, None);
        assert!(found.severity == Problem && found.finding.contains("nothing can be written"), "{found:?}");
        config.run.output_dir = folder.path().join("runs/of/many");
        let found = disk(&config, None);
        assert!(found.finding.starts_with(&folder.path().display().to_string()), "{found:?}");
    }

    #[test]
    fn memory_is_judged_by_what_is_there() {
        let judge = |need: u64| judge_memory("trainer", need, 100, "available").severity;
        assert_eq!([judge(90), judge(91), judge(101)], [Ok, Warning, Problem]);
        assert_eq!(meminfo("MemTotal: 1 kB\nMemAvailable:   12 kB\n", "MemAvailable:"), Some(12 << 10));
        assert!(available_memory().unwrap() > 1 << 20);
    }
}
