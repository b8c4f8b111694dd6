//! Rollouts over gRPC: the generators as one pool.
//!
//! Every prompt is one streaming call to the generator that owes the least. What a lost call still owed is asked for
//! again, of another generator where there is one: equal seed and sample index give equal completions, so what has
//! arrived stays, and nothing is counted twice. A generator whose call was lost is asked last from then on, and one that
//! serves another policy no more.

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
use futures::{StreamExt, stream};
use tokio::runtime::Runtime;
use tokio::time::Instant;
use tonic::Status;

use super::receipt::{Receipt, Refusal, Taken};
use super::{Ledger, RolloutError, RolloutRequest, Rollouts};
use crate::clients::{Client, Connector, describe, is_passing, seconds, with_timeout};

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
    pub fn connect(config: &RunConfig, connector: &Connector, runtime: Arc<Runtime>) -> Result<Self, RolloutError> {
        let addresses = &config.generator.addresses;
        if addresses.is_empty() && config.generator.coordinator.is_none() {
            return Err(RolloutError::NoGenerators);
        }
        let timeout = seconds(config.generator.connect_timeout_seconds);
        let connecting = addresses.iter().map(|address| connector.connect(address, timeout));
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

    /// The generators that are asked, at first in the order of `generator.addresses`.
    #[must_use]
    pub fn clients(&self) -> &[Client] {
        &self.clients
    }

    /// Asks others from now on.
    pub fn set_clients(&mut self, clients: Vec<Client>) {
        self.clients = clients;
    }

    /// Asks for what is missing until nothing is.
    ///
    /// # Errors
    /// As [`Rollouts::roll_out`]; what has arrived stays in the ledger.
    pub fn fill(&mut self, ledger: &mut Ledger<'_>) -> Result<(), RolloutError> {
        if self.clients.is_empty() {
            return Err(RolloutError::NoGenerators);
        }
        let call = Call {
            request: ledger.request,
            clients: &self.clients,
            standing: self.clients.iter().map(|_| Standing::default()).collect(),
            started: ledger.started,
            deadline: ledger.started + self.deadline,
            num_done: Cell::new(ledger.num_received()),
            is_given_up: Cell::new(false),
            on_progress: RefCell::new(&mut self.on_progress),
            client_id: self.client_id,
            num_requests: &self.num_requests,
        };
        self.runtime.block_on(call.run(ledger))
    }
}

impl Rollouts for GeneratorPool {
    fn roll_out(&mut self, request: &RolloutRequest) -> Result<Vec<Group>, RolloutError> {
        let mut ledger = Ledger::new(request);
        self.fill(&mut ledger)?;
        Ok(ledger.into_groups().expect("it was filled"))
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

/// What a call knows of a generator.
#[derive(Debug, Default)]
struct Standing {
    /// Completions that it has been asked for and has not sent.
    owed: Cell<usize>,
    /// A call to it was lost, and none has succeeded since.
    is_suspect: Cell<bool>,
    /// It serves another policy.
    is_stale: Cell<bool>,
}

/// One call to [`GeneratorPool::fill`]: a single future, whose parts take turns on one thread.
struct Call<'a> {
    request: &'a RolloutRequest,
    clients: &'a [Client],
    /// By client.
    standing: Vec<Standing>,
    started: Instant,
    deadline: Instant,
    num_done: Cell<usize>,
    /// For one prompt no generator was left, so that others are not begun.
    is_given_up: Cell<bool>,
    on_progress: RefCell<&'a mut (dyn FnMut(Progress) + Send)>,
    client_id: u64,
    num_requests: &'a Cell<u64>,
}

/// Why an attempt ended before the group was complete.
enum Failure {
    /// Another attempt may succeed.
    Passing(String),
    /// Another generator may.
    Stale(RolloutError),
    Final(RolloutError),
}

impl Call<'_> {
    /// Stops at once for what no generator can mend, and else when all that can be had is there.
    async fn run(&self, ledger: &mut Ledger<'_>) -> Result<(), RolloutError> {
        let limit = MAX_IN_FLIGHT * self.clients.len();
        let groups = ledger.receipts.iter_mut().map(|receipt| self.complete(receipt));
        let mut groups = stream::iter(groups).buffer_unordered(limit);
        let mut want = None;
        while let Some(outcome) = groups.next().await {
            match outcome {
                Ok(()) => {}
                Err(error) if error.is_want_of_generators() => {
                    self.is_given_up.set(true);
                    want.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        want.map_or(Ok(()), Err)
    }

    async fn complete(&self, receipt: &mut Receipt<'_>) -> Result<(), RolloutError> {
        let mut last = None;
        for attempt in 1.. {
            if receipt.missing().is_empty() || self.is_given_up.get() {
                break;
            }
            let client_idx = self.choose(receipt.prompt(), last);
            let outcome = tokio::time::timeout_at(self.deadline, self.attempt(client_idx, receipt)).await;
            let (missing, expected) = (receipt.missing().len(), self.request.num_generations);
            let (generator, waited) = (self.clients[client_idx].address().to_owned(), self.started.elapsed());
            let standing = &self.standing[client_idx];
            standing.is_suspect.set(!matches!(outcome, Ok(Ok(()))));
            let reason = match outcome {
                Ok(Ok(())) if missing == 0 => break,
                Ok(Ok(())) => format!("it ended the call with {missing} completions to go"),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Stale(error))) => {
                    standing.is_stale.set(true);
                    if self.standing.iter().all(|standing| standing.is_stale.get()) {
                        return Err(error);
                    }
                    error.to_string()
                }
                Ok(Err(Failure::Passing(reason))) => reason,
                Err(_) => String::new(),
            };
            let prompt = receipt.prompt().id;
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
        Ok(())
    }

    /// The generator that owes the least of those in good standing, another one than `last` where there is one. Prompts go
    /// around those that owe the same.
    fn choose(&self, prompt: &Prompt, last: Option<usize>) -> usize {
        let num_clients = self.clients.len();
        let turn = |index: usize| (index + num_clients - (prompt.id.0 % num_clients as u64) as usize) % num_clients;
        let rank = |&index: &usize| {
            let Standing { owed, is_suspect, is_stale } = &self.standing[index];
            (is_stale.get(), is_suspect.get(), last == Some(index), owed.get(), turn(index))
        };
        (0..num_clients).min_by_key(rank).expect("a pool has at least one generator")
    }

    /// One call for what is missing; takes in what arrives.
    async fn attempt(&self, client_idx: usize, receipt: &mut Receipt<'_>) -> Result<(), Failure> {
        let client = &self.clients[client_idx];
        let prompt = receipt.prompt();
        let missing = receipt.missing();
        let mut debt = Debt::new(&self.standing[client_idx].owed, missing.len());
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
                .map_err(|refusal| refused(refusal, client, prompt, self.request))?;
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

fn refused(refusal: Refusal, client: &Client, prompt: &Prompt, request: &RolloutRequest) -> Failure {
    let (generator, prompt, expected) = (client.address().to_owned(), prompt.id, request.version);
    match refusal {
        Refusal::WrongVersion(got) => Failure::Stale(RolloutError::WrongVersion { generator, prompt, expected, got }),
        Refusal::Malformed(problem) => Failure::Final(RolloutError::BadCompletion { generator, prompt, problem }),
    }
}

/// Doubles with every attempt; half of it depends on the prompt, so that not all come back at once.
fn pause(prompt_id: u64, attempt: u32) -> Duration {
    let pause = (FIRST_PAUSE * 2_u32.saturating_pow(attempt - 1).min(1 << 10)).min(LONGEST_PAUSE);
    let share = derive_seed(prompt_id, &[u64::from(attempt)]) as f64 / u64::MAX as f64;
    pause.mul_f64(0.5 + share / 2.0)
}
