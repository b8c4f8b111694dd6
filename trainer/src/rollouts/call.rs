//! Filling one ledger over gRPC.
//!
//! Every prompt is one streaming call to the generator that owes the least. What a lost call still owed is asked for
//! again, of another generator where there is one: as the policy is the same, equal seed and sample index give equal
//! completions, so what has arrived stays, and nothing is counted twice. A generator whose call was lost is asked last from
//! then on, and one that serves another policy no more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use aha_core::ids::PromptId;
use aha_core::random::derive_seed;
use aha_core::rollout::{Completion, Prompt};
use aha_proto::BadMessage;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::membership::{Debt, Member};
use super::pool::{Progress, Shared};
use super::receipt::{Receipt, Refusal, Taken, Versions};
use super::{Late, Ledger, RolloutError};
use crate::clients::{Client, describe, is_passing, with_timeout};

/// Tries for one prompt. With the pauses between them, time for a generator to be started again.
const MAX_ATTEMPTS: u32 = 12;

/// Tries that end at half of the time that is left.
const IMPATIENT_ATTEMPTS: u32 = 2;

/// What a generator's deadline has over ours, so that ours is the one that is noticed.
const GRACE: Duration = Duration::from_secs(1);

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

pub(super) struct Call {
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    num_done: AtomicUsize,
    /// For one prompt no generator was left, so that others are not begun.
    is_given_up: AtomicBool,
}

/// Why an attempt ended before the group was complete.
enum Failure {
    /// Another attempt may succeed.
    Passing(String),
    /// Another generator may.
    Stale(RolloutError),
    Final(RolloutError),
}

impl Call {
    pub(super) fn new(shared: &Arc<Shared>, ledger: &Arc<Ledger>) -> Self {
        let (num_done, is_given_up) = (AtomicUsize::new(ledger.num_received()), AtomicBool::new(false));
        Self { shared: Arc::clone(shared), ledger: Arc::clone(ledger), num_done, is_given_up }
    }

    /// Stops at once for what no generator can mend, and else when all that can be had in time is there.
    pub(super) async fn run(&self) -> Result<Vec<Late>, RolloutError> {
        let mut groups: FuturesUnordered<_> =
            self.ledger.places().map(|(prompt, receipt)| self.complete(prompt, receipt)).collect();
        let (mut late, mut want) = (Vec::new(), None);
        while let Some(outcome) = groups.next().await {
            match outcome {
                Ok(group) => late.extend(group),
                Err(error) if error.is_want_of_generators() => {
                    self.is_given_up.store(true, Ordering::Relaxed);
                    want.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        want.map_or(Ok(late), Err)
    }

    async fn complete(&self, prompt: &Prompt, receipt: &Receipt) -> Result<Option<Late>, RolloutError> {
        let (started, deadline) = (self.ledger.started, self.ledger.deadline);
        let mut last: Option<Arc<Member>> = None;
        for attempt in 1.. {
            if receipt.missing().is_empty() || self.is_given_up.load(Ordering::Relaxed) {
                break;
            }
            let membership = self.shared.membership();
            let slot = timeout_at(deadline, membership.slots.acquire()).await;
            let member = Arc::clone(membership.choose(prompt, last.as_ref()).ok_or(RolloutError::NoGenerators)?);
            // Where there are others, a slow one has half of the time.
            let has_time = attempt > IMPATIENT_ATTEMPTS || membership.members.len() == 1;
            let limit = if has_time { deadline } else { halfway(deadline) };
            let outcome = timeout_at(limit, self.attempt(&member, prompt, receipt)).await;
            drop(slot);
            member.is_suspect.store(!matches!(outcome, Ok(Ok(()))), Ordering::Relaxed);
            let (missing, expected) = (receipt.missing().len(), self.ledger.request.num_generations);
            let (generator, waited) = (member.client.address().to_owned(), started.elapsed());
            let reason = match outcome {
                Ok(Ok(())) if missing == 0 => break,
                Ok(Ok(())) => format!("it ended the call with {missing} completions to go"),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Stale(error))) => {
                    member.is_stale.store(true, Ordering::Relaxed);
                    if membership.are_all_stale() {
                        return Err(error);
                    }
                    error.to_string()
                }
                Ok(Err(Failure::Passing(reason))) => reason,
                Err(_) => format!("nothing more came in {:.1} s", waited.as_secs_f64()),
            };
            let prompt = prompt.id;
            if Instant::now() >= deadline {
                return Ok(Some(Late { generator, prompt, missing, expected, waited }));
            }
            if attempt == MAX_ATTEMPTS {
                let attempts = attempt;
                return Err(RolloutError::Failed { generator, prompt, missing, expected, attempts, waited, reason });
            }
            tracing::warn!("{prompt}: generator {generator} failed, asking again for {missing} completions: {reason}");
            last = Some(member);
            tokio::time::sleep_until(deadline.min(Instant::now() + pause(prompt, attempt))).await;
        }
        if receipt.missing().is_empty() {
            self.judge(prompt, receipt).await;
        }
        Ok(None)
    }

    /// Has the rewarders judge a group that is complete.
    async fn judge(&self, prompt: &Prompt, receipt: &Receipt) {
        let mut completions: Vec<Completion> = receipt.completions().iter().flatten().cloned().collect();
        self.shared.rewarders.judge(prompt, &self.ledger.request.rewards, &mut completions).await;
        for (place, completion) in receipt.completions().iter_mut().zip(completions) {
            *place = Some(completion);
        }
    }

    /// One call for what is missing; takes in what arrives.
    async fn attempt(&self, member: &Member, prompt: &Prompt, receipt: &Receipt) -> Result<(), Failure> {
        let client = &member.client;
        let missing = receipt.missing();
        let mut debt = Debt::new(member, missing.len());
        let message = self.ledger.request.message(prompt, missing, self.shared.request_id());
        let rest = self.ledger.deadline.saturating_duration_since(Instant::now()) + GRACE;
        let failed = |status| failure(client, prompt, &status);
        let response = client.rpc().generate(with_timeout(message, rest)).await.map_err(failed)?;
        let mut completions = response.into_inner();
        while debt.owed > 0 {
            let Some(completion) = completions.message().await.map_err(failed)? else { break };
            let versions = self.versions();
            let taken = Completion::try_from(completion)
                .map_err(|error: BadMessage| Refusal::Malformed(error.to_string()))
                .and_then(|completion| receipt.take(completion, prompt, &self.ledger.request, &versions))
                .map_err(|refusal| refused(refusal, client, prompt, versions))?;
            if taken == Taken::New {
                debt.pay();
                self.count();
            }
        }
        Ok(())
    }

    /// Of a moment: what is newest changes while completions come.
    fn versions(&self) -> Versions {
        self.ledger.request.min_version..=self.shared.newest()
    }

    fn count(&self) {
        let done = self.num_done.fetch_add(1, Ordering::Relaxed) + 1;
        let total = self.ledger.request.prompts.len() * self.ledger.request.num_generations;
        self.shared.report(Progress { done, total });
    }
}

fn failure(client: &Client, prompt: &Prompt, status: &Status) -> Failure {
    let reason = describe(status);
    if is_passing(status.code()) {
        return Failure::Passing(reason);
    }
    Failure::Final(RolloutError::Refused { generator: client.address().to_owned(), prompt: prompt.id, reason })
}

fn refused(refusal: Refusal, client: &Client, prompt: &Prompt, versions: Versions) -> Failure {
    let (generator, prompt) = (client.address().to_owned(), prompt.id);
    match refusal {
        Refusal::WrongVersion(got) => {
            let (oldest, newest) = versions.into_inner();
            Failure::Stale(RolloutError::WrongVersion { generator, prompt, oldest, newest, got })
        }
        Refusal::Malformed(problem) => Failure::Final(RolloutError::BadCompletion { generator, prompt, problem }),
    }
}

fn halfway(deadline: Instant) -> Instant {
    let now = Instant::now();
    now + deadline.saturating_duration_since(now) / 2
}

/// Doubles with every attempt; half of it depends on the prompt, so that not all come back at once.
fn pause(prompt: PromptId, attempt: u32) -> Duration {
    let pause = (FIRST_PAUSE * 2_u32.saturating_pow(attempt - 1).min(1 << 10)).min(LONGEST_PAUSE);
    let share = derive_seed(prompt.0, &[u64::from(attempt)]) as f64 / u64::MAX as f64;
    pause.mul_f64(0.5 + share / 2.0)
}
