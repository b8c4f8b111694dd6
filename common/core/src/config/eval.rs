//! What is evaluated: rows held out of the data set, and suites, which are sets of questions of their own.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::validate::Problems;
use super::{Countdown, PromptTemplate, RewardSpec};
use crate::dataset::ColumnMap;
use crate::nearest::hint;
use crate::reward::RewardFunction;
use crate::rollout::Sampling;

mod built_in;

pub use built_in::names as built_in_suites;

/// The name of the evaluation on held-out rows among suites.
pub const HELD_OUT: &str = "held_out";
/// The name of the suites' mean.
pub const AVERAGE: &str = "average";

/// Accuracy on held-out rows and on suites, through the generators; in supervised fine-tuning, the loss on held-out rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Eval {
    /// Held-out prompts that are asked; 0 asks none.
    pub num_prompts: usize,
    /// Steps between evaluations; 0 evaluates before the first and after the last step only.
    pub eval_steps: u64,
    /// Of the held-out prompts' completions; 0 is greedy.
    pub temperature: f32,
    /// A held-out prompt's completion counts as right when the reward of this name scores 1.
    pub reward: String,
    /// Suites that are asked as well: a list of built-in names, or a map from names to what differs from the built-in suite
    /// of that name, or makes a new one.
    pub suites: Suites,
    /// Folder in which relative paths of suites begin.
    pub data_dir: PathBuf,
    /// Keep the checkpoint of the best evaluation, beside the newest `train.save_total_limit`, and write one where there is
    /// a new best. `checkpoints/best.json` names it.
    pub keep_best: bool,
    /// Whose accuracy decides which is best: `held_out`, a suite's name, or `average`, the mean of all suites.
    pub metric: String,
}

/// Suites by name, each with what differs from the built-in one.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(transparent)]
pub struct Suites(pub BTreeMap<String, SuiteOptions>);

/// What a configuration says of a suite; unset is as in the built-in suite of that name, or else the default.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SuiteOptions {
    /// `.jsonl` or `.parquet`, a file or a folder of them; in `eval.data_dir` if it is relative.
    pub path: Option<PathBuf>,
    /// Instead of a file, puzzles that are made on the spot, from a seed of their own.
    pub countdown: Option<Countdown>,
    /// Our column name to the data set's, where they differ.
    pub columns: Option<ColumnMap>,
    pub prompt: Option<PromptTemplate>,
    /// A completion counts as right when the first of these scores 1; the others are recorded beside it.
    pub rewards: Option<Vec<RewardSpec>>,
    /// The first rows that are asked; 0 asks all, which is the default.
    pub num_prompts: Option<usize>,
    /// Completions of a prompt; 1 by default.
    pub num_samples: Option<usize>,
    /// In tokens; 1024 by default.
    pub max_completion_length: Option<u32>,
    pub stop: Option<Vec<String>>,
    /// 0 is greedy, and the default.
    pub temperature: Option<f32>,
    /// 1 by default.
    pub top_p: Option<f32>,
}

/// A suite as it is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Suite {
    pub name: String,
    pub questions: Questions,
    pub columns: ColumnMap,
    pub prompt: PromptTemplate,
    /// The first decides what is right.
    pub rewards: Vec<RewardSpec>,
    /// 0 for all.
    pub num_prompts: usize,
    pub num_samples: usize,
    pub sampling: Sampling,
    /// Where a user gets the data, if it is known.
    pub origin: Option<&'static str>,
}

/// Where a suite's rows come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Questions {
    File(PathBuf),
    Countdown(Countdown),
}

impl Eval {
    /// Whether there is anything to evaluate.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.num_prompts > 0 || !self.suites.0.is_empty()
    }

    /// The suites that a configuration names, in the order of their names.
    ///
    /// # Errors
    /// Everything that is wrong with them, each with its key.
    pub fn resolved(&self) -> Result<Vec<Suite>, Vec<String>> {
        let mut problems = Problems::default();
        let suites = self.suites.0.iter().filter_map(|(name, options)| {
            let resolved = Suite::resolve(name, options).and_then(|suite| suite.checked());
            resolved.map_err(|found| problems.0.extend(found)).ok()
        });
        let suites = suites.collect();
        if problems.0.is_empty() { Ok(suites) } else { Err(problems.0) }
    }

    pub(super) fn check(&self, problems: &mut Problems) {
        problems.0.extend(self.resolved().err().into_iter().flatten());
        if self.keep_best {
            let is_asked = match self.metric.as_str() {
                HELD_OUT => self.num_prompts > 0,
                AVERAGE => !self.suites.0.is_empty(),
                name => self.suites.0.contains_key(name),
            };
            problems.unless(is_asked, || {
                format!(
                    "eval.metric: {:?} is not evaluated; eval.keep_best needs {HELD_OUT} with eval.num_prompts over 0, a name \
                     in eval.suites, or {AVERAGE} with any",
                    self.metric
                )
            });
        }
    }
}

impl Suite {
    /// The built-in suite called `name`, or a new one, with `options`.
    ///
    /// # Errors
    /// Names what a new suite lacks.
    pub fn resolve(name: &str, options: &SuiteOptions) -> Result<Self, Vec<String>> {
        let mut problems = Problems::default();
        let (base, origin) = match built_in::of(name) {
            Some((base, origin)) => (base, origin),
            None => (SuiteOptions::default(), None),
        };
        let SuiteOptions { path, countdown, columns, prompt, rewards, .. } = options.clone();
        let questions = match (path, countdown, base.path, base.countdown) {
            (Some(_), Some(_), ..) => {
                problems.0.push(format!("eval.suites.{name}: has both a path and countdown; leave one of them out"));
                None
            }
            (Some(path), None, ..) | (None, None, Some(path), _) => Some(Questions::File(path)),
            (None, Some(countdown), ..) | (None, None, None, Some(countdown)) => Some(Questions::Countdown(countdown)),
            (None, None, None, None) => {
                let (known, hint) = (built_in_suites().join(", "), hint(name, built_in_suites()));
                problems.0.push(format!(
                    "eval.suites.{name}.path: missing; a suite of your own needs a path, a prompt and rewards; built in are \
                     {known}{hint}"
                ));
                None
            }
        };
        let prompt = prompt.or(base.prompt).unwrap_or_default();
        problems.unless(!prompt.user.is_empty(), || {
            format!("eval.suites.{name}.prompt.user: missing; write the question as a template over the row's columns")
        });
        let rewards = rewards.or(base.rewards).unwrap_or_default();
        problems.unless(!rewards.is_empty(), || {
            format!("eval.suites.{name}.rewards: missing; the first one decides which completions are right")
        });
        let sampling = Sampling {
            temperature: options.temperature.or(base.temperature).unwrap_or(0.0),
            top_p: options.top_p.or(base.top_p).unwrap_or(1.0),
            max_tokens: options.max_completion_length.or(base.max_completion_length).unwrap_or(1024),
            stop: options.stop.clone().or(base.stop).unwrap_or_default(),
            ..Sampling::default()
        };
        let Some(questions) = questions.filter(|_| problems.0.is_empty()) else { return Err(problems.0) };
        Ok(Self {
            name: name.to_owned(),
            questions,
            columns: columns.or(base.columns).unwrap_or_default(),
            prompt,
            rewards,
            num_prompts: options.num_prompts.or(base.num_prompts).unwrap_or(0),
            num_samples: options.num_samples.or(base.num_samples).unwrap_or(1),
            sampling,
            origin,
        })
    }

    /// The suite, if it can be asked.
    ///
    /// # Errors
    /// Everything that is wrong with it, each with its key.
    pub fn checked(self) -> Result<Self, Vec<String>> {
        let (mut problems, name) = (Problems::default(), &self.name);
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        let is_name =
            !name.starts_with('.') && name.chars().all(is_plain) && ![HELD_OUT, AVERAGE, ""].contains(&&**name);
        problems.unless(is_name, || {
            format!(
                "eval.suites.{name}: {name:?} cannot be a suite's name, which names files: letters, digits, _, - and ., and \
                 neither {HELD_OUT} nor {AVERAGE}"
            )
        });
        for (index, reward) in self.rewards.iter().enumerate() {
            if let Err(error) = RewardFunction::new(reward) {
                problems.0.push(format!("eval.suites.{name}.rewards[{index}]: {error}"));
            }
        }
        problems.unless(self.num_samples > 0, || format!("eval.suites.{name}.num_samples: must be at least 1"));
        problems.unless(self.num_samples < 2 || self.sampling.temperature > 0.0, || {
            format!(
                "eval.suites.{name}.temperature: {} greedy completions of a prompt are all equal; set it over 0, or \
                 num_samples to 1",
                self.num_samples
            )
        });
        problems.0.extend(
            self.sampling.problems().into_iter().map(|problem| {
                format!("eval.suites.{name}: {}", problem.replace("max_tokens", "max_completion_length"))
            }),
        );
        if problems.0.is_empty() { Ok(self) } else { Err(problems.0) }
    }
}

impl Default for Eval {
    fn default() -> Self {
        Self {
            num_prompts: 0,
            eval_steps: 0,
            temperature: 0.0,
            reward: "equation".to_owned(),
            suites: Suites::default(),
            data_dir: "data".into(),
            keep_best: false,
            metric: HELD_OUT.to_owned(),
        }
    }
}

/// A list of names is short for a map without options.
impl<'de> Deserialize<'de> for Suites {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListOrMap;
        impl<'de> Visitor<'de> for ListOrMap {
            type Value = Suites;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of names, or a map from names to options")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<Suites, A::Error> {
                let mut suites = BTreeMap::new();
                while let Some(name) = names.next_element()? {
                    suites.insert(name, SuiteOptions::default());
                }
                Ok(Suites(suites))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut options: A) -> Result<Suites, A::Error> {
                let mut suites = BTreeMap::new();
                while let Some((name, options)) = options.next_entry::<_, Option<SuiteOptions>>()? {
                    suites.insert(name, options.unwrap_or_default());
                }
                Ok(Suites(suites))
            }
        }
        deserializer.deserialize_any(ListOrMap)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn eval(value: Value) -> Eval {
        serde_json::from_value(value).unwrap()
    }

    #[track_caller]
    fn check_problems(value: Value, expect: &[&str]) {
        let mut problems = Problems::default();
        eval(value).check(&mut problems);
        assert_eq!(problems.0.len(), expect.len(), "{:?}", problems.0);
        for (problem, expect) in problems.0.iter().zip(expect) {
            assert!(problem.contains(expect), "no {expect:?} in {problem:?}");
        }
    }

    fn own() -> Value {
        json!({"path": "mine.jsonl", "prompt": {"chat": false, "user": "{{ q }}"}, "rewards": [{"function": "equation"}]})
    }

    #[test]
    fn a_list_of_names_is_a_map_without_options() {
        let list = eval(json!({"suites": ["countdown", "gsm8k"]}));
        assert_eq!(list, eval(json!({"suites": {"countdown": null, "gsm8k": {}}})));
        assert_eq!(eval(serde_json::to_value(&list).unwrap()), list);
    }

    #[test]
    fn options_win_over_the_built_in_suite() {
        let suites = eval(json!({"suites": {"countdown": {"num_prompts": 5, "temperature": 0.5, "num_samples": 3}}}));
        let suite = suites.resolved().unwrap().remove(0);
        assert_eq!((suite.num_prompts, suite.num_samples, suite.sampling.temperature), (5, 3, 0.5));
        assert!(suite.prompt.user.contains("{{ nums }}") && matches!(suite.questions, Questions::Countdown(_)));
        let file = eval(json!({"suites": {"countdown": {"path": "puzzles.parquet"}}})).resolved().unwrap().remove(0);
        assert_eq!(file.questions, Questions::File("puzzles.parquet".into()));
        assert_eq!(file.rewards, suite.rewards);
    }

    #[test]
    fn every_built_in_suite_has_all_that_a_suite_needs() {
        for name in built_in_suites() {
            let suite = Suite::resolve(name, &SuiteOptions::default()).unwrap();
            assert!(matches!(suite.questions, Questions::Countdown(_)) || suite.origin.is_some(), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_asked_is_named() {
        check_problems(
            json!({"suites": ["gms8k"]}),
            &["did you mean \"gsm8k\"?", "gms8k.prompt.user", "gms8k.rewards"],
        );
        check_problems(json!({"suites": ["mine"]}), &["suites.mine.path: missing", "mine.prompt.user", "mine.rewards"]);
        check_problems(json!({"suites": {"average": own()}}), &["cannot be a suite's name"]);
        check_problems(json!({"suites": {"../x": own()}}), &["cannot be a suite's name"]);
        let mut wrong = own();
        wrong["rewards"][0]["function"] = "equasion".into();
        wrong["num_samples"] = 4.into();
        wrong["max_completion_length"] = 0.into();
        wrong["countdown"] = json!({});
        check_problems(json!({"suites": {"mine": wrong.clone()}}), &["both a path and countdown"]);
        wrong.as_object_mut().unwrap().remove("countdown");
        check_problems(
            json!({"suites": {"mine": wrong}}),
            &["mine.rewards[0]: \"equasion\"", "4 greedy completions", "max_completion_length must be at least 1"],
        );
    }

    #[test]
    fn the_metric_of_the_best_must_be_evaluated() {
        check_problems(json!({"keep_best": true}), &["\"held_out\" is not evaluated"]);
        check_problems(json!({"keep_best": true, "metric": "average"}), &["\"average\" is not evaluated"]);
        let suites = json!({"mine": own()});
        check_problems(json!({"keep_best": true, "metric": "mien", "suites": suites}), &["\"mien\" is not evaluated"]);
        for metric in ["held_out", "average", "mine"] {
            let asked = json!({"keep_best": true, "metric": metric, "suites": suites, "num_prompts": 1});
            check_problems(asked, &[]);
        }
    }
}
