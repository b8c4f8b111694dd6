//! Curves as a table and as comma-separated values.

use std::fmt::Write;

use anyhow::Context;
use serde_json::Value;

use super::plot::Line;

/// Steps that the last column of the table is the mean of.
const LAST_STEPS: usize = 20;
/// Steps that a point of the plot, and a quarter's column, is the mean of.
const WINDOW: usize = 10;

/// The rewards of one run.
#[derive(Debug, Clone)]
pub(super) struct Curve {
    /// `aha` or `TRL`.
    pub(super) system: &'static str,
    pub(super) variant: String,
    pub(super) seed: u64,
    /// Mean of every step.
    pub(super) rewards: Vec<f64>,
    /// Share of held-out prompts that the trained model answers right.
    pub(super) held_out: f64,
    pub(super) seconds: f64,
}

pub(super) struct Report {
    pub(super) own: Vec<Curve>,
    pub(super) theirs: Vec<Curve>,
    pub(super) completions_per_step: usize,
    pub(super) hardware: String,
}

impl Curve {
    /// `rows` are steps in their order, each with its mean `reward`.
    pub(super) fn new(
        (system, variant, seed): (&'static str, &str, u64),
        rows: &[Value],
        held_out: &Value,
        seconds: &Value,
    ) -> anyhow::Result<Self> {
        let name = || format!("{system} {variant}, seed {seed}");
        let rewards: Option<Vec<f64>> = rows.iter().map(|row| row["reward"].as_f64()).collect();
        Ok(Self {
            system,
            variant: variant.to_owned(),
            seed,
            rewards: rewards.filter(|all| all.len() >= LAST_STEPS).with_context(|| {
                format!("{}: {LAST_STEPS} steps and a reward for each are needed, and not there", name())
            })?,
            held_out: held_out.as_f64().with_context(|| format!("{}: no held-out accuracy", name()))?,
            seconds: seconds.as_f64().with_context(|| format!("{}: no seconds", name()))?,
        })
    }

    /// Mean of the steps up to the `end`th, as many as there are of the last `len`.
    fn mean_before(&self, end: usize, len: usize) -> f64 {
        let end = end.min(self.rewards.len());
        mean(&self.rewards[end.saturating_sub(len)..end])
    }

    fn last(&self) -> f64 {
        self.mean_before(self.rewards.len(), LAST_STEPS)
    }
}

impl Report {
    pub(super) fn title(&self) -> String {
        let seeds = self.of("aha", &self.own[0].variant).len();
        format!("Reward on Countdown, mean of {WINDOW} steps; aha: {seeds} seeds")
    }

    fn all(&self) -> impl Iterator<Item = &Curve> {
        self.own.iter().chain(&self.theirs)
    }

    /// The seeds of one variant.
    fn of(&self, system: &str, variant: &str) -> Vec<&Curve> {
        self.all().filter(|curve| curve.system == system && curve.variant == variant).collect()
    }

    /// System and variant in the order of the curves, each once.
    fn variants(&self) -> Vec<(&'static str, &str)> {
        let mut variants = Vec::new();
        for curve in self.all() {
            let key = (curve.system, curve.variant.as_str());
            if !variants.contains(&key) {
                variants.push(key);
            }
        }
        variants
    }

    /// A line a variant: means over seeds and the last steps.
    pub(super) fn lines(&self) -> Vec<Line> {
        let line = |(system, variant): (&'static str, &str)| {
            let curves = self.of(system, variant);
            let len = curves.iter().map(|curve| curve.rewards.len()).min().unwrap_or(0);
            let at =
                |step: usize| mean(&curves.iter().map(|curve| curve.mean_before(step, WINDOW)).collect::<Vec<_>>());
            let points = (WINDOW..=len).map(|step| ((step * self.completions_per_step) as f64, at(step))).collect();
            Line { name: format!("{system} {variant}"), points, is_dashed: system == "TRL" }
        };
        self.variants().into_iter().map(line).collect()
    }

    pub(super) fn markdown(&self, date: &str) -> anyhow::Result<String> {
        let num_steps = self.own[0].rewards.len();
        let quarters: Vec<usize> = (1..=4).map(|quarter| num_steps * quarter / 4).collect();
        let mut text = format!(
            "# Countdown: reward beside TRL\n\n{date}, {}. `cargo xtask bench curves` made this file, \
             [the curves](./{date}-countdown-curves.csv) and [the plot](./{date}-countdown-curves.svg).\n\n\
             The demo's recipe (`configs/countdown-tiny.yaml`) from one model folder, {num_steps} steps of {} completions. \
             TRL's `GRPOTrainer` gets the prompts of aha's dapo run of the same seed, in their order, its settings, and \
             rewards from `aha reward`; the accuracy of its model is measured by aha. Both sample for themselves. \
             zero_3 is dapo with sharded weights. Seconds are of a machine that others used as well, and no measure of speed.\n\n\
             Columns are means of the {WINDOW} steps up to so many completions, and of the last {LAST_STEPS} steps.\n\n",
            self.hardware, self.completions_per_step
        );
        let completions = |step: &usize| (step * self.completions_per_step).to_string();
        let heads: Vec<String> = std::iter::once(&WINDOW).chain(&quarters).map(completions).collect();
        writeln!(text, "| run | seed | {} | last {LAST_STEPS} | held-out | seconds |", heads.join(" | "))?;
        writeln!(text, "|---|---|{}---|---|---|", "---|".repeat(heads.len()))?;
        for curve in self.all() {
            let at = |step: &usize| format!("{:.3}", curve.mean_before(*step, WINDOW));
            let cells: Vec<String> = std::iter::once(&WINDOW).chain(&quarters).map(at).collect();
            let (last, held_out, seconds) = (curve.last(), 100.0 * curve.held_out, curve.seconds);
            let name = format!("{} {}", curve.system, curve.variant);
            let cells = cells.join(" | ");
            writeln!(text, "| {name} | {} | {cells} | {last:.3} | {held_out:.1} % | {seconds:.0} |", curve.seed)?;
        }
        writeln!(text, "\n{}", self.verdict())?;
        Ok(text)
    }

    /// Means over everything that both sides trained with.
    fn verdict(&self) -> String {
        let mut lines =
            vec!["Means over the losses and seeds that both have, aha's and TRL's:".to_owned(), String::new()];
        let pairs: Vec<(&Curve, &Curve)> = self
            .theirs
            .iter()
            .filter_map(|peer| Some((*self.of("aha", &peer.variant).iter().find(|own| own.seed == peer.seed)?, peer)))
            .collect();
        let num_steps = self.own[0].rewards.len();
        let mut compare = |what: String, value: &dyn Fn(&Curve) -> f64| {
            let differences: Vec<f64> = pairs.iter().map(|(own, peer)| value(own) - value(peer)).collect();
            let [own, peer] = [
                mean(&pairs.iter().map(|(own, _)| value(own)).collect::<Vec<_>>()),
                mean(&pairs.iter().map(|(_, peer)| value(peer)).collect::<Vec<_>>()),
            ];
            let error =
                if pairs.len() > 1 { format!(" ± {:.3}", standard_error(&differences)) } else { String::new() };
            lines.push(format!("- {what}: {own:.3} and {peer:.3}, a difference of {:+.3}{error}", own - peer));
        };
        for quarter in 1..=4 {
            let step = num_steps * quarter / 4;
            let what = format!("reward after {} completions", step * self.completions_per_step);
            compare(what, &|curve| curve.mean_before(step, WINDOW));
        }
        compare(format!("reward of the last {LAST_STEPS} steps"), &Curve::last);
        compare("held-out accuracy".to_owned(), &|curve| curve.held_out);
        lines.join("\n")
    }

    /// A row a step, a column a run.
    pub(super) fn csv(&self) -> String {
        let header: Vec<String> =
            self.all().map(|curve| format!("{} {} {}", curve.system, curve.variant, curve.seed)).collect();
        let mut text = format!("step,completions,{}\n", header.join(","));
        let num_steps = self.all().map(|curve| curve.rewards.len()).max().unwrap_or(0);
        for step in 0..num_steps {
            let cell = |curve: &Curve| curve.rewards.get(step).map_or(String::new(), |reward| format!("{reward:.4}"));
            let cells: Vec<String> = self.all().map(cell).collect();
            text += &format!("{},{},{}\n", step + 1, (step + 1) * self.completions_per_step, cells.join(","));
        }
        text
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Of the mean of two or more values.
fn standard_error(values: &[f64]) -> f64 {
    let mean = mean(values);
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0);
    (variance / values.len() as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Rewards that rise by `slope` a step.
    fn curve(system: &'static str, variant: &str, seed: u64, slope: f64) -> Curve {
        let rows: Vec<Value> = (0..40).map(|step| json!({"reward": slope * f64::from(step)})).collect();
        Curve::new((system, variant, seed), &rows, &json!(0.5), &json!(60.0)).unwrap()
    }

    fn report() -> Report {
        Report {
            own: vec![curve("aha", "dapo", 1, 0.02), curve("aha", "dapo", 2, 0.04), curve("aha", "zero_3", 1, 0.02)],
            theirs: vec![curve("TRL", "dapo", 1, 0.01), curve("TRL", "dapo", 2, 0.01)],
            completions_per_step: 8,
            hardware: "a machine".to_owned(),
        }
    }

    #[test]
    fn lines_are_means_over_seeds_and_steps() {
        let lines = report().lines();
        assert_eq!(
            lines.iter().map(|line| line.name.as_str()).collect::<Vec<_>>(),
            ["aha dapo", "aha zero_3", "TRL dapo"]
        );
        let (completions, reward) = lines[0].points[0];
        assert!(completions == 80.0 && (reward - 0.03 * 4.5).abs() < 1e-9, "{reward}");
        assert_eq!(lines[0].points.len(), 31);
    }

    #[test]
    fn tables_have_every_run_and_what_both_trained() {
        let text = report().markdown("2000-01-01").unwrap();
        // Steps 0 to 9, the quarters and the last 20, by hand.
        assert!(
            text.contains("| aha dapo | 1 | 0.090 | 0.090 | 0.290 | 0.490 | 0.690 | 0.590 | 50.0 % | 60 |"),
            "{text}"
        );
        // aha 0.02 and 0.04, TRL 0.01 and 0.01, times 29.5: differences of 0.295 and 0.885.
        assert!(text.contains("last 20 steps: 0.885 and 0.295, a difference of +0.590 ± 0.295"), "{text}");
        let csv = report().csv();
        assert_eq!(
            csv.lines().next().unwrap(),
            "step,completions,aha dapo 1,aha dapo 2,aha zero_3 1,TRL dapo 1,TRL dapo 2"
        );
        assert_eq!(csv.lines().nth(2).unwrap(), "2,16,0.0200,0.0400,0.0200,0.0100,0.0100");
    }

    #[test]
    fn a_run_without_rewards_is_named() {
        let error = Curve::new(("TRL", "grpo", 3), &[json!({})], &json!(0.5), &json!(1.0)).unwrap_err();
        assert!(error.to_string().contains("TRL grpo, seed 3"), "{error}");
    }
}
