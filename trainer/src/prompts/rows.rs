//! The rows of one source: read, selected, and split into those to train on and those held out.

use std::collections::{BTreeSet, HashSet};

use aha_core::chat_template::ChatTemplate;
use aha_core::config::{DataSource, RunConfig, Source};
use aha_core::dataset::{Dataset, Part, Row, SplitMix64, is_held_out, question_id};
use aha_core::ids::PromptId;
use aha_core::prompt::PromptBuilder;
use aha_core::random::derive_seed;
use aha_core::reward::{RewardFunction, RewardSpec};
use aha_core::rollout::Origin;

use super::PromptsError;

/// Names the shuffle among the purposes that the run's seed is used for.
const SHUFFLE: u64 = 0x5348_5546;

#[derive(Debug)]
pub(super) struct Rows {
    pub(super) origin: Origin,
    pub(super) weight: f64,
    pub(super) builder: PromptBuilder,
    /// Positions in the data set.
    pub(super) train: Vec<usize>,
    pub(super) held_out: Vec<usize>,
    pub(super) num_read: usize,
    pub(super) num_filtered: usize,
    /// Rows that were left out because their prompts are too long.
    pub(super) num_too_long: usize,
    /// Rows that ask what an earlier one asks; of those that are held out, only the first is kept.
    pub(super) num_duplicates: usize,
    dataset: Dataset,
    /// Where each row was in what was read.
    numbers: Vec<usize>,
    /// Position among the sources.
    index: usize,
    /// Of the first row that was read.
    first_id: u64,
}

impl Rows {
    /// `chat_template` is needed where the source's prompts have the chat form.
    pub(super) fn load(
        config: &RunConfig,
        spec: &Source,
        (index, first_id): (usize, u64),
        chat_template: Option<ChatTemplate>,
    ) -> Result<Self, PromptsError> {
        let prompt = spec.prompt.as_ref().unwrap_or(&config.data.prompt);
        let builder = PromptBuilder::new(prompt, chat_template)?;
        let selected = read(config, spec, index)?.select(spec.filter.as_deref(), spec.shuffle_seed, spec.take)?;
        let (dataset, numbers) = (selected.dataset, selected.numbers);
        check_columns(&dataset, &numbers, config, spec)?;
        let fraction = spec.held_out.unwrap_or(config.data.held_out);
        let (mut held_out, train): (Vec<_>, Vec<_>) =
            (0..dataset.len()).partition(|&row| is_held_out(&dataset.rows()[row], fraction));
        if train.is_empty() {
            return Err(PromptsError::NoTrainRows { held_out: fraction, num_rows: dataset.len() });
        }
        // A question that comes up twice would count twice.
        let mut asked = HashSet::new();
        held_out.retain(|&row| asked.insert(question_id(&dataset.rows()[row])));
        asked.extend(train.iter().map(|&row| question_id(&dataset.rows()[row])));
        Ok(Self {
            origin: Origin { source: spec.name.clone(), rewards: spec.rewards.clone() },
            weight: spec.weight,
            builder,
            num_read: selected.num_read,
            num_filtered: selected.num_filtered,
            num_too_long: 0,
            num_duplicates: dataset.len() - asked.len(),
            train,
            held_out,
            dataset,
            numbers,
            index,
            first_id,
        })
    }

    /// Rows that were selected.
    pub(super) fn len(&self) -> usize {
        self.dataset.len()
    }

    pub(super) fn row(&self, row: usize) -> &Row {
        &self.dataset.rows()[row]
    }

    /// Where a row was in what was read.
    pub(super) fn number(&self, row: usize) -> usize {
        self.numbers[row]
    }

    pub(super) fn id(&self, row: usize) -> PromptId {
        PromptId(self.first_id + self.number(row) as u64)
    }

    /// The first id of the source after this one.
    pub(super) fn next_id(&self) -> u64 {
        self.first_id + self.num_read as u64
    }

    /// Every row that prompts are made of, in the order of the data set.
    pub(super) fn all(&self) -> Vec<usize> {
        let mut rows = [self.train.as_slice(), &self.held_out].concat();
        rows.sort_unstable();
        rows
    }

    pub(super) fn drop(&mut self, rows: &BTreeSet<usize>) {
        self.train.retain(|row| !rows.contains(row));
        self.held_out.retain(|row| !rows.contains(row));
        self.num_too_long += rows.len();
    }

    /// The rows at `first ..` of the endless shuffled stream, `count` of them.
    pub(super) fn stream(&self, seed: u64, first: u64, count: usize) -> Vec<usize> {
        let epoch_len = self.train.len() as u64;
        let (mut epoch, mut from) = (first / epoch_len, (first % epoch_len) as usize);
        let mut rows = Vec::with_capacity(count);
        while rows.len() < count {
            let until = self.train.len().min(from + count - rows.len());
            rows.extend_from_slice(&self.epoch(seed, epoch)[from..until]);
            (epoch, from) = (epoch + 1, 0);
        }
        rows
    }

    /// The training rows in the order of one epoch (Fisher and Yates).
    fn epoch(&self, seed: u64, epoch: u64) -> Vec<usize> {
        let mut rows = self.train.clone();
        let mut random = SplitMix64::new(derive_seed(seed, &[SHUFFLE, epoch]));
        if self.index > 0 {
            random = SplitMix64::new(derive_seed(seed, &[SHUFFLE, epoch, self.index as u64]));
        }
        for last in (1..rows.len()).rev() {
            rows.swap(last, random.below(last as u64 + 1) as usize);
        }
        rows
    }

    /// Tells what became of the rows, where any were left out or there are other sources.
    pub(super) fn log(&self) {
        if self.num_read == self.len() && self.num_too_long == 0 && self.origin.source.is_empty() {
            return;
        }
        tracing::info!(
            source = self.origin.source,
            read = self.num_read,
            filtered = self.num_filtered,
            selected = self.len(),
            too_long = self.num_too_long,
            train = self.train.len(),
            held_out = self.held_out.len(),
            "rows of the data set"
        );
    }
}

fn read(config: &RunConfig, spec: &Source, index: usize) -> Result<Dataset, PromptsError> {
    match spec.source {
        DataSource::Countdown => {
            // Two sources of the same settings would hold the same puzzles.
            let seed = if index == 0 { config.run.seed } else { derive_seed(config.run.seed, &[index as u64]) };
            Ok(spec.countdown.with_seed(seed).generate()?)
        }
        DataSource::File => {
            let path = spec.path.as_deref().ok_or(PromptsError::NoPath)?;
            let part = Part { split: spec.split.as_deref(), subset: spec.subset.as_deref() };
            Ok(Dataset::load(path, part, &spec.columns)?)
        }
    }
}

/// Every row must have what the source's reward functions read.
fn check_columns(dataset: &Dataset, numbers: &[usize], config: &RunConfig, spec: &Source) -> Result<(), PromptsError> {
    let is_built_in = |reward: &&RewardSpec| spec.asks_for(reward.name()) && !reward.is_external();
    let functions = config.rewards.iter().filter(is_built_in).map(RewardFunction::new);
    let functions =
        functions.collect::<Result<Vec<_>, _>>().map_err(|source| PromptsError::Columns { row: 0, source })?;
    for (columns, &row) in dataset.rows().iter().zip(numbers) {
        for function in &functions {
            function.check_columns(columns).map_err(|source| PromptsError::Columns { row, source })?;
        }
    }
    Ok(())
}
