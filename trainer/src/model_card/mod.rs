//! The model card of a run: `README.md` as the Hugging Face Hub and its tools read it, and the curve that it shows.

mod curve;
mod front_matter;
mod recipe;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use aha_core::config::{self, DataSource, RunConfig};
use aha_core::hub::RepositoryId;
use aha_nn::lora::peft;
use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::durable;

const README: &str = "README.md";
const CURVE: &str = "curve.svg";

/// What is known of a run and belongs beside its weights.
#[derive(Debug)]
pub struct ModelCard {
    config: RunConfig,
    steps: Vec<Step>,
    evaluations: Vec<Evaluated>,
}

/// A line of `metrics.jsonl`, as far as the card shows it.
#[derive(Debug, Deserialize)]
struct Step {
    step: u64,
    reward: Option<f64>,
    loss: Option<f64>,
    step_time: Option<f64>,
    num_tokens: Option<f64>,
}

/// A line of `evaluations.jsonl`, of reinforcement learning or of supervised fine-tuning.
#[derive(Debug, Deserialize)]
struct Evaluated {
    step: u64,
    accuracy: Option<f64>,
    prompts: Option<usize>,
    eval_loss: Option<f64>,
}

impl ModelCard {
    /// Writes the card of `part` of a run into `out`, which holds its weights. A model is of use without one.
    pub fn describe(part: &Path, out: &Path) {
        let written = Self::of(part).and_then(|card| card.map_or(Ok(()), |card| card.write(out)));
        if let Err(error) = written {
            tracing::warn!("{} has no model card: {error:#}", out.display());
        }
    }

    /// The card of `RUN/checkpoints/step-N`, as of that step, or of `RUN/model`; `None` where `folder` is no part of a run.
    ///
    /// # Errors
    /// If the run's files cannot be read.
    pub fn of(folder: &Path) -> Result<Option<Self>> {
        let folder = std::path::absolute(folder)?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let step: Option<u64> = name.strip_prefix("step-").and_then(|step| step.parse().ok());
        let run = folder.ancestors().nth(if step.is_some() { 2 } else { 1 });
        match run.filter(|run| run.join("config.yaml").is_file()) {
            Some(run) => Self::read(run, step.unwrap_or(u64::MAX)).map(Some),
            None => Ok(None),
        }
    }

    /// The files of a folder that holds the model, or its adapters alone: names and contents.
    ///
    /// # Errors
    /// If the configuration cannot be written as YAML.
    pub fn files(&self, is_adapter: bool) -> Result<Vec<(&'static str, String)>> {
        let mut files = vec![(README, self.text(is_adapter)?)];
        files.extend(self.curve().map(|curve| (CURVE, curve)));
        Ok(files)
    }

    /// Writes the files into `folder`.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        for (name, text) in self.files(folder.join(peft::FILES[0]).is_file())? {
            let path = folder.join(name);
            durable::replace_file(&path, text.as_bytes()).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }

    fn read(run: &Path, last_step: u64) -> Result<Self> {
        let config = config::load(&run.join("config.yaml"), [], &[])?;
        let mut steps: Vec<Step> = lines(&run.join("metrics.jsonl"))?;
        let mut evaluations: Vec<Evaluated> = lines(&run.join("evaluations.jsonl"))?;
        steps.retain(|line| line.step <= last_step);
        evaluations.retain(|line| line.step <= last_step);
        Ok(Self { config, steps, evaluations })
    }

    fn text(&self, is_adapter: bool) -> Result<String> {
        let name = &self.config.run.name;
        let mut text = format!("---\n{}---\n\n# {name}\n\n", self.front_matter(is_adapter)?);
        let what = if is_adapter { "Adapters" } else { "A model" };
        let how = if self.is_supervised() { "by supervised fine-tuning" } else { "by reinforcement learning" };
        write!(text, "{what} trained {how} with aha, from {}, on {}.\n\n", self.base_text(), self.data_text())?;
        text += &self.table();
        if self.curve().is_some() {
            write!(text, "\n![{} of every step]({CURVE})\n", self.curve_name())?;
        }
        write!(text, "\n## Use\n\n{}", self.usage(is_adapter))?;
        write!(text, "\n## Recipe\n\n{}", self.recipe()?)?;
        Ok(text)
    }

    fn is_supervised(&self) -> bool {
        self.steps.iter().all(|step| step.reward.is_none())
    }

    fn table(&self) -> String {
        let mut rows = Vec::new();
        if let (Some(first), Some(last)) = (self.steps.first(), self.steps.last()) {
            let mut pair = |name: &str, value: fn(&Step) -> Option<f64>| {
                if let (Some(before), Some(after)) = (value(first), value(last)) {
                    rows.push(format!("| {name}, steps {} and {} | {before:.4} | {after:.4} |", first.step, last.step));
                }
            };
            pair("reward", |step| step.reward);
            pair("loss", |step| step.loss);
        }
        if let (Some(first), Some(last)) = (self.evaluations.first(), self.evaluations.last()) {
            let steps = format!("after steps {} and {}", first.step, last.step);
            if let (Some(before), Some(after), Some(prompts)) = (first.accuracy, last.accuracy, last.prompts) {
                let [before, after] = [before, after].map(|share| 100.0 * share);
                let name = format!("accuracy on {prompts} held-out prompts, {steps}");
                rows.push(format!("| {name} | {before:.1} % | {after:.1} % |"));
            }
            if let (Some(before), Some(after)) = (first.eval_loss, last.eval_loss) {
                rows.push(format!("| loss on held-out rows, {steps} | {before:.4} | {after:.4} |"));
            }
        }
        let sum = |value: fn(&Step) -> Option<f64>| self.steps.iter().filter_map(value).sum::<f64>();
        let (seconds, tokens) = (sum(|step| step.step_time), sum(|step| step.num_tokens));
        let head = if rows.is_empty() {
            String::new()
        } else {
            format!("| | before | after |\n|---|---|---|\n{}\n\n", rows.join("\n"))
        };
        format!("{head}{} steps, {tokens:.0} tokens, {seconds:.0} s.\n", self.steps.len())
    }

    fn curve(&self) -> Option<String> {
        let value = |step: &Step| if self.is_supervised() { step.loss } else { step.reward };
        let points = self.steps.iter().filter_map(|step| Some((step.step as f64, value(step)?)));
        curve::svg(&points.collect::<Vec<_>>(), self.curve_name())
    }

    fn curve_name(&self) -> &'static str {
        if self.is_supervised() { "loss" } else { "reward" }
    }

    fn usage(&self, is_adapter: bool) -> String {
        let here = self.config.hub.model_id.as_deref().unwrap_or("path/to/this/folder");
        let (import, class) = if is_adapter {
            (
                "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
                "AutoPeftModelForCausalLM",
            )
        } else {
            ("from transformers import AutoModelForCausalLM, AutoTokenizer", "AutoModelForCausalLM")
        };
        let serve = if is_adapter {
            let base = self.base_id().map_or_else(|| "path/to/base".to_owned(), |id| id.to_string());
            format!("vllm serve {base} --enable-lora --lora-modules trained={here}")
        } else {
            format!("vllm serve {here}")
        };
        format!(
            "```python\n{import}\n\nmodel = {class}.from_pretrained(\"{here}\")\n\
             tokenizer = AutoTokenizer.from_pretrained(\"{here}\")\n```\n\n```sh\n{serve}\n```\n"
        )
    }

    /// Where the base model is a repository of the Hub, or a cached copy of one.
    fn base_id(&self) -> Option<RepositoryId> {
        let path = &self.config.model.path;
        RepositoryId::of_cached(path).filter(|_| !self.config.model.random_init)
    }

    fn base_text(&self) -> String {
        match self.base_id() {
            _ if self.config.model.random_init => "random weights".to_owned(),
            Some(id) => format!("[{id}](https://huggingface.co/{id})"),
            None => format!("`{}`", file_name(&self.config.model.path)),
        }
    }

    fn data_id(&self) -> Option<RepositoryId> {
        self.data_path().and_then(|path| RepositoryId::of_cached(path))
    }

    fn data_path(&self) -> Option<&PathBuf> {
        self.config.data.path.as_ref().filter(|_| self.config.data.source == DataSource::File)
    }

    fn data_text(&self) -> String {
        match (self.data_id(), self.data_path()) {
            (Some(id), _) => id.to_string(),
            (None, Some(path)) => file_name(path),
            (None, None) => format!("Countdown puzzles of {} numbers", self.config.data.countdown.numbers),
        }
    }
}

/// The last name of a path: the rest says where a machine keeps its files.
fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Every line that can be read; the last one may be torn. None where there is no file.
fn lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

#[cfg(test)]
mod tests;
