//! The folder of a run: `config.yaml`, checkpoints, completions, logs. It is what makes a run resumable.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use aha_core::config::{ConfigError, RewardSpec, RunConfig};
use aha_nn::comm::{CommError, ProcessGroup};
use serde::Serialize;
use serde_json::Value;

use crate::agreement::{Disagreement, agree};
use crate::durable;

const CONFIG_FILE: &str = "config.yaml";
const SUMMARY_FILE: &str = "summary.json";
pub(crate) const LOGS_DIR: &str = "logs";
const DIRS: [&str; 4] = ["completions", "completion_samples", "checkpoints", LOGS_DIR];

/// Settings that change how a run is carried out and not what comes out: sections, or keys. A run goes on under other
/// values of these.
const FREE_SETTINGS: [&str; 25] = [
    "run.output_dir",
    "eval.data_dir",
    "eval.keep_best",
    "generator.addresses",
    "generator.connect_timeout_seconds",
    "generator.coordinator",
    "generator.kernel_cache",
    "generator.metrics_address",
    "generator.probe_timeout_seconds",
    "generator.threads",
    "generator.vllm_metric_names",
    "hub",
    "launch",
    "logging",
    "rollout.deadline_seconds",
    "rollout.sleep_while_training",
    "security",
    "train.check_collectives",
    "train.collective_timeout_seconds",
    "train.max_skipped_steps",
    "train.max_wall_clock_seconds",
    "train.push_backend",
    "train.push_timeout_seconds",
    "train.save_steps",
    "train.save_total_limit",
];

/// A run's folder, `output_dir/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir {
    root: PathBuf,
}

/// A setting whose value is not that of the run in the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Dotted, such as `train.learning_rate`.
    pub key: String,
    /// JSON, or `nothing`.
    pub there: String,
    pub here: String,
}

#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    #[error(
        "{} holds a run with other settings:{}\nset these as they were to resume it, choose another run.name, or remove \
         the folder", root.display(), list(differences)
    )]
    OtherSettings { root: PathBuf, differences: Vec<Difference> },
    #[error("{} holds files of a run, but no {CONFIG_FILE}: choose another run.name, or remove the folder", root.display())]
    NoConfig { root: PathBuf },
    #[error("the settings of the run in {} cannot be read: {source}", root.display())]
    BadConfig { root: PathBuf, source: ConfigError },
    #[error("cannot write {}: {reason}", path.display())]
    Unwritable { path: PathBuf, reason: String },
    #[error("rank {rank} could not open the run's folder: {reason}")]
    Elsewhere { rank: usize, reason: String },
    #[error(transparent)]
    Comm(#[from] CommError),
}

impl RunDir {
    /// Creates the folder of a new run, or finds that of the same run again. Rank 0 does it, and all ranks of `group`
    /// learn whether it could.
    ///
    /// The settings of a run that is already there must equal `config` in all that shapes the result; `config.yaml` is
    /// brought up to date in the rest.
    ///
    /// # Errors
    /// [`RunDirError::OtherSettings`] lists every setting that differs; the others say what is wrong with the folder.
    pub fn open(config: &RunConfig, group: &ProcessGroup) -> Result<Self, RunDirError> {
        let run_dir = Self { root: config.run_dir() };
        let outcome = if group.rank() == 0 { run_dir.prepare(config) } else { Ok(()) };
        agree(group, outcome.map(|()| Vec::new()))?;
        Ok(run_dir)
    }

    /// Whether the run has begun.
    #[must_use]
    pub fn exists(config: &RunConfig) -> bool {
        config.run_dir().join(CONFIG_FILE).exists()
    }

    /// Writes `summary.json`, whole or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_summary(&self, summary: &impl Serialize) -> Result<(), RunDirError> {
        let path = self.summary_file();
        let text = serde_json::to_string_pretty(summary).map_err(|error| unwritable(&path, error))?;
        durable::replace_file(&path, format!("{text}\n").as_bytes()).map_err(|error| unwritable(&path, error))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.root
    }

    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    #[must_use]
    pub fn completions(&self) -> PathBuf {
        self.root.join("completions")
    }

    #[must_use]
    pub fn completion_samples(&self) -> PathBuf {
        self.root.join("completion_samples")
    }

    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join(LOGS_DIR)
    }

    /// The trained model, a Hugging Face folder, once the run has ended.
    #[must_use]
    pub fn model(&self) -> PathBuf {
        self.root.join("model")
    }

    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.root.join(CONFIG_FILE)
    }

    #[must_use]
    pub fn summary_file(&self) -> PathBuf {
        self.root.join(SUMMARY_FILE)
    }

    fn prepare(&self, config: &RunConfig) -> Result<(), RunDirError> {
        self.check_is_free_for(config)?;
        for dir in DIRS {
            let path = self.root.join(dir);
            std::fs::create_dir_all(&path).map_err(|error| unwritable(&path, error))?;
        }
        let path = self.config_file();
        let text = serde_saphyr::to_string(config).map_err(|error| unwritable(&path, error))?;
        durable::replace_file(&path, text.as_bytes()).map_err(|error| unwritable(&path, error))
    }

    fn check_is_free_for(&self, config: &RunConfig) -> Result<(), RunDirError> {
        let root = self.root.clone();
        if !self.config_file().is_file() {
            // A launcher may have begun its logs before the first trainer came up.
            let names = contents(&root).map_err(|error| unwritable(&root, error))?;
            let is_new = names.iter().all(|name| name == LOGS_DIR);
            return if is_new { Ok(()) } else { Err(RunDirError::NoConfig { root }) };
        }
        let there = aha_core::config::load(&self.config_file(), [], &[])
            .map_err(|source| RunDirError::BadConfig { root: root.clone(), source })?;
        let differences = differences(&there, config);
        if differences.is_empty() { Ok(()) } else { Err(RunDirError::OtherSettings { root, differences }) }
    }
}

impl From<Disagreement<RunDirError>> for RunDirError {
    fn from(disagreement: Disagreement<RunDirError>) -> Self {
        match disagreement {
            Disagreement::Here(error) => error,
            Disagreement::Elsewhere { rank, reason } => Self::Elsewhere { rank, reason },
            Disagreement::Comm(error) => Self::Comm(error),
        }
    }
}

/// The settings that shape the result and are not equal.
fn differences(there: &RunConfig, here: &RunConfig) -> Vec<Difference> {
    let (there, here) = (settings(there), settings(here));
    let keys: std::collections::BTreeSet<_> = there.keys().chain(here.keys()).collect();
    let value = |settings: &BTreeMap<String, String>, key: &str| {
        settings.get(key).cloned().unwrap_or_else(|| "nothing".to_owned())
    };
    keys.into_iter()
        .filter(|key| there.get(*key) != here.get(*key) && !is_free(key))
        .map(|key| Difference { key: key.clone(), there: value(&there, key), here: value(&here, key) })
        .collect()
}

fn is_free(key: &str) -> bool {
    FREE_SETTINGS.iter().any(|free| key.strip_prefix(free).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// Every key, dotted, with its value as JSON. Lists are values. How rewarders are reached is left out.
fn settings(config: &RunConfig) -> BTreeMap<String, String> {
    fn walk(prefix: &str, value: &Value, settings: &mut BTreeMap<String, String>) {
        match value {
            Value::Object(map) if !map.is_empty() => {
                for (key, value) in map {
                    let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                    walk(&path, value, settings);
                }
            }
            _ => {
                settings.insert(prefix.to_owned(), value.to_string());
            }
        }
    }
    let rewards = config.rewards.iter().map(RewardSpec::without_means).collect();
    let config = &RunConfig { rewards, ..config.clone() };
    // Through text, because a single-precision 0.2 reads "0.2" there, and 0.20000000298 as a value.
    let tree = serde_json::to_string(config).and_then(|text| serde_json::from_str::<Value>(&text));
    let mut settings = BTreeMap::new();
    walk("", &tree.expect("a configuration is plain data, which JSON can hold"), &mut settings);
    settings
}

fn contents(folder: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.file_name())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn list(differences: &[Difference]) -> String {
    let line = |Difference { key, there, here }: &Difference| format!("\n  - {key}: {there} there, {here} here");
    differences.iter().map(line).collect()
}

fn unwritable(path: &Path, reason: impl ToString) -> RunDirError {
    RunDirError::Unwritable { path: path.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(output_dir: &Path) -> RunConfig {
        let mut config = RunConfig::default();
        config.run.name = "test".to_owned();
        config.run.output_dir = output_dir.to_owned();
        config.model.path = "models/tiny".into();
        config.data.prompt.user = "make {{ target }} of {{ nums }}".to_owned();
        config.rewards = vec![RewardSpec::of("equation")];
        config
    }

    fn open(config: &RunConfig) -> Result<RunDir, RunDirError> {
        RunDir::open(config, &ProcessGroup::solo("test", tch::Device::Cpu))
    }

    fn saved_config(run_dir: &RunDir) -> RunConfig {
        aha_core::config::load(&run_dir.config_file(), [], &[]).unwrap()
    }

    #[test]
    fn a_new_folder_holds_the_resolved_configuration() {
        let output_dir = tempfile::tempdir().unwrap();
        let config = config(output_dir.path());
        let run_dir = open(&config).unwrap();
        assert_eq!(saved_config(&run_dir), config);
        for dir in [run_dir.checkpoints(), run_dir.completions(), run_dir.completion_samples(), run_dir.logs()] {
            assert!(dir.is_dir(), "{dir:?}");
        }
        run_dir.write_summary(&serde_json::json!({"steps": 3})).unwrap();
        let summary = std::fs::read_to_string(run_dir.summary_file()).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&summary).unwrap()["steps"], 3);
    }

    #[test]
    fn the_same_run_goes_on_under_other_free_settings() {
        let output_dir = tempfile::tempdir().unwrap();
        let mut config = config(output_dir.path());
        open(&config).unwrap();
        config.generator.addresses = vec!["127.0.0.1:4000".to_owned()];
        config.generator.metrics_address = Some(([127, 0, 0, 1], 9400).into());
        config.generator.kernel_cache = Some("kernels".into());
        config.launch.trainers = 3;
        config.security.token_file = Some("a/file/that/was/moved".into());
        config.logging.logging_steps = 7;
        config.train.save_steps = 1;
        assert_eq!(saved_config(&open(&config).unwrap()), config);
    }

    #[test]
    fn a_rewarder_may_have_moved_but_judges_by_the_same_range() {
        let output_dir = tempfile::tempdir().unwrap();
        let mut config = config(output_dir.path());
        let rewarder = |address: &str, high: f32| {
            let spec = serde_json::json!({"function": "rewarder", "address": address, "range": [0.0, high]});
            vec![serde_json::from_value(spec).unwrap()]
        };
        config.rewards = rewarder("here:1", 1.0);
        open(&config).unwrap();
        config.rewards = rewarder("there:2", 1.0);
        assert_eq!(saved_config(&open(&config).unwrap()), config);
        config.rewards = rewarder("there:2", 2.0);
        let message = open(&config).unwrap_err().to_string();
        assert!(message.contains("rewards: ") && !message.contains("here:1"), "{message}");
    }

    #[test]
    fn every_other_setting_that_differs_is_listed() {
        let output_dir = tempfile::tempdir().unwrap();
        let mut config = config(output_dir.path());
        let run_dir = open(&config).unwrap();
        let before = saved_config(&run_dir);
        config.train.max_steps = 7;
        config.train.epsilon = 0.1;
        config.rollout.stop = vec!["</answer>".to_owned()];
        config.data.columns.insert("nums".to_owned(), "numbers".to_owned());
        let message = open(&config).unwrap_err().to_string();
        for expect in [
            "train.max_steps: 100 there, 7 here",
            "train.epsilon: 0.2 there, 0.1 here",
            "rollout.stop: [] there, [\"</answer>\"] here",
            "data.columns: {} there, nothing here",
            "data.columns.nums: nothing there, \"numbers\" here",
            "choose another run.name, or remove the folder",
        ] {
            assert!(message.contains(expect), "no {expect:?} in: {message}");
        }
        assert_eq!(message.matches("\n  - ").count(), 5, "{message}");
        assert_eq!(saved_config(&run_dir), before);
    }

    #[test]
    fn folders_of_something_else_are_left_alone() {
        let output_dir = tempfile::tempdir().unwrap();
        let config = config(output_dir.path());
        let root = config.run_dir();
        std::fs::create_dir_all(root.join("logs")).unwrap();
        std::fs::write(root.join("notes.txt"), "mine").unwrap();
        assert!(matches!(open(&config), Err(RunDirError::NoConfig { .. })));
        std::fs::remove_file(root.join("notes.txt")).unwrap();
        assert_eq!(open(&config).unwrap().path(), root);
        std::fs::write(root.join("config.yaml"), "run: {name: [").unwrap();
        assert!(matches!(open(&config), Err(RunDirError::BadConfig { .. })));
    }
}
