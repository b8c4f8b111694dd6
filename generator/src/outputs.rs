//! From token events to completions: text, stop strings and rewards, beside the engine's thread.
//!
//! Every request has one task that follows its events. Only requests with stop strings are detokenised while they run;
//! decoding and judging a finished completion happens on blocking threads, a bounded number at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aha_core::dataset::Row;
use aha_core::ids::{PolicyVersion, PromptId, TokenId};
use aha_core::reward::{Answer, Outcome, RewardFunction};
use aha_core::rollout::{Completion, FinishReason, RawLogprobs, Reward, Span};
use aha_core::tokenizer::{SpecialTokens, Tokenizer};
use tokio::sync::{Semaphore, mpsc};

use crate::engine::{EngineHandle, Request, RequestKey, TokenEvent};
use crate::error::GeneratorError;
use crate::metrics::{Ended, Observed};
use crate::request::GenerateRequest;
use crate::scorer::Scorer;
use crate::stop::StopFinder;
use crate::torch::DeviceWeights;

/// Completions that are decoded and judged at the same time; the engine needs the cores more.
const MAX_JUDGED_AT_ONCE: usize = 2;
/// A judge that takes longer has timed out.
const JUDGE_DEADLINE: Duration = Duration::from_secs(30);

/// What a request becomes. Dropping it aborts the request.
#[derive(Debug)]
pub(crate) struct Completions {
    finished: mpsc::Receiver<Result<Completion, GeneratorError>>,
    /// Samples asked for, and those of them that have not come out of `finished`.
    asked: usize,
    owed: usize,
}

impl Completions {
    /// The next completion to finish; after the last one, or an error, there is no other.
    pub(crate) async fn next(&mut self) -> Option<Result<Completion, GeneratorError>> {
        if self.owed == 0 {
            return None;
        }
        // Whoever holds a completion keeps it up to the deadline.
        let late = || Err(GeneratorError::Deadline { finished: self.asked - self.owed, asked: self.asked });
        let next = self.finished.recv().await.unwrap_or_else(late);
        self.owed = if next.is_ok() { self.owed - 1 } else { 0 };
        Some(next)
    }
}

/// Starts requests and follows them.
#[derive(Debug, Clone)]
pub(crate) struct Outputs {
    engine: EngineHandle<DeviceWeights>,
    scorer: Scorer,
    tokenizer: Arc<Tokenizer>,
    judging: Arc<Semaphore>,
    observed: Arc<Observed>,
}

impl Outputs {
    pub(crate) fn new(scorer: Scorer, tokenizer: Arc<Tokenizer>, max_model_len: usize) -> Self {
        let judging = Arc::new(Semaphore::new(MAX_JUDGED_AT_ONCE));
        let observed = Arc::new(Observed::new(max_model_len));
        Self { engine: scorer.engine().clone(), scorer, tokenizer, judging, observed }
    }

    /// Of all requests.
    pub(crate) fn observed(&self) -> Arc<Observed> {
        Arc::clone(&self.observed)
    }

    /// Hands a request to the engine.
    ///
    /// `at_end` is dropped when nothing is left of it here: when the last completion is taken, or the deadline has passed.
    ///
    /// # Errors
    /// If the engine refuses it, or is gone; where the prompt's log-probs are asked for, if it is asleep, too.
    pub(crate) async fn start<G: Send + Sync + 'static>(
        &self,
        key: RequestKey,
        request: GenerateRequest,
        deadline: Instant,
        at_end: G,
    ) -> Result<Completions, GeneratorError> {
        let start = Instant::now();
        let num_samples = request.sample_indices.len();
        let (events, incoming) = mpsc::channel(Request::events_capacity(num_samples, request.sampling.max_tokens));
        // What the client does not take waits with its sample's task, which gives up at the deadline.
        let (completions, finished) = mpsc::channel(1);
        let GenerateRequest { prompt_id, prompt, sample_indices, sampling, seed, rewards, columns, .. } = request;
        let samples = sample_indices.iter().map(|&index| (index, Sample::new(index, &sampling.stop))).collect();
        let (stop, min_tokens) = (sampling.stop.clone(), sampling.min_tokens as usize);
        let prompt_tokens = prompt.len();
        let prompt_logprobs = match sampling.prompt_logprobs {
            true => self.scorer.score(prompt.clone()).await?.logprobs,
            false => Vec::new(),
        };
        self.engine.add(Request { key, prompt_id, prompt, sample_indices, sampling, seed, deadline, events }).await?;
        let judge = Judge { prompt_id, prompt_logprobs, rewards, columns, tokenizer: Arc::clone(&self.tokenizer) };
        let follower = Follower {
            key,
            start,
            deadline,
            num_samples,
            prompt_tokens,
            samples,
            stop,
            min_tokens,
            engine: self.engine.clone(),
            judge: Arc::new(judge),
            judging: Arc::clone(&self.judging),
            observed: self.observed(),
            completions,
            at_end: Arc::new(at_end),
        };
        tokio::spawn(follower.follow(incoming));
        Ok(Completions { finished, asked: num_samples, owed: num_samples })
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
    /// When the first and the last one came.
    tokens_at: Option<(Instant, Instant)>,
    /// Where stop strings are asked for.
    stop: Option<StopFinder>,
}

impl Sample {
    fn new(index: u32, stop: &[String]) -> Self {
        let stop = (!stop.is_empty()).then(StopFinder::default);
        let (token_ids, logprobs, raw_logprobs, spans) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { index, token_ids, logprobs, raw_logprobs, spans, tokens_at: None, stop }
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
struct Follower<G> {
    key: RequestKey,
    start: Instant,
    deadline: Instant,
    num_samples: usize,
    prompt_tokens: usize,
    /// Those that are not finished.
    samples: HashMap<u32, Sample>,
    stop: Vec<String>,
    min_tokens: usize,
    engine: EngineHandle<DeviceWeights>,
    judge: Arc<Judge>,
    judging: Arc<Semaphore>,
    observed: Arc<Observed>,
    completions: mpsc::Sender<Result<Completion, GeneratorError>>,
    /// Held by the tasks of finished samples, too.
    at_end: Arc<G>,
}

impl<G: Send + Sync + 'static> Follower<G> {
    /// Ends with the last sample, with the client, or with the engine.
    async fn follow(mut self, events: mpsc::Receiver<TokenEvent>) {
        self.take_all(events).await;
        self.observed.given_up(self.samples.len());
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
                send(&self.completions, Err(error), self.deadline).await;
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
            match &mut sample.tokens_at {
                Some((_, last)) => self.observed.next_token(now - std::mem::replace(last, now)),
                first @ None => {
                    *first = Some((now, now));
                    self.observed.first_token(now - self.start, self.prompt_tokens);
                }
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
            self.observed.finished(&Ended {
                reason: finish,
                after: now - self.start,
                decode: sample.tokens_at.map_or(Duration::ZERO, |(first, last)| last - first),
                prompt_tokens: self.prompt_tokens,
                generation_tokens: sample.token_ids.len(),
            });
            self.complete(sample, finish);
        }
        Ok(())
    }

    /// Has a finished sample judged and sent, while the others go on.
    fn complete(&self, sample: Sample, finish: FinishReason) {
        let (judge, judging, completions) =
            (Arc::clone(&self.judge), Arc::clone(&self.judging), self.completions.clone());
        let (at_end, deadline) = (Arc::clone(&self.at_end), self.deadline);
        tokio::spawn(async move {
            // The semaphore is never closed; if it were, judging would merely be unbounded.
            let permit = judging.acquire_owned().await;
            if !completions.is_closed() {
                let completion = judge.complete(sample, finish).await;
                drop(permit);
                send(&completions, completion, deadline).await;
            }
            drop(at_end);
        });
    }
}

/// Waits for the client to take what came before, up to the deadline. A client that is gone or late gets nothing.
async fn send(
    completions: &mpsc::Sender<Result<Completion, GeneratorError>>,
    completion: Result<Completion, GeneratorError>,
    deadline: Instant,
) {
    match tokio::time::timeout_at(deadline.into(), completions.send(completion)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => tracing::debug!("the client of a finished completion has gone"),
        Err(_) => tracing::debug!("a finished completion was not taken before its deadline"),
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
        let rewards = match finish {
            FinishReason::Aborted => Vec::new(),
            _ => self.judge(text.clone(), sample.token_ids.len(), finish != FinishReason::Stop).await,
        };
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

    async fn judge(self: &Arc<Self>, text: String, num_tokens: usize, is_truncated: bool) -> Vec<Reward> {
        if self.rewards.is_empty() {
            return Vec::new();
        }
        let judge = Arc::clone(self);
        let outcomes = tokio::task::spawn_blocking(move || {
            let answer = Answer { text: &text, num_tokens, is_truncated };
            judge.rewards.iter().map(|function| function.score(&answer, &judge.columns)).collect()
        });
        let outcomes: Vec<Outcome> = match tokio::time::timeout(JUDGE_DEADLINE, outcomes).await {
            Ok(Ok(outcomes)) => outcomes,
            Ok(Err(_)) => vec![Outcome::Crash; self.rewards.len()],
            Err(_) => vec![Outcome::Timeout; self.rewards.len()],
        };
        let reward = |(function, outcome): (&RewardFunction, Outcome)| Reward::new(function.name(), outcome);
        self.rewards.iter().zip(outcomes).map(reward).collect()
    }
}

fn internal(error: impl std::error::Error) -> GeneratorError {
    GeneratorError::Internal(error.to_string())
}
