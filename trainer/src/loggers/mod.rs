//! What a run tells the world: `metrics.jsonl`, TensorBoard files, completion samples and the terminal.
//!
//! Only rank 0 has loggers. A record that cannot be written is an error that names the file, never a lost line.

mod completions;
mod console;
mod error;
mod jsonl;
mod metrics;
mod newest;
mod printable;
mod tensorboard;

use std::fs;
use std::path::Path;

pub use completions::CompletionRecord;
pub use error::LoggerError;
pub use metrics::{Metrics, names};
pub use newest::Newest;
pub use printable::printable;

use crate::evaluate::Evaluation;
use completions::CompletionFiles;
use console::Console;
use error::IoContext;
use jsonl::MetricsFile;
use tensorboard::EventFile;

/// What is logged and how often.
#[derive(Debug, Clone)]
pub struct LoggerOptions {
    /// Write TensorBoard event files.
    pub tensorboard: bool,
    /// The terminal gets a line every so many steps; files get every step. 0 counts as 1.
    pub logging_steps: u64,
    /// How many completions to print now and then; 0 prints none.
    pub log_completions: usize,
    /// The last step of the checkpoint that the run goes on from: later records are of a past that did not happen.
    pub resume_from: Option<u64>,
    /// The run's seed: chooses the completion samples.
    pub seed: u64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// The last tag of the assistant's prefilled text, `<think>` in the R1 recipes: completion samples start with it.
    pub sample_prefix: String,
}

/// All outputs of one run.
#[derive(Debug)]
pub struct Loggers {
    metrics: MetricsFile,
    tensorboard: Option<EventFile>,
    completions: CompletionFiles,
    console: Console,
    newest: Newest,
}

impl Loggers {
    /// Opens the outputs in `run_dir`, which exists. On resume, records after `resume_from` are removed first.
    pub fn create(run_dir: &Path, options: &LoggerOptions) -> Result<Self, LoggerError> {
        let tensorboard = if options.tensorboard {
            let dir = run_dir.join("tensorboard");
            fs::create_dir_all(&dir).at(&dir, "create")?;
            Some(EventFile::create(&dir, options.resume_from)?)
        } else {
            None
        };
        Ok(Self {
            metrics: MetricsFile::open(&run_dir.join("metrics.jsonl"), options.resume_from)?,
            tensorboard,
            completions: CompletionFiles::open(run_dir, options)?,
            console: Console::new(options),
            newest: Newest::new(options.resume_from.unwrap_or(0), options.max_steps),
        })
    }

    /// Records the metrics of one step. Steps count from 1.
    pub fn log_step(&mut self, step: u64, metrics: &Metrics) -> Result<(), LoggerError> {
        self.newest.note_step(step, metrics);
        self.metrics.append(step, metrics)?;
        if let Some(tensorboard) = &mut self.tensorboard {
            tensorboard.scalars(step, metrics)?;
        }
        self.console.step(step, metrics)
    }

    /// Records every completion of one step; now and then a few of them are printed.
    pub fn log_completions(&mut self, step: u64, records: &[CompletionRecord]) -> Result<(), LoggerError> {
        self.completions.write(step, records)?;
        let shown = self.console.choose(step, records);
        if let Some(tensorboard) = &mut self.tensorboard
            && !shown.is_empty()
        {
            tensorboard.text(step, "completions", &completions::markdown(&shown))?;
        }
        self.console.completions(step, &shown)
    }

    /// Shows an evaluation on the terminal and in TensorBoard; the run's `evaluations.jsonl` is the evaluation's own.
    pub fn log_evaluation(&mut self, evaluation: &Evaluation) -> Result<(), LoggerError> {
        self.newest.note_evaluation(evaluation);
        if let Some(tensorboard) = &mut self.tensorboard {
            let mut metrics = Metrics::from_iter([("eval_accuracy", evaluation.accuracy)]);
            metrics.extend(evaluation.metrics());
            tensorboard.scalars(evaluation.step, &metrics)?;
        }
        self.console.evaluation(evaluation)
    }

    /// Shows the loss on held-out examples, as [`Self::log_evaluation`] does an accuracy.
    pub fn log_eval_loss(&mut self, step: u64, loss: f64, num_examples: usize) -> Result<(), LoggerError> {
        if let Some(tensorboard) = &mut self.tensorboard {
            tensorboard.scalars(step, &Metrics::from_iter([("eval_loss", loss)]))?;
        }
        self.console.eval_loss(step, loss, num_examples)
    }

    /// What this logs from now on, for others to look at.
    #[must_use]
    pub fn newest(&self) -> Newest {
        self.newest.clone()
    }

    /// The metrics of the steps so far are on disk when this returns: no checkpoint is ahead of them.
    pub fn sync(&self) -> Result<(), LoggerError> {
        self.metrics.sync()
    }

    /// Everything is on disk when this returns.
    pub fn finish(self) -> Result<(), LoggerError> {
        self.console.finish();
        self.metrics.sync()?;
        self.tensorboard.map_or(Ok(()), EventFile::sync)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(resume_from: Option<u64>) -> LoggerOptions {
        LoggerOptions {
            tensorboard: true,
            logging_steps: 2,
            log_completions: 0,
            resume_from,
            seed: 1,
            max_steps: 4,
            sample_prefix: "<think>".to_owned(),
        }
    }

    #[test]
    fn a_resumed_run_holds_every_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let record = CompletionRecord::example("2+3 </think>\n<answer>5</answer>", true);
        for (resume_from, steps) in [(None, 1..=3), (Some(2), 3..=4)] {
            let mut loggers = Loggers::create(dir.path(), &options(resume_from)).unwrap();
            for step in steps {
                loggers.log_completions(step, std::slice::from_ref(&record)).unwrap();
                loggers.log_step(step, &Metrics::from_iter([(names::REWARD, step as f64)])).unwrap();
            }
            loggers.finish().unwrap();
        }
        let lines = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        let expect: String = (1..=4).map(|step| format!("{{\"step\":{step},\"reward\":{step}.0}}\n")).collect();
        assert_eq!(lines, expect);
        assert_eq!(fs::read_dir(dir.path().join("completions")).unwrap().count(), 4);
        assert_eq!(fs::read_dir(dir.path().join("tensorboard")).unwrap().count(), 2);
    }
}
