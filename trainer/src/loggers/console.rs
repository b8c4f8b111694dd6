//! What a person watches: a line a step on standard output, a progress bar, now and then a few completions.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use aha_core::config::HELD_OUT;
use indicatif::{ProgressBar, ProgressStyle};
use owo_colors::{OwoColorize, Stream, Style};

use super::LoggerOptions;
use super::completions::CompletionRecord;
use super::error::{IoContext, LoggerError};
use super::metrics::{Metrics, names};
use super::printable::printable;
use crate::evaluate::{Evaluation, Report};

/// Completions are shown on every so many logged steps, beside the first and the last.
const SHOW_EVERY: u64 = 10;
/// Most characters of a prompt and of a completion on the terminal.
const PROMPT_CHARS: usize = 400;
const COMPLETION_CHARS: usize = 2000;
const END_OF_THOUGHT: &str = "</think>";

/// Writes lines to standard output, so that they can be piped; the bar goes to standard error, if that is a terminal.
#[derive(Debug)]
pub(super) struct Console {
    options: LoggerOptions,
    palette: Palette,
    bar: ProgressBar,
    /// The reader of a pipe went away, as `| head` does: the run goes on without it.
    closed: bool,
}

impl Console {
    pub(super) fn new(options: &LoggerOptions) -> Self {
        let bar = ProgressBar::new(options.max_steps).with_position(options.resume_from.unwrap_or(0));
        if let Ok(style) = ProgressStyle::with_template("{bar:32.cyan/dim} {pos}/{len} steps, {elapsed}, {eta} left") {
            bar.set_style(style);
        }
        bar.reset_eta();
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_secs(1));
        }
        Self { options: options.clone(), palette: Palette::of_stdout(), bar, closed: false }
    }

    pub(super) fn step(&mut self, step: u64, metrics: &Metrics) -> Result<(), LoggerError> {
        self.bar.set_position(step);
        if self.is_due(step, 1) {
            self.print(&self.palette.step_line(step, self.options.max_steps, metrics))
        } else {
            Ok(())
        }
    }

    /// The completions to show after `step`: right and wrong ones in turn, as far as there are both.
    pub(super) fn choose<'a>(&self, step: u64, records: &'a [CompletionRecord]) -> Vec<&'a CompletionRecord> {
        if !self.is_due(step, SHOW_EVERY) {
            return Vec::new();
        }
        let (right, wrong): (Vec<_>, Vec<_>) = records.iter().partition(|record| record.correct);
        let turns = right.len().max(wrong.len());
        let in_turn = (0..turns).flat_map(|turn| [right.get(turn), wrong.get(turn)]).flatten();
        in_turn.copied().take(self.options.log_completions).collect()
    }

    pub(super) fn completions(&mut self, step: u64, records: &[&CompletionRecord]) -> Result<(), LoggerError> {
        let prefix = &self.options.sample_prefix;
        let text: String = records.iter().map(|record| self.palette.completion(step, prefix, record)).collect();
        self.print(&text)
    }

    pub(super) fn evaluation(&mut self, evaluation: &Evaluation) -> Result<(), LoggerError> {
        let step = evaluation.step;
        let line = |(name, report): (&String, &Report)| {
            let name = if name == HELD_OUT { "held-out" } else { name };
            let (accuracy, prompts) = (100.0 * report.accuracy, report.prompts);
            format!("{name} accuracy after {step} steps: {accuracy:.1} % of {prompts} prompts\n")
        };
        self.print(&evaluation.suites.iter().map(line).collect::<String>())
    }

    pub(super) fn eval_loss(&mut self, step: u64, loss: f64, num_examples: usize) -> Result<(), LoggerError> {
        self.print(&format!("held-out loss after {step} steps: {loss:.4} on {num_examples} examples\n"))
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn is_due(&self, step: u64, every: u64) -> bool {
        let period = self.options.logging_steps.max(1) * every;
        step == 1 || step == self.options.max_steps || step.is_multiple_of(period)
    }

    fn print(&mut self, text: &str) -> Result<(), LoggerError> {
        if self.closed {
            return Ok(());
        }
        let written = self.bar.suspend(|| {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
        });
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            written => written.at(Path::new("standard output"), "write to"),
        }
    }
}

/// Text for a terminal, with colours or without.
#[derive(Debug, Clone, Copy)]
struct Palette {
    colours: bool,
}

impl Palette {
    fn of_stdout() -> Self {
        let probe = "".if_supports_color(Stream::Stdout, |text| text.bold()).to_string();
        Self { colours: !probe.is_empty() }
    }

    fn paint(self, text: &str, style: Style) -> String {
        if self.colours && !text.is_empty() { text.style(style).to_string() } else { text.to_owned() }
    }

    /// `step 12/450  reward 0.312 ±0.240  equation 0.210 ...`; what the step did not measure is left out.
    fn step_line(self, step: u64, max_steps: u64, metrics: &Metrics) -> String {
        let width = max_steps.to_string().len();
        let mut parts = vec![self.paint(&format!("step {step:>width$}/{max_steps}"), Style::new().bold())];
        parts.extend(reward_parts(metrics));
        let plain = [
            (names::KL, "kl"),
            (names::GRAD_NORM, "grad"),
            (names::LEARNING_RATE, "lr"),
            (names::LOGP_DIFFERENCE_MAX, "logp diff"),
        ];
        for (name, label) in plain {
            parts.extend(metrics.get(name).map(|value| format!("{label} {}", short(value))));
        }
        if let Some(num_skipped) = metrics.get(names::SKIPPED_UPDATES).filter(|&count| count > 0.0) {
            let text = format!("{num_skipped:.0} UPDATE(S) SKIPPED: gradients not finite");
            parts.push(self.paint(&text, Style::new().red().bold()));
        }
        parts.extend(time_part(metrics).map(|part| self.paint(&part, Style::new().dimmed())));
        parts.extend(metrics.get(names::TOKENS_PER_SECOND).map(|rate| format!("{rate:.0} tok/s")));
        parts.join("  ") + "\n"
    }

    /// The prompt in one line, the thought dim, the answer green or red.
    fn completion(self, step: u64, prefix: &str, record: &CompletionRecord) -> String {
        let CompletionRecord { prompt_id, sample_index, advantage, num_tokens, .. } = record;
        let head = format!(
            "-- step {step}, {prompt_id}, sample {sample_index}: {}, advantage {advantage:+.2}, {num_tokens} tokens",
            record.scores()
        );
        let one_line = printable(&record.prompt).split_whitespace().collect::<Vec<_>>().join(" ");
        let completion = shorten(&printable(&format!("{prefix}{}", record.completion)), COMPLETION_CHARS);
        let split = completion.find(END_OF_THOUGHT).map_or(0, |at| at + END_OF_THOUGHT.len());
        let (thought, answer) = completion.split_at(split);
        let verdict = if record.correct { Style::new().green() } else { Style::new().red() };
        format!(
            "{}\n{}\n{}{}\n",
            self.paint(&head, Style::new().bold()),
            self.paint(&shorten(&one_line, PROMPT_CHARS), Style::new().cyan()),
            self.paint(thought, Style::new().dimmed()),
            self.paint(answer.trim_end(), verdict)
        )
    }
}

/// Reward and its parts; for supervised training, the loss.
fn reward_parts(metrics: &Metrics) -> Vec<String> {
    let mut parts = Vec::new();
    if let Some(reward) = metrics.get(names::REWARD) {
        let spread = metrics.get(names::REWARD_STD).map(|std| format!(" ±{std:.3}")).unwrap_or_default();
        parts.push(format!("reward {reward:.3}{spread}"));
    } else {
        parts.extend(metrics.get(names::LOSS).map(|loss| format!("loss {}", short(loss))));
    }
    for (name, mean) in metrics.iter() {
        let function = name.strip_prefix("rewards/").and_then(|name| name.strip_suffix("/mean"));
        parts.extend(function.map(|function| format!("{function} {mean:.3}")));
    }
    if let Some(length) = metrics.get(names::MEAN_LENGTH) {
        let cut = metrics.get(names::CLIPPED_RATIO).filter(|&ratio| ratio > 0.0);
        let cut = cut.map(|ratio| format!(" ({:.0}% cut)", ratio * 100.0)).unwrap_or_default();
        parts.push(format!("length {length:.0}{cut}"));
    }
    parts
}

/// `3.4s (generate 2.1, train 1.1, push 0.2)`
fn time_part(metrics: &Metrics) -> Option<String> {
    let whole = format!("{:.1}s", metrics.get(names::STEP_TIME)?);
    let phases = [(names::TIME_GENERATE, "generate"), (names::TIME_TRAIN, "train"), (names::TIME_PUSH, "push")];
    let phases: Vec<_> = phases
        .into_iter()
        .filter_map(|(name, label)| metrics.get(name).map(|seconds| format!("{label} {seconds:.1}")))
        .collect();
    Some(if phases.is_empty() { whole } else { format!("{whole} ({})", phases.join(", ")) })
}

/// Three digits after the point, or a power of ten where that would hide the value.
fn short(value: f64) -> String {
    let size = value.abs();
    if size != 0.0 && !(1e-3..1e5).contains(&size) { format!("{value:.1e}") } else { format!("{value:.3}") }
}

/// At most about `limit` characters: most of the beginning, and the end.
fn shorten(text: &str, limit: usize) -> String {
    let count = text.chars().count();
    if count <= limit {
        return text.to_owned();
    }
    let tail = limit / 4;
    let head: String = text.chars().take(limit - tail).collect();
    let end: String = text.chars().skip(count - tail).collect();
    format!("{head} [...] {end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Palette = Palette { colours: false };
    const COLOURED: Palette = Palette { colours: true };

    fn console(logging_steps: u64, log_completions: usize) -> Console {
        Console::new(&LoggerOptions {
            tensorboard: false,
            logging_steps,
            log_completions,
            resume_from: None,
            seed: 1,
            max_steps: 99,
            sample_prefix: String::new(),
        })
    }

    #[test]
    fn a_step_reads_as_one_line() {
        let metrics = Metrics::from_iter([
            (names::LOSS, 0.1),
            (names::REWARD, 0.3125),
            (names::REWARD_STD, 0.24),
            ("rewards/equation/mean", 0.21),
            ("rewards/equation/std", 0.4),
            ("rewards/format/mean", 0.98),
            (names::MEAN_LENGTH, 211.6),
            (names::CLIPPED_RATIO, 0.03),
            (names::KL, 0.0012),
            (names::GRAD_NORM, f64::NAN),
            (names::LEARNING_RATE, 4.9e-7),
            (names::LOGP_DIFFERENCE_MAX, 2.1e-5),
            (names::STEP_TIME, 3.42),
            (names::TIME_GENERATE, 2.1),
            (names::TIME_TRAIN, 1.1),
            (names::TIME_PUSH, 0.2),
            (names::TOKENS_PER_SECOND, 812.4),
        ]);
        let expect = "step  12/450  reward 0.312 ±0.240  equation 0.210  format 0.980  length 212 (3% cut)  kl 0.001  \
                      grad NaN  lr 4.9e-7  logp diff 2.1e-5  3.4s (generate 2.1, train 1.1, push 0.2)  812 tok/s\n";
        assert_eq!(PLAIN.step_line(12, 450, &metrics), expect);
    }

    #[test]
    fn supervised_steps_show_their_loss() {
        let metrics = Metrics::from_iter([(names::LOSS, 2.5), (names::STEP_TIME, 0.5)]);
        assert_eq!(PLAIN.step_line(1, 9, &metrics), "step 1/9  loss 2.500  0.5s\n");
    }

    #[test]
    fn the_answer_is_green_or_red_and_the_thought_dim() {
        let text = "2 + 3 </think>\n<answer>2 + 3</answer>";
        let right = COLOURED.completion(5, "<think>", &CompletionRecord::example(text, true));
        assert!(right.contains("\u{1b}[2m<think>2 + 3 </think>\u{1b}[0m"), "{right:?}");
        assert!(right.contains("\u{1b}[32m\n<answer>2 + 3</answer>\u{1b}[0m"), "{right:?}");
        let wrong = COLOURED.completion(5, "<think>", &CompletionRecord::example(text, false));
        assert!(wrong.contains("\u{1b}[31m\n<answer>"), "{wrong:?}");
    }

    #[test]
    fn without_colours_there_are_no_escapes_even_from_the_model() {
        let shown = PLAIN.completion(5, "", &CompletionRecord::example("a\u{1b}[2Jb\u{7}", false));
        let expect = "-- step 5, prompt 7, sample 2: equation 0, advantage +0.50, 12 tokens\n\
                      Using the numbers [2, 3], create an equation that equals 5.\nab\n";
        assert_eq!(shown, expect);
    }

    #[test]
    fn right_and_wrong_take_turns() {
        let records: Vec<_> =
            [false, false, true, false].iter().map(|&correct| CompletionRecord::example("x", correct)).collect();
        let verdicts = |count, step| -> Vec<bool> {
            console(2, count).choose(step, &records).iter().map(|record| record.correct).collect()
        };
        assert_eq!(verdicts(3, 1), [true, false, false]);
        assert_eq!(verdicts(9, 20), [true, false, false, false]);
        assert_eq!(verdicts(3, 2), [false; 0]);
        assert_eq!(verdicts(0, 1), [false; 0]);
    }

    #[test]
    fn lines_come_on_logging_steps_and_on_the_first_and_last() {
        let console = console(4, 0);
        let due: Vec<_> = (1..=99).filter(|&step| console.is_due(step, 1)).collect();
        assert_eq!(due[..4], [1, 4, 8, 12]);
        assert_eq!(due.last(), Some(&99));
    }

    #[test]
    fn long_texts_keep_both_ends() {
        assert_eq!(shorten("né", 2), "né");
        assert_eq!(shorten("abcdefgh", 4), "abc [...] h");
    }
}
