//! Checkpoints of real ranks, and what damage, interruption and full disks do to them.

use std::collections::BTreeSet;
use std::process::Command;

use aha_core::rollout::Completion;
use aha_nn::model_folder::load_weights;
use aha_nn::weights::Weights;
use aha_proto::v1;
use serde_json::json;
use tch::{Device, Tensor};

use super::*;
use crate::test_generator::completion;
use crate::test_ranks::run_ranks;
use crate::torch::parameters::Parameters;
use crate::torch::zero::ShardState;

/// What the seed of a reference policy's weights is more than the policy's.
const REFERENCE: u64 = 1000;

const ENTROPY: EntropyControl = EntropyControl { entropy_coef: 0.015, last_entropy: Some(0.25) };

/// A base model and a folder for checkpoints.
struct Fixture {
    folder: tempfile::TempDir,
    model: ModelConfig,
}

impl Fixture {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    fn at(folder: tempfile::TempDir) -> Self {
        let base = folder.path().join("base");
        std::fs::create_dir(&base).unwrap();
        std::fs::write(base.join("tokenizer.json"), "{\"a\": 1}").unwrap();
        std::fs::write(base.join("generation_config.json"), "{}").unwrap();
        std::fs::write(base.join("README.md"), "not taken over").unwrap();
        let raw = json!({"model_type": "qwen2", "vocab_size": 401, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2});
        Self { folder, model: ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap() }
    }

    fn base(&self) -> PathBuf {
        self.folder.path().join("base")
    }

    fn checkpoints(&self) -> PathBuf {
        self.folder.path().join("checkpoints")
    }

    fn weights(&self, step: u64, world_size: usize) -> Weights {
        Weights::random(&self.model, step, world_size, Kind::Float, Device::Cpu)
    }

    /// One rank's share of a checkpoint of all ranks.
    fn save(&self, step: u64, limit: usize, group: &ProcessGroup) -> Result<PathBuf, CheckpointError> {
        self.save_with(step, limit, None, group)
    }

    fn save_with(
        &self,
        step: u64,
        limit: usize,
        best: Option<&Best>,
        group: &ProcessGroup,
    ) -> Result<PathBuf, CheckpointError> {
        let weights = self.weights(step, group.size());
        let snapshot = Snapshot {
            progress: Progress { step, entropy: Some(ENTROPY), best, received: &received(step, group.rank()) },
            num_updates: 2 * step,
            seed: 42,
            base_model: &self.base(),
            model_config: &self.model,
            weights: &weights,
            lora: None,
            reference: Some(&self.weights(step + REFERENCE, 1)),
            shards: &shards(&weights, step, group),
        };
        snapshot.save(&self.checkpoints(), limit, group)
    }

    fn save_alone(&self, step: u64, limit: usize) -> Result<PathBuf, CheckpointError> {
        self.save(step, limit, &solo())
    }

    fn latest(&self) -> Result<Option<Checkpoint>, CheckpointError> {
        read::latest(&self.checkpoints(), &solo())
    }

    fn latest_step(&self) -> Option<u64> {
        self.latest().unwrap().map(|checkpoint| checkpoint.state.step)
    }

    /// The names in the folder of checkpoints, hidden ones too.
    fn names(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.checkpoints()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// What a rank has of the step after `step` and of the one after that, of which nothing has come yet.
fn received(step: u64, rank: usize) -> Vec<Received> {
    let request = v1::GenerateRequest { prompt_id: 10 * step + rank as u64, ..Default::default() };
    let completion = |index| Completion::try_from(completion(&request, index, step)).unwrap();
    vec![
        Received { step: step + 1, completions: (0..3).map(completion).collect() },
        Received { step: step + 2, completions: Vec::new() },
    ]
}

fn solo() -> ProcessGroup {
    ProcessGroup::solo("test", Device::Cpu)
}

/// The state of a unit at `step`: every element tells its place.
fn state(numel: usize, step: u64) -> Tensor {
    Tensor::arange(numel as i64, (Kind::Float, Device::Cpu)) + step as f64
}

/// A rank's equal share of every padded unit, without the padding.
fn shards(weights: &Weights, step: u64, group: &ProcessGroup) -> Vec<ShardState> {
    let mut shards = Vec::new();
    for (unit_idx, unit) in weights.manifest.units.iter().enumerate() {
        let len = unit.padded_numel(group.size()) / group.size();
        let offset = group.rank() * len;
        let len = len.min(unit.numel().saturating_sub(offset));
        if len > 0 {
            let tensor = state(unit.numel(), step).narrow(0, offset as i64, len as i64);
            shards.push(ShardState { unit_idx, name: "exp_avg", offset, tensor });
        }
    }
    shards
}

fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

#[test]
fn what_any_number_of_ranks_writes_one_rank_reads() {
    for world_size in 1..=3 {
        let fixture = Fixture::new();
        let paths = run_ranks(world_size, |group| fixture.save(7, 2, &group).unwrap());
        assert!(paths.iter().all(|path| *path == fixture.checkpoints().join("step-7")));

        let checkpoint = fixture.latest().unwrap().unwrap();
        let State { step, version, num_updates, seed, entropy, .. } = checkpoint.state;
        assert_eq!(entropy, Some(ENTROPY));
        let expect: Vec<Received> = (0..world_size).flat_map(|rank| received(step, rank)).collect();
        assert_eq!(checkpoint.received().unwrap(), expect);
        assert_eq!((step, version, num_updates, seed), (7, PolicyVersion(7), 14, 42));
        assert_eq!(checkpoint.state.world_size, world_size);
        assert_eq!(ModelConfig::load(&checkpoint.folder).unwrap().manifest(), fixture.model.manifest());
        let weights = load_weights(&checkpoint.folder, &fixture.model, 1, Kind::Float, Device::Cpu).unwrap();
        let expect = fixture.weights(7, 1);
        for unit_idx in 0..weights.num_units() {
            assert!(weights.flat(unit_idx).equal(expect.flat(unit_idx)));
        }
        let reference = checkpoint.reference().unwrap();
        let reference = load_weights(&reference, &fixture.model, 1, Kind::Float, Device::Cpu).unwrap();
        assert!(reference.flat(0).equal(fixture.weights(7 + REFERENCE, 1).flat(0)));
        let optimizer = checkpoint.optimizer(&fixture.model.manifest()).unwrap();
        assert_eq!(optimizer.len(), weights.num_units());
        for FullState { unit_idx, name, tensor } in optimizer {
            assert_eq!(name, "exp_avg");
            assert!(tensor.equal(&state(weights.manifest.units[unit_idx].numel(), 7)));
        }
        let read = |name: &str| std::fs::read_to_string(checkpoint.folder.join(name)).ok();
        assert_eq!(read("tokenizer.json").as_deref(), Some("{\"a\": 1}"));
        assert!(read("generation_config.json").is_some() && read("README.md").is_none());
    }
}

/// Weights have names; the optimizer's state has an order alone.
#[test]
fn the_optimizers_state_is_not_taken_for_that_of_parameters_in_another_order() {
    let fixture = Fixture::new();
    fixture.save_alone(7, 2).unwrap();
    let mut checkpoint = fixture.latest().unwrap().unwrap();
    let manifest = fixture.model.manifest();
    checkpoint.optimizer(&manifest).unwrap();
    let mut other = manifest.clone();
    other.units[1].params.swap(1, 2);
    let message = checkpoint.optimizer(&other).unwrap_err().to_string();
    for part in ["step-7: ", "in another order", &hash_of(&manifest), &hash_of(&other), "model.path"] {
        assert!(message.contains(part), "{message}");
    }
    // As it was written before there was a hash: with each bias behind its matrix, where there are biases.
    checkpoint.state.manifest = None;
    let message = checkpoint.optimizer(&manifest).unwrap_err().to_string();
    assert!(message.contains("manifest none"), "{message}");
    other.units[1].params.iter_mut().for_each(|param| param.name = param.name.replace("bias", "weight"));
    checkpoint.optimizer(&other).unwrap();
}

#[test]
fn shared_weights_are_written_as_if_one_rank_had_them_whole() {
    let (shared, whole) = (Fixture::new(), Fixture::new());
    let model = |fixture: &Fixture| fixture.folder.path().join("model");
    run_ranks(3, |group| {
        let (rank, group) = (group.rank(), std::sync::Arc::new(group));
        let share = |seed| Parameters::of(3.into(), &group, shared.weights(seed, 3));
        let (weights, reference) = (share(7), share(7 + REFERENCE));
        let snapshot = Snapshot {
            progress: Progress { step: 7, entropy: Some(ENTROPY), best: None, received: &received(7, rank) },
            num_updates: 14,
            seed: 42,
            base_model: &shared.base(),
            model_config: &shared.model,
            weights: &weights,
            lora: None,
            reference: Some(&reference),
            shards: &shards(&shared.weights(7, 3), 7, &group),
        };
        snapshot.save(&shared.checkpoints(), 2, &group).unwrap();
        save_model(&model(&shared), &shared.base(), &shared.model, (&weights, Kind::Float), &group).unwrap();
        assert_eq!((weights.most_gathered(), reference.most_gathered()), (2, 2), "rank {rank}");
    });
    run_ranks(3, |group| whole.save(7, 2, &group).unwrap());
    save_model(&model(&whole), &whole.base(), &whole.model, (&whole.weights(7, 1), Kind::Float), &solo()).unwrap();
    for file in [
        "checkpoints/step-7/model.safetensors",
        "checkpoints/step-7/trainer_state/reference/model.safetensors",
        "model/model.safetensors",
    ] {
        let read = |fixture: &Fixture| std::fs::read(fixture.folder.path().join(file)).unwrap();
        assert!(read(&shared) == read(&whole), "{file}");
    }
}

#[test]
fn all_ranks_find_the_same_checkpoint() {
    let fixture = Fixture::new();
    fixture.save_alone(3, 2).unwrap();
    let found = run_ranks(2, |group| read::latest(&fixture.checkpoints(), &group).unwrap());
    assert_eq!(found[0].as_ref().unwrap().state.step, 3);
    assert_eq!(found[0], found[1]);
}

#[test]
fn without_checkpoints_there_is_none() {
    assert_eq!(Fixture::new().latest().unwrap(), None);
}

#[test]
fn every_damaged_file_is_named_and_the_checkpoint_before_is_used() {
    let fixture = Fixture::new();
    fixture.save_alone(1, 0).unwrap();
    let folder = fixture.save_alone(2, 0).unwrap();
    let mut files: Vec<String> = fixture.latest().unwrap().unwrap().state.files.into_keys().collect();
    files.push(STATE_FILE.to_owned());
    assert_eq!(files.len(), 9, "{files:?}");
    for file in files {
        let path = folder.join(&file);
        let whole = std::fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 0x80;
        for damaged in [Some(whole[..whole.len() - 1].to_vec()), Some(Vec::new()), Some(flipped), None] {
            match damaged {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let message = read::verify(&folder, 2).unwrap_err().to_string();
            assert!(message.contains(&file), "{message}");
            assert_eq!(fixture.latest_step(), Some(1), "{file}");
        }
        std::fs::write(&path, whole).unwrap();
        assert_eq!(fixture.latest_step(), Some(2));
    }
}

/// What is verified of a checkpoint whose list of files says more than it should.
#[track_caller]
fn check_listed(file: &str, expect: &str) {
    let fixture = Fixture::new();
    let folder = fixture.save_alone(1, 0).unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.join("endless")).unwrap();
    let path = folder.join(STATE_FILE);
    let mut state: State = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    state.files.insert(file.to_owned(), FileRecord { bytes: 1, xxh3: String::new() });
    std::fs::write(&path, serde_json::to_vec(&state).unwrap()).unwrap();
    let message = read::verify(&folder, 1).unwrap_err().to_string();
    assert!(message.contains(expect), "{message}");
}

#[test]
fn a_checkpoint_cannot_name_what_is_outside_or_never_ends() {
    for outside in ["/dev/zero", "../step-1/config.json", "trainer_state/../../step-1/config.json"] {
        check_listed(outside, &format!("state.json: lists {outside:?}, which is outside the checkpoint"));
    }
    check_listed("endless", "endless: it is no file");
}

#[test]
fn a_run_with_only_damaged_checkpoints_does_not_start_over() {
    let fixture = Fixture::new();
    let folder = fixture.save_alone(1, 0).unwrap();
    std::fs::write(folder.join("model.safetensors"), "").unwrap();
    let message = fixture.latest().unwrap_err().to_string();
    assert!(message.contains("model.safetensors: has 0 bytes") && message.contains("start over"), "{message}");
}

#[test]
fn interrupted_attempts_are_never_read_and_go_away() {
    let fixture = Fixture::new();
    fixture.save_alone(1, 0).unwrap();
    let whole = fixture.save_alone(2, 0).unwrap();
    std::fs::rename(&whole, folder::partial(&whole)).unwrap();
    std::fs::create_dir(folder::doomed(&whole)).unwrap();
    assert_eq!(fixture.latest_step(), Some(1));
    assert_eq!(fixture.names(), names(["step-1"]));
}

#[test]
fn the_oldest_go_when_there_are_too_many() {
    let fixture = Fixture::new();
    for step in [2, 4, 10] {
        fixture.save_alone(step, 2).unwrap();
    }
    assert_eq!(fixture.names(), names(["step-10", "step-4"]));
    fixture.save_alone(12, 0).unwrap();
    assert_eq!(fixture.names(), names(["step-10", "step-12", "step-4"]));
    // The run goes back to step 4, because the later ones are damaged.
    let folder = fixture.save_alone(6, 1).unwrap();
    assert_eq!(fixture.names(), names(["step-6"]));
    // Writing a step again replaces it.
    std::fs::write(folder.join("config.json"), "").unwrap();
    fixture.save_alone(6, 1).unwrap();
    assert_eq!(fixture.latest_step(), Some(6));
}

fn best_of(step: u64) -> Best {
    Best { step, metric: "held_out".to_owned(), value: step as f64 / 100.0 }
}

/// A run that evaluates at random, loses its newest checkpoints now and then, and goes on, beside a model of it.
#[test]
fn the_best_checkpoint_is_kept_whatever_happens() {
    let fixture = Fixture::new();
    let mut random = aha_core::dataset::SplitMix64::new(7);
    let (mut step, mut known, mut there) = (0, None::<Best>, Vec::<(u64, Option<Best>)>::new());
    for _ in 0..60 {
        let limit = random.below(3) as usize + 1;
        if random.below(4) > 0 || there.is_empty() {
            step += 1;
            let value = random.below(100) as f64 / 100.0;
            if known.as_ref().is_none_or(|best| value > best.value) {
                known = Some(Best { value, ..best_of(step) });
            }
            fixture.save_with(step, limit, known.as_ref(), &solo()).unwrap();
            there.retain(|(other, _)| *other < step);
            there.push((step, known.clone()));
            let best_step = known.as_ref().map(|best| best.step);
            let first = there.len().saturating_sub(limit);
            let kept = |index: usize, other: u64| index >= first || Some(other) == best_step;
            let all = std::mem::take(&mut there).into_iter().enumerate();
            there = all.filter(|(index, (other, _))| kept(*index, *other)).map(|(_, saved)| saved).collect();
        } else {
            let num_lost = random.below(there.len() as u64) as usize;
            for (step, _) in there.drain(there.len() - num_lost..) {
                std::fs::write(fixture.checkpoints().join(format!("step-{step}/config.json")), "damaged").unwrap();
            }
            let found = fixture.latest().unwrap().unwrap().state;
            (step, known) = (found.step, found.best);
            let (expect_step, expect) = there.last().unwrap();
            let is_there = |best: &Best| there.iter().any(|(step, _)| *step == best.step);
            assert_eq!((step, &known), (*expect_step, &expect.clone().filter(is_there)));
        }
        match &known {
            Some(known) => assert_eq!(best(&fixture.checkpoints()).unwrap().state.step, known.step),
            None => assert!(best(&fixture.checkpoints()).unwrap_err().to_string().contains("eval.keep_best")),
        }
        let newest = there.last().unwrap().0;
        for (step, _) in &there {
            read::verify(&folder::of_step(&fixture.checkpoints(), *step), *step).unwrap();
        }
        let found = folder::steps(&fixture.checkpoints()).unwrap();
        let older: Vec<u64> = found.into_iter().filter(|step| *step <= newest).collect();
        assert_eq!(older, there.iter().map(|(step, _)| *step).collect::<Vec<_>>());
    }
}

/// A file of the base model that fails when it is read.
#[cfg(target_os = "linux")]
#[test]
fn one_rank_s_failure_is_everybody_s_and_leaves_nothing_behind() {
    let fixture = Fixture::new();
    run_ranks(2, |group| fixture.save(1, 1, &group).unwrap());
    std::os::unix::fs::symlink("/proc/self/mem", fixture.base().join("merges.txt")).unwrap();
    let messages = run_ranks(2, |group| fixture.save(2, 1, &group).unwrap_err().to_string());
    assert!(messages[0].contains("merges.txt") && messages[0].contains("Input/output error"), "{}", messages[0]);
    assert_eq!(messages[1], format!("rank 0: {}", messages[0]));
    assert_eq!(fixture.names(), names(["step-1"]));
    assert_eq!(fixture.latest_step(), Some(1));
}

const KILLED_DIR: &str = "AHA_TEST_KILLED_DIR";

/// A run writes step 2, it is damaged and written again, and step 1 goes: one kill -9 at every place that
/// leaves a trace.
#[cfg(unix)]
#[test]
fn the_newest_whole_checkpoint_loads_after_a_kill_anywhere() {
    use std::os::unix::process::ExitStatusExt;
    let mut steps_found = BTreeSet::new();
    for kill_at in 1.. {
        let fixture = Fixture::new();
        fixture.save_with(1, 1, Some(&best_of(1)), &solo()).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "checkpoint::tests::saving_until_it_is_killed", "--ignored", "--nocapture"])
            .env(KILLED_DIR, fixture.folder.path())
            .env(crate::failpoint::KILL_AT, kill_at.to_string())
            .output()
            .unwrap();
        let finished = output.status.success();
        assert!(finished || output.status.signal() == Some(9), "{}", String::from_utf8_lossy(&output.stdout));

        let checkpoint = fixture.latest().unwrap().unwrap();
        let step = checkpoint.state.step;
        assert_eq!(checkpoint.state.best, Some(best_of(step)), "killed at {kill_at}");
        assert_eq!(best(&fixture.checkpoints()).unwrap(), checkpoint, "killed at {kill_at}");
        steps_found.insert((step, finished));
        let weights = load_weights(&checkpoint.folder, &fixture.model, 1, Kind::Float, Device::Cpu).unwrap();
        assert!(weights.embedding().equal(&fixture.weights(step, 1).embedding()), "killed at {kill_at}");
        for FullState { unit_idx, tensor, .. } in checkpoint.optimizer(&fixture.model.manifest()).unwrap() {
            let numel = weights.manifest.units[unit_idx].numel();
            assert!(tensor.equal(&state(numel, step)), "killed at {kill_at}");
        }
        assert!(fixture.names().iter().all(|name| !name.starts_with(PARTIAL)), "killed at {kill_at}");
        // A run that goes on can write the next one.
        fixture.save_alone(3, 1).unwrap();
        assert_eq!(fixture.names(), names(["step-3"]), "killed at {kill_at}");
        if finished {
            assert!(kill_at > 30, "only {kill_at} places were reached");
            break;
        }
    }
    assert_eq!(steps_found, BTreeSet::from([(1, false), (2, false), (2, true)]));
}

#[test]
#[ignore = "kills its process: run by the_newest_whole_checkpoint_loads_after_a_kill_anywhere"]
fn saving_until_it_is_killed() {
    let dir = PathBuf::from(std::env::var_os(KILLED_DIR).unwrap());
    let scratch = Fixture::new();
    for limit in [2, 1] {
        let weights = scratch.weights(2, 1);
        let best = best_of(2);
        let snapshot = Snapshot {
            progress: Progress { step: 2, entropy: Some(ENTROPY), best: Some(&best), received: &received(2, 0) },
            num_updates: 4,
            seed: 42,
            base_model: &dir.join("base"),
            model_config: &scratch.model,
            weights: &weights,
            lora: None,
            reference: Some(&scratch.weights(2 + REFERENCE, 1)),
            shards: &shards(&weights, 2, &solo()),
        };
        let folder = snapshot.save(&dir.join("checkpoints"), limit, &solo()).unwrap();
        if limit == 2 {
            std::fs::write(folder.join("config.json"), "").unwrap();
        }
    }
}

const FULL_DISK_DIR: &str = "AHA_TEST_FULL_DISK_DIR";

/// A limit on the size of files stands for the full disk: it needs no privileges, and `write` fails in the same way.
#[cfg(unix)]
#[test]
fn a_full_disk_is_named_and_earlier_checkpoints_stay() {
    let fixture = Fixture::new();
    fixture.save_alone(1, 1).unwrap();
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "checkpoint::tests::saving_to_a_full_disk", "--ignored", "--nocapture"])
        .env(FULL_DISK_DIR, fixture.folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("model.safetensors: ") && text.contains("File too large"), "{text}");
    assert_eq!(fixture.names(), names(["step-1"]));
    assert_eq!(fixture.latest_step(), Some(1));
}

#[test]
#[ignore = "needs a process whose files cannot grow: run by a_full_disk_is_named_and_earlier_checkpoints_stay"]
fn saving_to_a_full_disk() {
    let dir = PathBuf::from(std::env::var_os(FULL_DISK_DIR).unwrap());
    let scratch = Fixture::new();
    let base = dir.join("base");
    let weights = scratch.weights(2, 1);
    let snapshot = Snapshot {
        progress: Progress { step: 2, entropy: Some(ENTROPY), best: None, received: &received(2, 0) },
        num_updates: 4,
        seed: 42,
        base_model: &base,
        model_config: &scratch.model,
        weights: &weights,
        lora: None,
        reference: None,
        shards: &shards(&weights, 2, &solo()),
    };
    let error = snapshot.save(&dir.join("checkpoints"), 1, &solo()).unwrap_err();
    println!("{error}");
    let weights = (&weights as &dyn ModelWeights, Kind::Float);
    let error = save_model(&dir.join("checkpoints/model"), &base, &scratch.model, weights, &solo()).unwrap_err();
    println!("{error}");
}

#[test]
fn a_saved_model_is_a_model_folder_and_replaces_the_last() {
    let fixture = Fixture::new();
    let folder = fixture.folder.path().join("model");
    for seed in [1, 2] {
        let weights = fixture.weights(seed, 2);
        save_model(&folder, &fixture.base(), &fixture.model, (&weights, Kind::Float), &solo()).unwrap();
        let read = load_weights(&folder, &fixture.model, 2, Kind::Float, Device::Cpu).unwrap();
        assert!(read.embedding().equal(&weights.embedding()));
    }
    let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let expect = names(["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(entries.collect::<BTreeSet<_>>(), expect);
    let left: Vec<_> = std::fs::read_dir(fixture.folder.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[cfg(unix)]
#[test]
fn weights_are_as_readable_as_the_rest() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::new();
    let folder = fixture.save_alone(1, 1).unwrap();
    let mode = |name: &str| std::fs::metadata(folder.join(name)).unwrap().permissions().mode();
    assert_eq!(mode("model.safetensors"), mode("config.json"));
}
