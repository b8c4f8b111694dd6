//! The engine without a network: for trainers that sample in their own process, for the command line, and for measuring.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aha_core::dataset::Row;
use aha_core::ids::{PolicyVersion, PromptId, TokenId};
use aha_core::rollout::{Completion, Sampling};
use aha_core::tokenizer::Tokenizer;
use aha_nn::kernels::cpu::Pool;
use aha_nn::runtime;
use aha_nn::unit::{ModelWeights, Walk};
use aha_proto::v1;
use tokio::sync::mpsc;

use crate::engine::{EngineStatus, Request, RequestKey, TokenEvent};
use crate::error::GeneratorError;
use crate::instance::{GeneratorOptions, Instance, num_threads};
use crate::request::GenerateRequest;
use crate::torch::DeviceWeights;

/// Nobody is at the other end who could lose patience sooner.
const DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// A model in this process.
#[derive(Debug)]
pub struct LocalGenerator {
    instance: Instance,
    next_key: AtomicU64,
    /// Packs new weights.
    pool: Pool,
}

impl LocalGenerator {
    /// Starts the engine of a model, with its weights or, as `options` say, asleep.
    ///
    /// # Errors
    /// Names the file that cannot be used, or the setting that cannot be met.
    pub fn load(options: &GeneratorOptions) -> anyhow::Result<Self> {
        let pool = Pool::new(num_threads(options.generator.threads)?)?;
        Ok(Self { instance: Instance::start(options)?, next_key: AtomicU64::new(0), pool })
    }

    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.instance.tokenizer
    }

    /// `num_samples` completions of one prompt, in the order of their sample index. Needs a tokio runtime.
    ///
    /// # Errors
    /// Names what is wrong with the request, or why the engine is gone.
    pub async fn generate(
        &self,
        prompt: &[TokenId],
        sampling: &Sampling,
        seed: u64,
        num_samples: u32,
    ) -> Result<Vec<Completion>, GeneratorError> {
        self.complete(self.request(prompt, sampling, seed, num_samples)?).await
    }

    /// The scored completions that the service would answer a request with, in the order of their sample index. Needs a
    /// tokio runtime.
    ///
    /// # Errors
    /// As for [`LocalGenerator::generate`].
    pub async fn answer(&self, request: v1::GenerateRequest) -> Result<Vec<Completion>, GeneratorError> {
        self.complete(self.instance.limits.check(request)?).await
    }

    async fn complete(&self, request: GenerateRequest) -> Result<Vec<Completion>, GeneratorError> {
        let mut finished = self.instance.outputs.start(self.key(), request, Instant::now() + DEADLINE, ()).await?;
        let mut completions = Vec::new();
        while let Some(completion) = finished.next().await {
            completions.push(completion?);
        }
        completions.sort_by_key(|completion| completion.sample_index);
        Ok(completions)
    }

    /// Hash of the manifest that weights must have.
    #[must_use]
    pub fn manifest_hash(&self) -> u64 {
        self.instance.manifest_hash
    }

    /// Serves `weights` from now on, awake: where they are, which is lent until the engine sleeps, if it can read them
    /// there, or else a copy. Where ranks share the weights, all of them call this together. Returns the time for which
    /// decoding stood still.
    ///
    /// # Errors
    /// If there is no memory for them, the ranks cannot reach each other, or the engine is gone.
    pub async fn serve(&self, weights: &dyn ModelWeights, version: PolicyVersion) -> anyhow::Result<Duration> {
        let Instance { engine, config, format, .. } = &self.instance;
        let staged = match DeviceWeights::borrowed(config, *format, weights)? {
            Some(borrowed) => borrowed,
            None => self.copied(weights)?,
        };
        // What served before goes before the cache comes back.
        let stood_still = engine.swap(staged, version).await?.stood_still;
        engine.wake().await?;
        Ok(stood_still)
    }

    fn copied(&self, weights: &dyn ModelWeights) -> anyhow::Result<DeviceWeights> {
        let Instance { config, format, .. } = &self.instance;
        let mut walk = Walk::all(weights);
        let mut staged = DeviceWeights::empty(config, *format);
        for unit_idx in 0..weights.manifest().units.len() {
            // Whatever fails here, the other ranks gather on.
            let unit = walk.next(weights)?;
            staged = staged.and_then(|mut staged| {
                staged.set_unit(unit_idx, unit.params(), &self.pool)?;
                Ok(staged)
            });
        }
        staged
    }

    /// Gives back keys, values and weights, until others are served. What it was lent may be written then.
    ///
    /// # Errors
    /// If requests are in flight, or the engine is gone.
    pub async fn sleep(&self) -> Result<(), GeneratorError> {
        self.instance.engine.sleep(true).await?;
        runtime::release_memory();
        Ok(())
    }

    /// One completion, token by token. Stop strings are not looked for.
    ///
    /// # Errors
    /// As for [`LocalGenerator::generate`].
    pub async fn stream(
        &self,
        prompt: &[TokenId],
        sampling: &Sampling,
        seed: u64,
    ) -> Result<mpsc::Receiver<TokenEvent>, GeneratorError> {
        let checked = self.request(prompt, sampling, seed, 1)?;
        let GenerateRequest { prompt_id, prompt, sample_indices, sampling, seed, .. } = checked;
        let (events, incoming) = mpsc::channel(Request::events_capacity(1, sampling.max_tokens));
        let deadline = Instant::now() + DEADLINE;
        let key = self.key();
        let request = Request { key, prompt_id, prompt, sample_indices, sampling, seed, deadline, events };
        self.instance.engine.add(request).await?;
        Ok(incoming)
    }

    /// Log-prob of each of `tokens[1..]` given those before, through the engine's path.
    ///
    /// # Errors
    /// As for [`LocalGenerator::generate`].
    pub async fn score(&self, tokens: &[TokenId]) -> Result<Vec<f32>, GeneratorError> {
        self.instance.limits.check_tokens(tokens)?;
        Ok(self.instance.scorer.score(tokens.to_vec()).await?.logprobs)
    }

    /// What the engine is doing.
    ///
    /// # Errors
    /// If the engine is gone.
    pub async fn status(&self) -> Result<EngineStatus, GeneratorError> {
        Ok(self.instance.engine.status().await?)
    }

    fn request(
        &self,
        prompt: &[TokenId],
        sampling: &Sampling,
        seed: u64,
        num_samples: u32,
    ) -> Result<GenerateRequest, GeneratorError> {
        let request = GenerateRequest {
            prompt_id: PromptId(0),
            prompt: prompt.to_vec(),
            sample_indices: (0..num_samples).collect(),
            sampling: sampling.clone(),
            seed,
            rewards: Vec::new(),
            columns: Row::new(),
        };
        self.instance.limits.check_request(&request)?;
        Ok(request)
    }

    fn key(&self) -> RequestKey {
        RequestKey(self.next_key.fetch_add(1, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Activity;
    use crate::testing::{Tiny, tiny_config, tiny_folder, tiny_options, tiny_weights};

    #[tokio::test]
    async fn an_engine_that_awaits_weights_sleeps_until_they_come() {
        let folder = tiny_folder(Tiny::Qwen2, 1);
        let options = tiny_options(folder.path());
        let expect = LocalGenerator::load(&options).unwrap();
        let generator = LocalGenerator::load(&GeneratorOptions { awaits_weights: true, ..options }).unwrap();
        let sampling = Sampling { max_tokens: 12, ignore_eos: true, ..Sampling::default() };
        let prompt = expect.tokenizer().encode("one prompt").unwrap();
        let tokens = |completions: Vec<Completion>| completions.into_iter().map(|c| c.token_ids).collect::<Vec<_>>();
        for version in 1..3 {
            assert_eq!(generator.status().await.unwrap().activity, Activity::Asleep);
            assert!(generator.score(&prompt).await.unwrap_err().to_string().contains("asleep"));
            let weights = tiny_weights(&tiny_config(Tiny::Qwen2), 1);
            generator.serve(&weights, PolicyVersion(version)).await.unwrap();
            assert!(!weights.is_lent(), "the CPU's kernels read packed copies");
            let sampled = generator.generate(&prompt, &sampling, 3, 2).await.unwrap();
            assert_eq!(sampled[0].spans[0].version, PolicyVersion(version));
            assert_eq!(tokens(sampled), tokens(expect.generate(&prompt, &sampling, 3, 2).await.unwrap()));
            generator.sleep().await.unwrap();
        }
    }

    #[tokio::test]
    async fn completions_streams_and_scores_agree() {
        let folder = tiny_folder(Tiny::Qwen2, 1);
        let generator = LocalGenerator::load(&tiny_options(folder.path())).unwrap();
        let prompt = generator.tokenizer().encode("one prompt").unwrap();
        let sampling = Sampling { max_tokens: 12, ignore_eos: true, ..Sampling::default() };
        let completions = generator.generate(&prompt, &sampling, 3, 2).await.unwrap();
        assert_eq!(completions.iter().map(|completion| completion.sample_index).collect::<Vec<_>>(), [0, 1]);

        let mut events = generator.stream(&prompt, &sampling, 3).await.unwrap();
        let mut streamed = Vec::new();
        while let Some(event) = events.recv().await {
            let TokenEvent::Token { token, logprob, .. } = event else { panic!("{event:?}") };
            streamed.push((token, logprob));
        }
        let whole = completions[0].token_ids.iter().copied().zip(completions[0].logprobs.iter().copied());
        assert_eq!(streamed, whole.collect::<Vec<_>>());

        let scored = generator.score(&[prompt.clone(), completions[0].token_ids.clone()].concat()).await.unwrap();
        for (scored, (_, sampled)) in scored[prompt.len() - 1..].iter().zip(&streamed) {
            assert!((scored - sampled).abs() < 1e-4, "{scored} and {sampled}");
        }
        let error = generator.generate(&[], &sampling, 3, 1).await.unwrap_err().to_string();
        assert!(error.starts_with("token_ids: "), "{error}");
    }
}
