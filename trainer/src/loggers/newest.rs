//! The newest step, as Prometheus scrapes it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use aha_proto::metrics::{Exposition, Value};

use super::metrics::{Metrics, names};
use crate::evaluate::{Evaluation, Report};

const PREFIX: &str = "aha_trainer_";

/// Written by the loggers, read by whoever asks: clones are of one.
#[derive(Debug, Clone)]
pub struct Newest(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    max_steps: u64,
    /// Steps that are done.
    step: u64,
    metrics: Metrics,
    /// When the step ended; none before the first of this process.
    at: Option<SystemTime>,
    evaluation: Option<Evaluation>,
    /// Since this process began: tokens trained on, and updates that were left out.
    num_tokens: u64,
    num_skipped: u64,
}

impl Newest {
    /// Of a run that goes on after `step` steps.
    pub(super) fn new(step: u64, max_steps: u64) -> Self {
        let (metrics, at, evaluation) = (Metrics::default(), None, None);
        Self(Arc::new(Mutex::new(State { max_steps, step, metrics, at, evaluation, num_tokens: 0, num_skipped: 0 })))
    }

    pub(super) fn note_step(&self, step: u64, metrics: &Metrics) {
        let count = |name| metrics.get(name).filter(|value| *value > 0.0).map_or(0, |value| value as u64);
        let mut state = self.lock();
        state.num_tokens += count(names::NUM_TOKENS);
        state.num_skipped += count(names::SKIPPED_UPDATES);
        (state.step, state.metrics, state.at) = (step, metrics.clone(), Some(SystemTime::now()));
    }

    pub(super) fn note_evaluation(&self, evaluation: &Evaluation) {
        self.lock().evaluation = Some(evaluation.clone());
    }

    /// The page of metrics of the run called `run`.
    #[must_use]
    pub fn page(&self, run: &str) -> String {
        let state = self.lock();
        let mut page = Exposition::default();
        let labels = [("run", run)];
        let mut push =
            |name: &str, help: &str, value: Value| page.push(&format!("{PREFIX}{name}"), help, &labels, &value);
        push("step", "Steps that are done.", Value::Gauge(state.step as f64));
        push("max_steps", "Steps of the whole run.", Value::Gauge(state.max_steps as f64));
        push(
            "tokens_total",
            "Tokens of prompts and completions trained on by this process.",
            Value::Counter(state.num_tokens),
        );
        push("skipped_updates_total", "Updates left out by this process.", Value::Counter(state.num_skipped));
        if let Some(since) = state.at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()) {
            push("last_step_timestamp_seconds", "When the newest step ended.", Value::Gauge(since.as_secs_f64()));
        }
        if let Some(evaluation) = &state.evaluation {
            let of_suite = |(name, report): (&String, &Report)| (name.clone(), report.accuracy);
            let suites = evaluation.suites.iter().map(of_suite).collect();
            push("accuracy", "Of the newest evaluation on held-out prompts.", Value::Gauge(evaluation.accuracy));
            push("eval_accuracy", "Of the newest evaluation, by suite.", Value::Gauges("suite", suites));
        }
        for (name, value) in of_step(&state.metrics) {
            push(&name, "Of the newest step; metrics.jsonl has all of them.", value);
        }
        page.into_text()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Metrics under names that Prometheus takes: `time/generate` is `time_generate`, and what a reward function has to itself
/// is one metric with the function as label.
fn of_step(metrics: &Metrics) -> Vec<(String, Value)> {
    let mut named: Vec<(String, Value)> = Vec::new();
    for (name, value) in metrics.iter() {
        let of_function = name.strip_prefix("rewards/").and_then(|rest| rest.rsplit_once('/'));
        let Some((function, statistic)) = of_function else {
            named.push((valid(name), Value::Gauge(value)));
            continue;
        };
        let name = valid(&format!("rewards_{statistic}"));
        let sample = (function.to_owned(), value);
        match named.iter_mut().find(|(known, _)| *known == name) {
            Some((_, Value::Gauges(_, samples))) => samples.push(sample),
            _ => named.push((name, Value::Gauges("function", vec![sample]))),
        }
    }
    named
}

fn valid(name: &str) -> String {
    name.chars().map(|character| if character.is_ascii_alphanumeric() { character } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_step_is_shown_and_what_adds_up_is_added() {
        let newest = Newest::new(3, 100);
        assert!(newest.page("r").starts_with(
            "# HELP aha_trainer_step Steps that are done.\n# TYPE aha_trainer_step gauge\naha_trainer_step{run=\"r\"} 3\n"
        ));
        for (step, loss) in [(4, 0.5), (5, f64::NAN)] {
            let metrics =
                [("loss", loss), ("num_tokens", 70.0), ("rewards/a b/mean", 0.25), ("rewards/format/mean", 1.0)];
            let mut metrics = Metrics::from_iter(metrics);
            metrics.extend([("rewards/format/std", 0.0), ("time/generate", 1.5), ("skipped_updates", 1.0)]);
            newest.note_step(step, &metrics);
        }
        newest.note_evaluation(&Evaluation::example(0.75));
        let page = newest.page("a \"run\"");
        for line in [
            "step{run=\"a \\\"run\\\"\"} 5",
            "max_steps{run=\"a \\\"run\\\"\"} 100",
            "tokens_total{run=\"a \\\"run\\\"\"} 140",
            "skipped_updates_total{run=\"a \\\"run\\\"\"} 2",
            "accuracy{run=\"a \\\"run\\\"\"} 0.75",
            "eval_accuracy{run=\"a \\\"run\\\"\",suite=\"held_out\"} 0.75",
            "loss{run=\"a \\\"run\\\"\"} NaN",
            "rewards_mean{run=\"a \\\"run\\\"\",function=\"a b\"} 0.25",
            "rewards_mean{run=\"a \\\"run\\\"\",function=\"format\"} 1",
            "rewards_std{run=\"a \\\"run\\\"\",function=\"format\"} 0",
            "time_generate{run=\"a \\\"run\\\"\"} 1.5",
        ] {
            assert!(page.contains(&format!("\n{PREFIX}{line}\n")), "no {line} in:\n{page}");
        }
        assert_eq!(page.matches("# TYPE aha_trainer_rewards_mean gauge\n").count(), 1, "{page}");
    }
}
