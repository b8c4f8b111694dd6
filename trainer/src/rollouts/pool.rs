//! Rollouts over gRPC: the generators as one pool.
//!
//! Every prompt is one streaming call to the generator that owes the least. What a lost call still owed is asked for
//! again, of another generator where there is one: equal seed and sample index give equal completions, so what has
//! arrived stays, and nothing is counted twice.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use aha_core::config::RunConfig;
use aha_core::random::derive_seed;
use aha_core::rollout::{Completion, Group, Prompt};
use aha_proto::{BadMessage, v1};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::runtime::Runtime;
use tokio::time::Instant;
use tonic::Status;

use super::receipt::{Receipt, Refusal, Taken};
use super::{RolloutError, RolloutRequest, Rollouts};
use crate::clients::{Client, describe, is_passing, seconds, with_timeout};

/// Prompts in flight for each generator: more than one batch of any engine, few enough to keep its queue short.
const MAX_IN_FLIGHT: usize = 256;

/// Tries for one prompt. With the pauses between them, time for a generator to be started again.
const MAX_ATTEMPTS: u32 = 12;

/// What a generator's deadline has over ours, so that ours is the one that is noticed.
const GRACE: Duration = Duration::from_secs(1);

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The generators of a run.
pub struct GeneratorPool {
    runtime: Arc<Runtime>,
    clients: Vec<Client>,
    deadline: Duration,
    on_progress: Box<dyn FnMut(Progress) + Send>,
    /// Tells this client's requests from those of others, and one from the next.
    client_id: u64,
    num_requests: Cell<u64>,
}

/// How far a call to [`Rollouts::roll_out`] has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Completions that have arrived.
    pub done: usize,
    pub total: usize,
}

impl GeneratorPool {
    /// Connects to `generator.addresses` and waits until all of them answer.
    ///
    /// # Errors
    /// Names the first address that is none, or that did not answer in time.
    pub fn connect(config: &RunConfig, runtime: Arc<Runtime>) -> Result<Self, RolloutError> {
        let addresses = &config.generator.addresses;
        if addresses.is_empty() {
            return Err(RolloutError::NoGenerators);
        }
        let timeout = seconds(config.generator.connect_timeout_seconds);
        let connecting = addresses.iter().map(|address| Client::connect(address, timeout));
        let clients = runtime.block_on(futures::future::try_join_all(connecting))?;
        let deadline = seconds(config.rollout.deadline_seconds);
        let client_id = RandomState::new().build_hasher().finish();
        let on_progress = Box::new(|_| {});
        Ok(Self { runtime, clients, deadline, on_progress, client_id, num_requests: Cell::new(0) })
    }

    /// Calls `on_progress` with every completion that arrives.
    pub fn set_on_progress(&mut self, on_progress: impl FnMut(Progress) + Send + 'static) {
        self.on_progress = Box::new(on_progress);
    }

    /// The generators, in the order of `generator.addresses`.
    #[must_use]
    pub fn clients(&self) -> Vec<Client> {
        self.clients.clone()
    }
}

impl Rollouts for GeneratorPool {
    fn roll_out(&mut self, request: &RolloutRequest) -> Result<Vec<Group>, RolloutError> {
        let started = Instant::now();
        let call = Call {
            request,
            clients: &self.clients,
            owed: vec![Cell::new(0); self.clients.len()],
            started,
            deadline: started + self.deadline,
            num_done: Cell::new(0),
            on_progress: RefCell::new(&mut self.on_progress),
            client_id: self.client_id,
            num_requests: &self.num_requests,
        };
        self.runtime.block_on(call.run())
    }
}

impl fmt::Debug for GeneratorPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GeneratorPool")
            .field("clients", &self.clients)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// One call to [`Rollouts::roll_out`]: a single future, whose parts take turns on one thread.
struct Call<'a> {
    request: &'a RolloutRequest,
    clients: &'a [Client],
    /// Completions that each generator has been asked for and has not sent.
    owed: Vec<Cell<usize>>,
    started: Instant,
    deadline: Instant,
    num_done: Cell<usize>,
    on_progress: RefCell<&'a mut (dyn FnMut(Progress) + Send)>,
    client_id: u64,
    num_requests: &'a Cell<u64>,
}

/// Why an attempt ended before the group was complete.
enum Failure {
    /// Another attempt may succeed.
    Passing(String),
    Final(RolloutError),
}

impl Call<'_> {
    async fn run(&self) -> Result<Vec<Group>, RolloutError> {
        let groups =
            self.request.prompts.iter().enumerate().map(|(index, prompt)| async move {
                Ok::<_, RolloutError>((index, self.roll_out_group(prompt).await?))
            });
        let limit = MAX_IN_FLIGHT * self.clients.len();
        let mut groups: Vec<_> = stream::iter(groups).buffer_unordered(limit).try_collect().await?;
        groups.sort_by_key(|(index, _)| *index);
        Ok(groups.into_iter().map(|(_, group)| group).collect())
    }

    async fn roll_out_group(&self, prompt: &Prompt) -> Result<Group, RolloutError> {
        let mut receipt = Receipt::new(self.request, prompt);
        let mut last = None;
        for attempt in 1.. {
            let missing = receipt.missing();
            if missing.is_empty() {
                break;
            }
            let client_idx = self.choose(prompt, last);
            let outcome = tokio::time::timeout_at(self.deadline, self.attempt(client_idx, &mut receipt)).await;
            let (missing, expected) = (receipt.missing().len(), self.request.num_generations);
            let (generator, waited) = (self.clients[client_idx].address().to_owned(), self.started.elapsed());
            let reason = match outcome {
                Ok(Ok(())) if missing == 0 => break,
                Ok(Ok(())) => format!("it ended the call with {missing} completions to go"),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Passing(reason))) => reason,
                Err(_) => String::new(),
            };
            let prompt = prompt.id;
            if Instant::now() >= self.deadline {
                return Err(RolloutError::Deadline { generator, prompt, missing, expected, waited });
            }
            if attempt == MAX_ATTEMPTS {
                let attempts = attempt;
                return Err(RolloutError::Failed { generator, prompt, missing, expected, attempts, waited, reason });
            }
            tracing::warn!("{prompt}: generator {generator} failed, asking again for {missing} completions: {reason}");
            last = Some(client_idx);
            tokio::time::sleep_until(self.deadline.min(Instant::now() + pause(prompt.0, attempt))).await;
        }
        Ok(receipt.into_group().expect("the loop ends when nothing is missing"))
    }

    /// The generator that owes the least, another one than `last` where there is one. Prompts go around those that owe
    /// the same.
    fn choose(&self, prompt: &Prompt, last: Option<usize>) -> usize {
        let num_clients = self.clients.len();
        let turn = |index: usize| (index + num_clients - (prompt.id.0 % num_clients as u64) as usize) % num_clients;
        (0..num_clients)
            .min_by_key(|&index| (last == Some(index), self.owed[index].get(), turn(index)))
            .expect("a pool has at least one generator")
    }

    /// One call for what is missing; takes in what arrives.
    async fn attempt(&self, client_idx: usize, receipt: &mut Receipt<'_>) -> Result<(), Failure> {
        let client = &self.clients[client_idx];
        let prompt = receipt.prompt();
        let missing = receipt.missing();
        let mut debt = Debt::new(&self.owed[client_idx], missing.len());
        let message = self.message(prompt, missing);
        let rest = self.deadline.saturating_duration_since(Instant::now()) + GRACE;
        let failed = |status| failure(client, prompt, &status);
        let response = client.rpc().generate(with_timeout(message, rest)).await.map_err(failed)?;
        let mut completions = response.into_inner();
        while debt.owed > 0 {
            let Some(completion) = completions.message().await.map_err(failed)? else { break };
            let taken = Completion::try_from(completion)
                .map_err(|error: BadMessage| Refusal::Malformed(error.to_string()))
                .and_then(|completion| receipt.take(completion))
                .map_err(|refusal| Failure::Final(refused(refusal, client, prompt, self.request)))?;
            if taken == Taken::New {
                debt.pay();
                self.count();
            }
        }
        Ok(())
    }

    fn message(&self, prompt: &Prompt, missing: Vec<u32>) -> v1::GenerateRequest {
        let number = self.num_requests.get();
        self.num_requests.set(number + 1);
        v1::GenerateRequest {
            request_id: format!("{:016x}-{number}", self.client_id),
            prompt_id: prompt.id.0,
            token_ids: prompt.token_ids.clone(),
            sample_indices: missing,
            sampling: Some((&self.request.sampling).into()),
            seed: derive_seed(self.request.seed, &[prompt.id.0]),
            rewards: self.request.rewards.clone(),
            columns: serde_json::Value::Object(prompt.columns.clone()).to_string(),
        }
    }

    fn count(&self) {
        let done = self.num_done.get() + 1;
        self.num_done.set(done);
        let total = self.request.prompts.len() * self.request.num_generations;
        (self.on_progress.borrow_mut())(Progress { done, total });
    }
}

/// What one attempt still waits for, counted in its generator's debts while it does.
struct Debt<'a> {
    of_client: &'a Cell<usize>,
    owed: usize,
}

impl<'a> Debt<'a> {
    fn new(of_client: &'a Cell<usize>, owed: usize) -> Self {
        of_client.set(of_client.get() + owed);
        Self { of_client, owed }
    }

    fn pay(&mut self) {
        self.owed -= 1;
        self.of_client.set(self.of_client.get() - 1);
    }
}

impl Drop for Debt<'_> {
    fn drop(&mut self) {
        self.of_client.set(self.of_client.get() - self.owed);
    }
}

fn failure(client: &Client, prompt: &Prompt, status: &Status) -> Failure {
    let reason = describe(status);
    if is_passing(status.code()) {
        return Failure::Passing(reason);
    }
    Failure::Final(RolloutError::Refused { generator: client.address().to_owned(), prompt: prompt.id, reason })
}

fn refused(refusal: Refusal, client: &Client, prompt: &Prompt, request: &RolloutRequest) -> RolloutError {
    let (generator, prompt) = (client.address().to_owned(), prompt.id);
    match refusal {
        Refusal::WrongVersion(got) => RolloutError::WrongVersion { generator, prompt, expected: request.version, got },
        Refusal::Malformed(problem) => RolloutError::BadCompletion { generator, prompt, problem },
    }
}

/// Doubles with every attempt; half of it depends on the prompt, so that not all come back at once.
fn pause(prompt_id: u64, attempt: u32) -> Duration {
    let pause = (FIRST_PAUSE * 2_u32.saturating_pow(attempt - 1).min(1 << 10)).min(LONGEST_PAUSE);
    let share = derive_seed(prompt_id, &[u64::from(attempt)]) as f64 / u64::MAX as f64;
    pause.mul_f64(0.5 + share / 2.0)
}
