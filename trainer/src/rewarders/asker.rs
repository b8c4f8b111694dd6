//! One rewarder: tries and deadlines of its batches, and what is known of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aha_core::reward::{ExternalJudge, ExternalOptions, ExternalReward, Outcome};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::Logs;
use super::alarm::Alarm;
use super::command::Command;
use super::failure::{Failure, FailureKind, Verdict};
use super::question::Question;
use super::service::Service;
use super::standing::{Admission, Standing};
use crate::clients::seconds;

/// Between two tries; doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Characters of a message of theirs that are shown.
const MAX_REASON_CHARS: usize = 500;

#[derive(Debug)]
pub(super) struct Asker {
    name: String,
    /// Who is asked, for people.
    asked: String,
    judge: Judge,
    options: ExternalOptions,
    /// One a batch in flight.
    slots: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum Judge {
    Service(Box<Service>),
    Command(Box<Command>),
}

#[derive(Debug, Default)]
struct State {
    standing: Standing,
    alarm: Alarm,
    last_failure: Option<String>,
}

impl Asker {
    /// Must be called within a runtime.
    pub(super) fn start(reward: &ExternalReward, logs: Option<&Logs>) -> Result<Self, String> {
        let (judge, num_slots) = match &reward.judge {
            ExternalJudge::Rewarder(address) => {
                let service = Service::new(&reward.name, address).map_err(|error| error.to_string())?;
                (Judge::Service(Box::new(service)), reward.options.max_in_flight)
            }
            ExternalJudge::Command(command) => {
                let log = logs.map(|Logs { folder, rank }| folder.join(format!("reward-{}-{rank}.log", reward.name)));
                let failed = |error| format!("cannot start {}: {error}", reward.asked());
                (Judge::Command(Box::new(Command::start(command, log).map_err(failed)?)), 1)
            }
        };
        Ok(Self {
            name: reward.name.clone(),
            asked: reward.asked(),
            judge,
            options: reward.options.clone(),
            slots: Arc::new(Semaphore::new(num_slots)),
            state: Mutex::new(State::default()),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn max_batch_size(&self) -> usize {
        self.options.max_batch_size
    }

    /// Waits until one more batch may be asked.
    pub(super) async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.slots).acquire_owned().await.ok()
    }

    pub(super) fn last_failure(&self) -> Option<String> {
        let failure = self.state().last_failure.clone();
        failure.map(|failure| format!("reward {} ({}): {failure}", self.name, self.asked))
    }

    /// One for each question, in time for `deadline`.
    pub(super) async fn outcomes(&self, questions: &[Question], deadline: Instant) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        while let Some(rest) = questions.get(outcomes.len()..).filter(|rest| !rest.is_empty()) {
            let num_fitting = self.num_that_fit(rest);
            outcomes.extend(if num_fitting > 0 {
                self.batch_outcomes(&rest[..num_fitting], deadline).await
            } else {
                let reason = format!("{} bytes are over max_message_bytes", rest[0].num_bytes());
                self.leave_out(&reason, Outcome::Crash, 1)
            });
        }
        outcomes
    }

    /// How many of the first questions a message has room for.
    fn num_that_fit(&self, questions: &[Question]) -> usize {
        let mut room = self.options.max_message_bytes;
        let fits = |question: &&Question| {
            let rest = room.checked_sub(question.num_bytes());
            room = rest.unwrap_or_default();
            rest.is_some()
        };
        questions.iter().take_while(fits).count()
    }

    async fn batch_outcomes(&self, questions: &[Question], deadline: Instant) -> Vec<Outcome> {
        let num_questions = questions.len();
        if Instant::now() >= deadline {
            let reason = format!(
                "their turn did not come in {} s; it is too slow, or deadline_seconds too short",
                self.options.deadline_seconds
            );
            return self.leave_out(&reason, Outcome::Timeout, num_questions);
        }
        let admission = self.state().standing.admit(Instant::now());
        let verdicts = match admission {
            Admission::Refuse(outcome) => return vec![outcome; num_questions],
            Admission::Ask => self.tries(questions, self.options.max_retries, deadline).await,
            Admission::Probe => match self.probe().await {
                Ok(()) => self.tries(questions, 0, deadline).await,
                Err(failure) => Err(failure),
            },
        };
        match verdicts {
            Ok(verdicts) => self.answered(verdicts),
            Err(failure) => self.failed(&failure, num_questions),
        }
    }

    async fn probe(&self) -> Result<(), Failure> {
        match &self.judge {
            Judge::Service(service) => service.probe().await.inspect_err(|_| service.disconnect()),
            // It is started again to be asked.
            Judge::Command(_) => Ok(()),
        }
    }

    async fn tries(
        &self,
        questions: &[Question],
        max_retries: u32,
        deadline: Instant,
    ) -> Result<Vec<Verdict>, Failure> {
        let (mut num_tries, mut pause) = (0, FIRST_PAUSE);
        loop {
            let failure = match self.one_try(questions, deadline).await {
                Ok(verdicts) => return Ok(verdicts),
                Err(failure) => failure,
            };
            num_tries += 1;
            let is_final = failure.kind == FailureKind::Lied || num_tries > max_retries;
            if is_final || Instant::now() + pause >= deadline || self.state().standing.is_down() {
                return Err(failure);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn one_try(&self, questions: &[Question], deadline: Instant) -> Result<Vec<Verdict>, Failure> {
        let mut timeout = seconds(self.options.timeout_seconds);
        if let Judge::Command(command) = &self.judge
            && !command.is_ready()
        {
            timeout += seconds(self.options.start_seconds);
        }
        let started = Instant::now();
        let limit = deadline.min(started + timeout);
        let answer = timeout_at(limit, async {
            match &self.judge {
                Judge::Service(service) => service.ask(questions, limit).await,
                Judge::Command(command) => command.ask(questions).await,
            }
        });
        let late = |_| Err(Failure::late(format!("no answer in {:.1} s", started.elapsed().as_secs_f64())));
        let answer = answer.await.unwrap_or_else(late);
        if let (Judge::Service(service), Err(failure)) = (&self.judge, &answer)
            && failure.is_down()
        {
            service.disconnect();
        }
        answer
    }

    /// What its verdicts come to.
    fn answered(&self, verdicts: Vec<Verdict>) -> Vec<Outcome> {
        self.is_there();
        let checked: Vec<Verdict> = verdicts.into_iter().map(|verdict| self.checked(verdict?)).collect();
        let problems: Vec<&String> = checked.iter().filter_map(|verdict| verdict.as_ref().err()).collect();
        if let Some(first) = problems.first() {
            self.leave_out(first, Outcome::Crash, problems.len());
        }
        checked.into_iter().map(|verdict| verdict.unwrap_or(Outcome::Crash)).collect()
    }

    fn checked(&self, outcome: Outcome) -> Verdict {
        match (outcome, self.options.range) {
            (Outcome::Score(score), _) if !score.is_finite() => Err(format!("score {score} is not finite")),
            (Outcome::Score(score), Some([low, high])) if !(low..=high).contains(&score) => {
                Err(format!("score {score} is not in its range, {low} to {high}"))
            }
            _ => Ok(outcome),
        }
    }

    fn failed(&self, failure: &Failure, num_questions: usize) -> Vec<Outcome> {
        let outcome = failure.outcome();
        if failure.is_down() {
            let mut state = self.state();
            if !state.standing.is_down() {
                tracing::warn!("reward {} ({}) is down until it answers: {}", self.name, self.asked, failure.reason);
            }
            state.standing.failed(outcome, Instant::now());
        } else {
            self.is_there();
        }
        self.leave_out(&failure.reason, outcome, num_questions)
    }

    fn is_there(&self) {
        if self.state().standing.answered() {
            tracing::info!("reward {} ({}) answers again", self.name, self.asked);
        }
    }

    fn leave_out(&self, reason: &str, outcome: Outcome, num_completions: usize) -> Vec<Outcome> {
        let reason: String = reason.chars().take(MAX_REASON_CHARS).collect();
        let mut state = self.state();
        if let Some(num_before) = state.alarm.ring(Instant::now()) {
            tracing::warn!(
                "reward {} ({}): {num_completions} completions without a verdict ({}): {reason}; {num_before} such \
                 batches were not reported before",
                self.name,
                self.asked,
                outcome.name()
            );
        }
        state.last_failure = Some(reason);
        vec![outcome; num_completions]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
