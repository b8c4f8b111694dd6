//! What a configuration must satisfy beyond its types.

use std::path::Component;

use super::{DeviceKind, RunConfig, SleepMode, Source};
use crate::reward::RewardError;

impl RunConfig {
    /// Everything that is wrong, each with its key, the value and what to do.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Problems::default();
        self.check_run(&mut problems);
        self.check_data(&mut problems);
        self.check_rewards(&mut problems);
        self.eval.check(&mut problems);
        self.check_rollout(&mut problems);
        self.check_train(&mut problems);
        self.check_lora(&mut problems);
        self.check_services(&mut problems);
        self.security.check(&mut problems);
        self.hub.check(&mut problems);
        problems.0
    }

    /// Folder of the run.
    #[must_use]
    pub fn run_dir(&self) -> std::path::PathBuf {
        self.run.output_dir.join(&self.run.name)
    }

    fn check_run(&self, problems: &mut Problems) {
        let name = std::path::Path::new(&self.run.name);
        let plain = name.components().count() == 1 && matches!(name.components().next(), Some(Component::Normal(_)));
        problems.unless(plain, || {
            format!("run.name: {:?} must be one plain folder name, since it names the run's folder", self.run.name)
        });
        problems.unless(!self.model.path.as_os_str().is_empty(), || {
            "model.path: missing; name a Hugging Face model folder".to_owned()
        });
    }

    fn check_rewards(&self, problems: &mut Problems) {
        for (index, reward) in self.rewards.iter().enumerate() {
            if let Err(error) = reward.check() {
                let key = if matches!(error, RewardError::UnknownFunction { .. }) { ".function" } else { "" };
                problems.0.push(format!("rewards[{index}]{key}: {error}"));
            }
            let is_first = self.rewards[..index].iter().all(|other| other.name() != reward.name());
            problems.unless(is_first, || {
                format!(
                    "rewards[{index}].name: {:?} is the name of another reward; give it one of its own",
                    reward.name()
                )
            });
            problems.unless(reward.weight.is_finite(), || format!("rewards[{index}].weight: must be finite"));
        }
        if self.eval.num_prompts > 0 {
            let named = self.rewards.is_empty() || self.rewards.iter().any(|reward| reward.name() == self.eval.reward);
            problems.unless(named, || {
                format!("eval.reward: {:?} is not among rewards; evaluation counts its scores", self.eval.reward)
            });
            let is_asked = |source: &Source| source.held_out > Some(0.0) && source.asks_for(&self.eval.reward);
            problems.unless(self.data.all_sources().iter().any(is_asked), || {
                "eval.num_prompts: nothing to ask, since data.held_out is 0, or eval.reward is of no source with more"
                    .to_owned()
            });
        }
    }

    fn check_rollout(&self, problems: &mut Problems) {
        let rollout = &self.rollout;
        problems.unless(rollout.num_generations >= 2, || {
            format!(
                "rollout.num_generations: must be at least 2, got {}: a group of one has no one to compare with",
                rollout.num_generations
            )
        });
        let whole = rollout.num_generations > 0
            && rollout.generation_batch_size > 0
            && rollout.generation_batch_size.is_multiple_of(rollout.num_generations);
        problems.unless(whole, || {
            format!(
                "rollout.generation_batch_size: {} is not a multiple of rollout.num_generations {}: a step takes whole groups",
                rollout.generation_batch_size, rollout.num_generations
            )
        });
        problems.0.extend(
            rollout
                .sampling()
                .problems()
                .into_iter()
                .map(|problem| format!("rollout: {}", problem.replace("_tokens", "_completion_length"))),
        );
        problems.unless(rollout.temperature > 0.0, || {
            "rollout.temperature: must be over 0, or the completions of a group are all equal".to_owned()
        });
        problems.positive("rollout.deadline_seconds", rollout.deadline_seconds);
        if rollout.max_lag > 0 {
            problems.unless(rollout.sleep_while_training == SleepMode::Nothing, || {
                "rollout.max_lag: generators work while trainers train: set rollout.sleep_while_training to nothing"
                    .to_owned()
            });
            problems.unless(self.train.rollout_importance_sampling_correction, || {
                format!(
                    "rollout.max_lag: tokens of up to {} versions ago need train.rollout_importance_sampling_correction: \
                     true, best with train.rollout_importance_sampling_mode: token_truncate",
                    rollout.max_lag
                )
            });
        }
        let drops_weights = rollout.sleep_while_training == SleepMode::Weights;
        problems.unless(!drops_weights || self.model.device != DeviceKind::Cuda, || {
            "rollout.sleep_while_training: CUDA graphs refer to the weights of a generator on a GPU: use cache"
                .to_owned()
        });
        let longest = self.data.max_prompt_length + rollout.max_completion_length as usize;
        problems.unless(longest <= self.train.micro_batch_tokens, || {
            format!(
                "train.micro_batch_tokens: {} cannot hold one sequence of data.max_prompt_length + \
                 rollout.max_completion_length = {longest} tokens",
                self.train.micro_batch_tokens
            )
        });
    }

    fn check_services(&self, problems: &mut Problems) {
        let generator = &self.generator;
        for (key, value) in [
            ("block_size", generator.block_size),
            ("kv_cache_mib", generator.kv_cache_mib),
            ("max_num_seqs", generator.max_num_seqs),
            ("max_num_batched_tokens", generator.max_num_batched_tokens),
            ("steps_per_look", generator.steps_per_look),
        ] {
            problems.unless(value > 0, || format!("generator.{key}: must be at least 1"));
        }
        problems.unless(generator.max_num_batched_tokens >= generator.max_num_seqs, || {
            format!(
                "generator.max_num_batched_tokens: {} is under generator.max_num_seqs {}: a decode step needs a token for each",
                generator.max_num_batched_tokens, generator.max_num_seqs
            )
        });
        problems.positive("generator.connect_timeout_seconds", generator.connect_timeout_seconds);
        problems.positive("generator.probe_timeout_seconds", generator.probe_timeout_seconds);
        problems.positive("launch.save_seconds", self.launch.save_seconds);
        problems.positive("launch.grace_seconds", self.launch.grace_seconds);
        let launch = &self.launch;
        if let Some(memory) = launch.device_memory_gib {
            problems.positive("launch.device_memory_gib", memory);
        }
        problems.unless(launch.generators > 0 || launch.colocate, || {
            "launch.generators: must be at least 1, or launch.colocate true".to_owned()
        });
        if launch.colocate {
            problems.unless(self.rollout.max_lag == 0, || {
                "launch.colocate: sampling and training take turns in one process: set rollout.max_lag to 0".to_owned()
            });
            problems.unless(generator.addresses.is_empty() && generator.coordinator.is_none(), || {
                "launch.colocate: samples in the trainers' processes: leave generator.addresses and generator.coordinator out"
                    .to_owned()
            });
        }
        problems.unless(self.logging.logging_steps > 0, || "logging.logging_steps: must be at least 1".to_owned());
    }
}

#[derive(Default)]
pub(super) struct Problems(pub(super) Vec<String>);

impl Problems {
    pub(super) fn unless(&mut self, ok: bool, problem: impl FnOnce() -> String) {
        if !ok {
            self.0.push(problem());
        }
    }

    pub(super) fn positive(&mut self, key: &str, value: f64) {
        self.unless(value.is_finite() && value > 0.0, || format!("{key}: must be over 0, got {value}"));
    }
}
