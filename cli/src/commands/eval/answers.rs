//! Completions of the engine in this process, as the trainer asks for them.

use aha_core::rollout::{Group, Prompt};
use aha_generator::{GeneratorError, LocalGenerator};
use aha_trainer::rollouts::{RolloutError, RolloutRequest, Rollouts};
use futures::{StreamExt, TryStreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::runtime::Runtime;

/// What errors call the engine.
const OWN: &str = "in this process";
/// Samples that the engine knows of at once: more than it decodes together, so that it never waits for the next prompt.
const MAX_IN_FLIGHT: usize = 512;
const BAR: &str = "{prefix} {wide_bar} {pos}/{len} prompts, {eta} left";

/// The engine, with a bar on a terminal.
#[derive(Debug)]
pub(super) struct Answers<'a> {
    pub(super) engine: &'a LocalGenerator,
    pub(super) runtime: &'a Runtime,
    /// Of the suite.
    pub(super) name: &'a str,
}

impl Rollouts for Answers<'_> {
    fn roll_out(&mut self, request: &RolloutRequest) -> Result<Vec<Option<Group>>, RolloutError> {
        let style = ProgressStyle::with_template(BAR).expect("the template is valid");
        // Drawn on standard error, and nowhere if that is no terminal.
        let bar = ProgressBar::new(request.prompts.len() as u64).with_style(style).with_prefix(self.name.to_owned());
        let (this, bar) = (&*self, &bar);
        let groups = request.prompts.iter().enumerate().map(|(index, prompt)| async move {
            let group = this.group(request, prompt).await?;
            bar.inc(1);
            Ok::<_, RolloutError>((index, group))
        });
        let num_in_flight = (MAX_IN_FLIGHT / request.num_generations.max(1)).max(1);
        let groups = stream::iter(groups).buffer_unordered(num_in_flight).try_collect::<Vec<_>>();
        let answered = self.runtime.block_on(groups);
        bar.finish_and_clear();
        let mut groups = answered?;
        groups.sort_by_key(|(index, _)| *index);
        Ok(groups.into_iter().map(|(_, group)| Some(group)).collect())
    }
}

impl Answers<'_> {
    async fn group(&self, request: &RolloutRequest, prompt: &Prompt) -> Result<Group, RolloutError> {
        let samples = (0..request.num_generations as u32).collect();
        let completions = self.engine.answer(request.message(prompt, samples, OWN.to_owned())).await;
        let refused = |error: GeneratorError| RolloutError::Refused {
            generator: OWN.to_owned(),
            prompt: prompt.id,
            reason: error.to_string(),
        };
        Ok(Group { prompt: prompt.clone(), completions: completions.map_err(refused)? })
    }
}
