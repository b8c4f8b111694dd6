//! Asking a service: `aha.v1.Rewarder` over gRPC.

use std::error::Error;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aha_core::config::Credentials;
use aha_core::reward::Outcome;
use aha_proto::caller::{CallerError, endpoint};
use aha_proto::v1;
use aha_proto::v1::rewarder_client::RewarderClient;
use aha_proto::v1::score_result;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::failure::{Failure, Verdict};
use super::question::Question;
use crate::clients::{describe, is_passing, with_timeout};

const NAME: &str = "aha.v1.Rewarder";
/// For a connection, and for an answer of its health service.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// What a call's deadline has over ours, so that ours is the one that is noticed.
const GRACE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Service {
    /// The reward's name.
    reward: String,
    endpoint: Endpoint,
    /// Made when it is needed, and anew after a failure: one that has died without a word is not waited for.
    channel: Mutex<Option<Channel>>,
}

impl Service {
    /// Calls go without TLS and token: these belong to the run, and this is another service.
    pub(super) fn new(reward: &str, address: &str) -> Result<Self, CallerError> {
        let endpoint = endpoint(address, &Credentials::default())?.connect_timeout(PROBE_TIMEOUT);
        Ok(Self { reward: reward.to_owned(), endpoint, channel: Mutex::new(None) })
    }

    pub(super) async fn ask(&self, questions: &[Question], limit: Instant) -> Result<Vec<Verdict>, Failure> {
        let items = questions.iter().map(Question::message).collect();
        let request = v1::ScoreBatchRequest { reward: self.reward.clone(), items };
        let rest = limit.saturating_duration_since(Instant::now()) + GRACE;
        let response = RewarderClient::new(self.channel()).score(with_timeout(request, rest)).await;
        let results = response.map_err(|status| failure(&status))?.into_inner().results;
        if results.len() != questions.len() {
            return Err(Failure::lied(format!("{} results for {} completions", results.len(), questions.len())));
        }
        Ok(results.into_iter().map(verdict).collect())
    }

    /// Whether it is back. Without a health service, that somebody is there must do.
    pub(super) async fn probe(&self) -> Result<(), Failure> {
        let mut health = HealthClient::new(self.channel());
        let check = health.check(HealthCheckRequest { service: NAME.to_owned() });
        let answer = tokio::time::timeout(PROBE_TIMEOUT, check).await;
        match answer.map_err(|_| Failure::late("its health service does not answer"))? {
            Ok(answer) if answer.get_ref().status() == ServingStatus::Serving => Ok(()),
            Ok(answer) => Err(Failure::gone(format!("its health is {}", answer.get_ref().status().as_str_name()))),
            Err(status) if matches!(status.code(), Code::Unimplemented | Code::NotFound) => Ok(()),
            Err(status) => Err(failure(&status)),
        }
    }

    /// Connects anew next time.
    pub(super) fn disconnect(&self) {
        *self.lock() = None;
    }

    fn channel(&self) -> Channel {
        self.lock().get_or_insert_with(|| self.endpoint.connect_lazy()).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Channel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failure(status: &Status) -> Failure {
    let reason = describe(status);
    match status.code() {
        Code::DeadlineExceeded => Failure::late(reason),
        // What the service itself says comes without a cause.
        Code::Unavailable => Failure::gone(reason),
        code if status.source().is_some() && is_passing(code) => Failure::gone(reason),
        code if is_passing(code) => Failure::failed(reason),
        _ => Failure::lied(reason),
    }
}

fn verdict(result: v1::ScoreResult) -> Verdict {
    let message = || result.message.clone().unwrap_or_default();
    match result.verdict {
        Some(score_result::Verdict::Score(score)) => Ok(Outcome::Score(score)),
        Some(score_result::Verdict::Outcome(outcome)) => match v1::ScoreOutcome::try_from(outcome) {
            Ok(v1::ScoreOutcome::Wrong) => Ok(Outcome::Wrong),
            Ok(v1::ScoreOutcome::Unparsable) => Ok(Outcome::Unparsable),
            Ok(v1::ScoreOutcome::NoVerdict) => Err(format!("no verdict: {}", message())),
            _ => Err(format!("outcome {outcome} is none")),
        },
        None => Err(format!("neither score nor outcome: {}", message())),
    }
}
