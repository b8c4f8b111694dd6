//! From token events to completions: text, stop strings and rewards, beside the engine's thread.
//!
//! Every request has one task that follows its events. Only requests with stop strings are detokenised while they run;
//! decoding and judging a finished completion happens on blocking threads, a bounded number at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aha_core::dataset::Row;
use aha_core::ids::{PolicyVersion, PromptId, TokenId};
use aha_core::reward::{Outcome, RewardFunction};
use aha_core::rollout::{Completion, FinishReason, RawLogprobs, Reward, Span};
use aha_core::tokenizer::{SpecialTokens, Tokenizer};
use tokio::sync::{Semaphore, mpsc};

use crate::engine::{EngineHandle, Request, RequestKey, TokenEvent};
use crate::error::GeneratorError;
use crate::metrics::Latencies;
use crate::request::GenerateRequest;
use crate::stop::StopFinder;
use crate::torch::DeviceWeights;

/// Completions that are decoded and judged at the same time; the engine needs the cores more.
const MAX_JUDGED_AT_ONCE: usize = 2;
/// A judge that takes longer has timed out.
const JUDGE_DEADLINE: Duration = Duration::from_secs(30);

/// What a request becomes: its completions as they finish, or what ended it early.
pub(crate) type Completions = mpsc::Receiver<Result<Completion, GeneratorError>>;

/// Starts requests and follows them.
#[derive(Debug, Clone)]
pub(crate) struct Outputs {
    engine: EngineHandle<DeviceWeights>,
    tokenizer: Arc<Tokenizer>,
    judging: Arc<Semaphore>,
    latencies: Arc<Latencies>,
}

impl Outputs {
    pub(crate) fn new(engine: EngineHandle<DeviceWeights>, tokenizer: Arc<Tokenizer>) -> Self {
        let judging = Arc::new(Semaphore::new(MAX_JUDGED_AT_ONCE));
        Self { engine, tokenizer, judging, latencies: Arc::default() }
    }

    /// Of all requests.
    pub(crate) fn latencies(&self) -> Arc<Latencies> {
        Arc::clone(&self.latencies)
    }

    /// Hands a request to the engine. Dropping what is returned aborts it.
    ///
    /// `at_end` is dropped when the request is over.
    ///
    /// # Errors
    /// If the engine refuses it, or is gone; where the prompt's log-probs are asked for, if it is asleep, too.
    pub(crate) async fn start<G: Send + 'static>(
        &self,
        key: RequestKey,
        request: GenerateRequest,
        deadline: Instant,
        at_end: G,
    ) -> Result<Completions, GeneratorError> {
        let start = Instant::now();
        let num_samples = request.sample_indices.len();
        let (events, incoming) = mpsc::channel(Request::events_capacity(num_samples, request.sampling.max_tokens));
        let (completions, outgoing) = mpsc::channel(num_samples + 1);
        let GenerateRequest { prompt_id, prompt, sample_indices, sampling, seed, rewards, columns, .. } = request;
        let samples = sample_indices.iter().map(|&index| (index, Sample::new(index, &sampling.stop))).collect();
        let (stop, min_tokens) = (sampling.stop.clone(), sampling.min_tokens as usize);
        let prompt_logprobs = match sampling.prompt_logprobs {
            true => self.engine.score(prompt.clone()).await?.logprobs,
            false => Vec::new(),
        };
        self.engine.add(Request { key, prompt_id, prompt, sample_indices, sampling, seed, deadline, events }).await?;
        let judge = Judge { prompt_id, prompt_logprobs, rewards, columns, tokenizer: Arc::clone(&self.tokenizer) };
        let follower = Follower {
            key,
            start,
            deadline,
            num_samples,
            samples,
            stop,
            min_tokens,
            engine: self.engine.clone(),
            judge: Arc::new(judge),
            judging: Arc::clone(&self.judging),
            latencies: self.latencies(),
            completions,
        };
        tokio::spawn(async move {
            follower.follow(incoming).await;
            drop(at_end);
        });
        Ok(outgoing)
    }
}

/// A completion in the making.
#[derive(Debug)]
struct Sample {
    index: u32,
    token_ids: Vec<TokenId>,
    logprobs: Vec<f32>,
    raw_logprobs: Vec<RawLogprobs>,
    spans: Vec<Span>,
    last_token: Option<Instant>,
    /// Where stop strings are asked for.
    stop: Option<StopFinder>,
}

impl Sample {
    fn new(index: u32, stop: &[String]) -> Self {
        let stop = (!stop.is_empty()).then(StopFinder::default);
        let (token_ids, logprobs, raw_logprobs, spans) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { index, token_ids, logprobs, raw_logprobs, spans, last_token: None, stop }
    }

    fn push(&mut self, token: TokenId, logprob: f32, version: PolicyVersion) {
        self.token_ids.push(token);
        self.logprobs.push(logprob);
        match self.spans.last_mut().filter(|span| span.version == version) {
            Some(span) => span.num_tokens += 1,
            None => self.spans.push(Span { version, num_tokens: 1 }),
        }
    }
}

/// The task of one request.
struct Follower {
    key: RequestKey,
    start: Instant,
    deadline: Instant,
    num_samples: usize,
    /// Those that are not finished.
    samples: HashMap<u32, Sample>,
    stop: Vec<String>,
    min_tokens: usize,
    engine: EngineHandle<DeviceWeights>,
    judge: Arc<Judge>,
    judging: Arc<Semaphore>,
    latencies: Arc<Latencies>,
    /// Holds every completion, so that sending never waits for the client.
    completions: mpsc::Sender<Result<Completion, GeneratorError>>,
}

impl Follower {
    /// Ends with the last sample, with the client, or with the engine.
    async fn follow(mut self, events: mpsc::Receiver<TokenEvent>) {
        self.take_all(events).await;
        self.latencies.given_up(self.samples.len());
    }

    async fn take_all(&mut self, mut events: mpsc::Receiver<TokenEvent>) {
        while !self.samples.is_empty() {
            let event = tokio::select! {
                event = events.recv() => event,
                () = self.completions.closed() => {
                    // Blocks are freed now, not when the next token finds nobody listening. A dead engine holds none.
                    drop(self.engine.abort(self.key).await);
                    return;
                }
            };
            let done = match event {
                Some(event) => self.take(event).await,
                None => Err(self.engine.gone().await.into()),
            };
            if let Err(error) = done {
                // A client that is gone needs no reason.
                drop(self.completions.send(Err(error)).await);
                return;
            }
        }
    }

    async fn take(&mut self, event: TokenEvent) -> Result<(), GeneratorError> {
        // Tokens that were under way when a stop string was found belong to no sample any more.
        let Some(sample) = self.samples.get_mut(&event.sample_index()) else { return Ok(()) };
        let mut finish = event.finish();
        let now = Instant::now();
        let sample_index = event.sample_index();
        if let TokenEvent::Token { token, logprob, raw, version, .. } = event {
            match sample.last_token.replace(now) {
                None => self.latencies.first_token(now - self.start),
                Some(before) => self.latencies.next_token(now - before),
            }
            sample.push(token, logprob, version);
            sample.raw_logprobs.extend(raw.map(|raw| *raw));
            let num_tokens = sample.token_ids.len();
            if let Some(finder) = &mut sample.stop {
                let found = finder.push(&self.judge.tokenizer, &self.stop, token);
                if found.map_err(internal)? && num_tokens >= self.min_tokens {
                    if finish.is_none() {
                        self.engine.finish(self.key, sample_index, num_tokens).await?;
                    }
                    finish = Some(FinishReason::Stop);
                }
            }
        }
        let Some(finish) = finish else { return Ok(()) };
        if finish == FinishReason::Aborted && now >= self.deadline {
            let finished = self.num_samples - self.samples.len();
            return Err(GeneratorError::Deadline { finished, asked: self.num_samples });
        }
        if let Some(sample) = self.samples.remove(&sample_index) {
            self.latencies.finished(finish, now - self.start);
            self.complete(sample, finish);
        }
        Ok(())
    }

    /// Has a finished sample judged and sent, while the others go on.
    fn complete(&self, sample: Sample, finish: FinishReason) {
        let (judge, judging, completions) =
            (Arc::clone(&self.judge), Arc::clone(&self.judging), self.completions.clone());
        tokio::spawn(async move {
            // The semaphore is never closed; if it were, judging would merely be unbounded.
            let permit = judging.acquire_owned().await;
            let completion = judge.complete(sample, finish).await;
            drop(permit);
            // A client that is gone wants no completion.
            drop(completions.send(completion).await);
        });
    }
}

/// What completions are judged by, and have in common.
#[derive(Debug)]
struct Judge {
    prompt_id: PromptId,
    /// Where they are asked for.
    prompt_logprobs: Vec<f32>,
    rewards: Vec<RewardFunction>,
    columns: Row,
    tokenizer: Arc<Tokenizer>,
}

impl Judge {
    async fn complete(self: Arc<Self>, sample: Sample, finish: FinishReason) -> Result<Completion, GeneratorError> {
        let judge = Arc::clone(&self);
        let decoded = tokio::task::spawn_blocking(move || {
            let text = judge.tokenizer.decode(&sample.token_ids, SpecialTokens::Skip);
            (sample, text)
        });
        let (sample, text) = decoded.await.map_err(internal)?;
        let text = text.map_err(internal)?;
        // What was cut off by an abort is no answer to judge.
        let rewards = if finish == FinishReason::Aborted { Vec::new() } else { self.judge(text.clone()).await };
        Ok(Completion {
            prompt_id: self.prompt_id,
            sample_index: sample.index,
            token_ids: sample.token_ids,
            logprobs: sample.logprobs,
            spans: sample.spans,
            finish_reason: finish,
            text,
            rewards,
            raw_logprobs: sample.raw_logprobs,
            prompt_logprobs: self.prompt_logprobs.clone(),
        })
    }

    async fn judge(self: &Arc<Self>, text: String) -> Vec<Reward> {
        if self.rewards.is_empty() {
            return Vec::new();
        }
        let judge = Arc::clone(self);
        let outcomes = tokio::task::spawn_blocking(move || {
            judge.rewards.iter().map(|function| function.score(&text, &judge.columns)).collect()
        });
        let outcomes: Vec<Outcome> = match tokio::time::timeout(JUDGE_DEADLINE, outcomes).await {
            Ok(Ok(outcomes)) => outcomes,
            Ok(Err(_)) => vec![Outcome::Crash; self.rewards.len()],
            Err(_) => vec![Outcome::Timeout; self.rewards.len()],
        };
        let reward = |(function, outcome): (&RewardFunction, Outcome)| Reward {
            function: function.name().to_owned(),
            score: outcome.score(),
            outcome: outcome.name().to_owned(),
        };
        self.rewards.iter().zip(outcomes).map(reward).collect()
    }
}

fn internal(error: impl std::error::Error) -> GeneratorError {
    GeneratorError::Internal(error.to_string())
}
