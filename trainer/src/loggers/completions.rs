//! What the policy wrote: every completion of every step, the sample files of the R1 Countdown recipe, and one of completions
//! that reflect.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::random::derive_seed;
use aha_core::reflection::Reflection;
use aha_core::rollout::{Completion, FinishReason, Prompt, Reward};
use serde::{Serialize, Serializer};

use super::LoggerOptions;
use super::error::{IoContext, LoggerError};
use super::jsonl::replace;

/// One line of `completions/step_000010.jsonl`, less the step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompletionRecord {
    pub prompt_id: PromptId,
    /// Position within its group.
    pub sample_index: u32,
    pub prompt: String,
    /// As the model wrote it, control characters and all.
    pub completion: String,
    /// Scores by reward function; null where there is no verdict.
    #[serde(serialize_with = "scores_by_function")]
    pub rewards: Vec<Reward>,
    pub advantage: f32,
    /// Whether the answer is right, whatever the reward adds for format or length.
    pub correct: bool,
    pub finish_reason: FinishReason,
    pub num_tokens: usize,
    /// Version of the policy that sampled the last token.
    pub policy_version: PolicyVersion,
}

impl CompletionRecord {
    #[must_use]
    pub fn new(prompt: &Prompt, completion: &Completion, advantage: f32, correct: bool) -> Self {
        Self {
            prompt_id: completion.prompt_id,
            sample_index: completion.sample_index,
            prompt: prompt.text.clone(),
            completion: completion.text.clone(),
            rewards: completion.rewards.clone(),
            advantage,
            correct,
            finish_reason: completion.finish_reason,
            num_tokens: completion.token_ids.len(),
            policy_version: completion.spans.last().map_or(PolicyVersion(0), |span| span.version),
        }
    }

    /// `format 1, equation 0`, for people.
    pub(super) fn scores(&self) -> String {
        let score = |reward: &Reward| {
            let Reward { function, score, outcome } = reward;
            if reward.is_verdict() { format!("{function} {score}") } else { format!("{function} {outcome}") }
        };
        self.rewards.iter().map(score).collect::<Vec<_>>().join(", ")
    }
}

/// The files of one run. A step's file is whole or absent. The sample files only grow: the steps that a resumed run
/// repeats may stand in them twice.
#[derive(Debug)]
pub(super) struct CompletionFiles {
    dir: PathBuf,
    seed: u64,
    prefix: String,
    samples: SampleFile,
    successes: SampleFile,
    reflections: SampleFile,
}

impl CompletionFiles {
    /// Removes the files of steps after `resume_from`, all of them for a new run.
    pub(super) fn open(run_dir: &Path, options: &LoggerOptions) -> Result<Self, LoggerError> {
        let dir = run_dir.join("completions");
        let samples_dir = run_dir.join("completion_samples");
        for dir in [&dir, &samples_dir] {
            fs::create_dir_all(dir).at(dir, "create")?;
        }
        for entry in fs::read_dir(&dir).at(&dir, "list")? {
            let path = entry.at(&dir, "list")?.path();
            if step_of(&path).is_some_and(|step| Some(step) > options.resume_from) {
                fs::remove_file(&path).at(&path, "remove")?;
            }
        }
        let open = |name: &str| SampleFile::open(samples_dir.join(name), options.resume_from.is_some());
        Ok(Self {
            dir,
            seed: options.seed,
            prefix: options.sample_prefix.clone(),
            samples: open("completion_samples.txt")?,
            successes: open("success_completion_samples.txt")?,
            reflections: open("reflection_samples.txt")?,
        })
    }

    pub(super) fn write(&mut self, step: u64, records: &[CompletionRecord]) -> Result<(), LoggerError> {
        let path = self.dir.join(format!("step_{step:06}.jsonl"));
        let mut lines = Vec::new();
        let (mut samples, mut successes) = (String::new(), String::new());
        for record in records {
            serde_json::to_writer(&mut lines, &Line { step, record }).map_err(Into::into).at(&path, "encode")?;
            lines.push(b'\n');
            if is_sampled(self.seed, step, record, SAMPLES) {
                samples += &self.sample(record);
            }
            if record.correct && is_sampled(self.seed, step, record, SUCCESSES) {
                successes += &self.sample(record);
            }
        }
        replace(&path, &lines)?;
        self.samples.append(&samples)?;
        self.successes.append(&successes)?;
        let reflections: String =
            reflecting(self.seed, step, records).iter().map(|record| self.sample(record)).collect();
        self.reflections.append(&reflections)
    }

    fn sample(&self, record: &CompletionRecord) -> String {
        format!("\n\n==============\n{}{}", self.prefix, record.completion)
    }
}

/// The records as Markdown, each text as a block that shows what it holds instead of interpreting it.
pub(super) fn markdown(records: &[&CompletionRecord]) -> String {
    let mut text = String::new();
    for record in records {
        let (id, index) = (record.prompt_id, record.sample_index);
        text += &format!("**{id}, sample {index}**: {}, advantage {:.3}\n\n", record.scores(), record.advantage);
        for part in [&record.prompt, &record.completion] {
            for line in part.lines() {
                text += &format!("    {line}\n");
            }
            text += "\n---\n\n";
        }
    }
    text
}

/// Share of the completions, and of the right ones, in their sample files.
const SAMPLED: f64 = 0.1;
/// Most completions of a step among those that reflect: none is lost while they are rare.
const REFLECTING: usize = 4;
/// Which of the choices a hash is for.
const SAMPLES: u64 = 0;
const SUCCESSES: u64 = 1;
const REFLECTIONS: u64 = 2;

fn is_sampled(seed: u64, step: u64, record: &CompletionRecord, file: u64) -> bool {
    (hash(seed, step, record, file) as f64) < SAMPLED * 2_f64.powi(64)
}

/// Completions that reflect, those first that correct themselves.
fn reflecting(seed: u64, step: u64, records: &[CompletionRecord]) -> Vec<&CompletionRecord> {
    let found = records.iter().map(|record| (Reflection::of(&record.completion), record));
    let mut found: Vec<_> = found.filter(|(found, _)| found.num_reflections > 0).collect();
    found.sort_by_key(|(found, record)| (found.num_self_corrections == 0, hash(seed, step, record, REFLECTIONS)));
    found.into_iter().take(REFLECTING).map(|(_, record)| record).collect()
}

fn hash(seed: u64, step: u64, record: &CompletionRecord, file: u64) -> u64 {
    derive_seed(seed, &[step, record.prompt_id.0, u64::from(record.sample_index), file])
}

#[derive(Serialize)]
struct Line<'a> {
    step: u64,
    #[serde(flatten)]
    record: &'a CompletionRecord,
}

#[derive(Debug)]
struct SampleFile {
    path: PathBuf,
    file: File,
}

impl SampleFile {
    fn open(path: PathBuf, keep: bool) -> Result<Self, LoggerError> {
        if !keep {
            fs::write(&path, "").at(&path, "write")?;
        }
        let file = File::options().create(true).append(true).open(&path).at(&path, "open")?;
        Ok(Self { path, file })
    }

    fn append(&mut self, text: &str) -> Result<(), LoggerError> {
        self.file.write_all(text.as_bytes()).at(&self.path, "append to")
    }
}

/// The step of `step_000010.jsonl`.
fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step_")?.strip_suffix(".jsonl")?.parse().ok()
}

fn scores_by_function<S: Serializer>(rewards: &[Reward], serializer: S) -> Result<S::Ok, S::Error> {
    let score = |reward: &Reward| reward.is_verdict().then_some(reward.score);
    serializer.collect_map(rewards.iter().map(|reward| (&reward.function, score(reward))))
}

#[cfg(test)]
impl CompletionRecord {
    pub(super) fn example(completion: &str, correct: bool) -> Self {
        let score = f32::from(u8::from(correct));
        Self {
            prompt_id: PromptId(7),
            sample_index: 2,
            prompt: "Using the numbers [2, 3], create an equation that equals 5.".to_owned(),
            completion: completion.to_owned(),
            rewards: vec![Reward { function: "equation".to_owned(), score, outcome: "score".to_owned() }],
            advantage: 0.5,
            correct,
            finish_reason: FinishReason::Stop,
            num_tokens: 12,
            policy_version: PolicyVersion(9),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(resume_from: Option<u64>) -> LoggerOptions {
        LoggerOptions {
            tensorboard: false,
            logging_steps: 1,
            log_completions: 0,
            resume_from,
            seed: 42,
            max_steps: 100,
            sample_prefix: "<think>".to_owned(),
        }
    }

    fn records(count: u32) -> Vec<CompletionRecord> {
        let record = |index: u32| CompletionRecord {
            sample_index: index,
            ..CompletionRecord::example(&format!("completion {index}"), index.is_multiple_of(2))
        };
        (0..count).map(record).collect()
    }

    #[test]
    fn a_step_file_holds_every_completion() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = CompletionFiles::open(dir.path(), &options(None)).unwrap();
        files.write(10, &[CompletionRecord::example("2 \u{1b}[31m+ 3", true)]).unwrap();
        let line = fs::read_to_string(dir.path().join("completions/step_000010.jsonl")).unwrap();
        let expect = concat!(
            r#"{"step":10,"prompt_id":7,"sample_index":2,"#,
            r#""prompt":"Using the numbers [2, 3], create an equation that equals 5.","completion":"2 \u001b[31m+ 3","#,
            r#""rewards":{"equation":1.0},"advantage":0.5,"correct":true,"finish_reason":"stop","#,
            r#""num_tokens":12,"policy_version":9}"#,
            "\n"
        );
        assert_eq!(line, expect);
    }

    #[test]
    fn a_tenth_is_sampled_and_successes_are_right() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = CompletionFiles::open(dir.path(), &options(None)).unwrap();
        files.write(1, &records(10_000)).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join("completion_samples").join(name)).unwrap();
        let separator = "\n\n==============\n<think>completion ";
        let samples = read("completion_samples.txt");
        let successes = read("success_completion_samples.txt");
        // Binomial: mean 1000 and 500, standard deviation 30 and 21.
        assert!((880..1120).contains(&samples.matches(separator).count()));
        assert!((415..585).contains(&successes.matches(separator).count()));
        let indices: Vec<u32> = successes.split(separator).skip(1).map(|index| index.parse().unwrap()).collect();
        assert!(indices.iter().all(|index| index.is_multiple_of(2)));
        let both = indices.iter().filter(|index| samples.contains(&format!("{separator}{index}\n"))).count();
        assert!((15..90).contains(&both), "the two choices are independent, {both} in both");
    }

    #[test]
    fn completions_that_reflect_are_kept_and_corrections_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = CompletionFiles::open(dir.path(), &options(None)).unwrap();
        let record = |(index, text): (u32, &str)| CompletionRecord {
            sample_index: index,
            ..CompletionRecord::example(text, false)
        };
        let texts = ["hmm 0", "= 1", "= 1 wait = 2", "hmm 3", "hmm 4", "hmm 5", "= 6 aha = 7"];
        let records: Vec<_> = (0..).zip(texts).map(record).collect();
        files.write(1, &records).unwrap();
        files.write(2, &records[1..3]).unwrap();
        let text = fs::read_to_string(dir.path().join("completion_samples/reflection_samples.txt")).unwrap();
        let kept: Vec<_> = text.split("\n\n==============\n<think>").skip(1).collect();
        assert_eq!(kept.len(), 5, "{text}");
        assert!(kept[..2].contains(&"= 1 wait = 2") && kept[..2].contains(&"= 6 aha = 7"), "{text}");
        assert!(kept[2..4].iter().all(|kept| kept.starts_with("hmm ")), "{text}");
        assert_eq!(kept[4], "= 1 wait = 2");
    }

    #[test]
    fn the_choice_depends_on_seed_step_and_sample_only() {
        let records = records(1000);
        let chosen = |seed, step| -> Vec<u32> {
            let chosen = records.iter().rev().filter(|record| is_sampled(seed, step, record, SAMPLES));
            chosen.map(|record| record.sample_index).collect()
        };
        assert_eq!(chosen(1, 1), chosen(1, 1));
        assert_ne!(chosen(1, 1), chosen(2, 1));
        assert_ne!(chosen(1, 1), chosen(1, 2));
    }

    #[test]
    fn resume_removes_later_steps() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = CompletionFiles::open(dir.path(), &options(None)).unwrap();
        for step in 1..=4 {
            files.write(step, &records(1)).unwrap();
        }
        let steps_left = || fs::read_dir(dir.path().join("completions")).unwrap().count();
        CompletionFiles::open(dir.path(), &options(Some(3))).unwrap();
        assert_eq!(steps_left(), 3);
        CompletionFiles::open(dir.path(), &options(None)).unwrap();
        assert_eq!(steps_left(), 0);
    }

    #[test]
    fn markdown_quotes_the_text() {
        let text = markdown(&[&CompletionRecord::example("# not a title\n| a |", false)]);
        assert!(text.contains("    # not a title\n    | a |\n"), "{text}");
        assert!(text.starts_with("**prompt 7, sample 2**: equation 0, advantage 0.500\n"), "{text}");
    }
}
