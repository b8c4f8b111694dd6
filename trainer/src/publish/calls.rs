//! The calls of a push, each with its limit, and with an error that names the generator.

use std::time::Duration;

use aha_core::ids::PolicyVersion;
use aha_proto::v1;
use futures::future::try_join_all;
use futures::stream::{FuturesUnordered, StreamExt};

use super::PublishError;
use crate::clients::{Client, describe, with_timeout};

/// What the limit of a call has over the group's, and a generator's over ours: the one that knows more is to speak first.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// What the other generators may take to say how the push ended for them, when it has failed for one. More than
/// [`GRACE`]: a generator that hangs makes others fail first.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How a generator takes weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Receiver {
    /// UUID of its GPU; empty where it has none.
    pub(super) gpu: String,
    pub(super) dtype: v1::WeightType,
}

/// Refuses a generator whose weights are not laid out as `manifest_hash` says.
pub(super) async fn check_model(
    client: &Client,
    manifest_hash: u64,
    timeout: Duration,
) -> Result<Receiver, PublishError> {
    let call = async { client.rpc().status(with_timeout(v1::StatusRequest {}, timeout + GRACE)).await };
    let status = within(client, timeout, call).await?;
    if status.manifest_hash != manifest_hash {
        let problem = format!(
            "has another model: its weights have manifest {:016x}, and the trainer's {manifest_hash:016x}; start it with \
             the trainer's model.path",
            status.manifest_hash
        );
        return Err(PublishError::generator(client, problem));
    }
    Ok(Receiver { dtype: status.dtype(), gpu: status.gpu })
}

/// Asks a generator into the update group. Returns when all members are there.
pub(super) async fn invite(
    client: &Client,
    message: v1::JoinUpdateGroupRequest,
    timeout: Duration,
) -> Result<(), PublishError> {
    // A little longer than the group's own limit, whose message names every rank that is missing.
    let limit = timeout + GRACE;
    let call = async { client.rpc().join_update_group(with_timeout(message, limit + GRACE)).await };
    within(client, limit, call).await.map(drop)
}

/// Tells all generators to receive. `give_up` is called with the first failure, at once, and must end the push for all
/// others; those that say nothing even then are not waited for.
pub(super) async fn update_all(
    clients: &[Client],
    message: &v1::UpdateWeightsRequest,
    timeout: Duration,
    give_up: impl Fn(&str),
) -> Result<Vec<v1::UpdateWeightsResponse>, Vec<PublishError>> {
    let calls = clients.iter().map(|client| update(client, message.clone(), timeout));
    let mut calls: FuturesUnordered<_> = calls.collect();
    let (mut answers, mut failures) = (Vec::new(), Vec::new());
    // Until something fails, each call has its own limit.
    let mut patience = Duration::MAX;
    while let Ok(Some(answer)) = tokio::time::timeout(patience, calls.next()).await {
        match answer {
            Ok(answer) => answers.push(answer),
            Err(error) => {
                tracing::error!("weight push: {error}");
                if patience == Duration::MAX {
                    give_up(&error.to_string());
                    patience = LAST_WORDS;
                }
                failures.push(error);
            }
        }
    }
    if failures.is_empty() { Ok(answers) } else { Err(failures) }
}

/// Puts all generators to sleep, until [`wake_all`].
pub(super) async fn sleep_all(clients: &[Client], drop_weights: bool, timeout: Duration) -> Result<(), PublishError> {
    let message = v1::SleepRequest { drop_weights };
    let sleep = |client| async move {
        let call = async { Client::rpc(client).sleep(with_timeout(message, timeout + GRACE)).await };
        within(client, timeout, call).await
    };
    try_join_all(clients.iter().map(sleep)).await.map(drop)
}

/// Lets all generators go on; those that are awake do.
pub(super) async fn wake_all(clients: &[Client], timeout: Duration) -> Result<(), PublishError> {
    let wake = |client| async move {
        let call = async { Client::rpc(client).wake(with_timeout(v1::WakeRequest {}, timeout + GRACE)).await };
        within(client, timeout, call).await
    };
    try_join_all(clients.iter().map(wake)).await.map(drop)
}

async fn update(
    client: &Client,
    message: v1::UpdateWeightsRequest,
    timeout: Duration,
) -> Result<v1::UpdateWeightsResponse, PublishError> {
    let version = PolicyVersion(message.version);
    // A little longer than the group's own limit, after which a generator that is alive says what it missed.
    let limit = timeout + GRACE;
    let call = async { client.rpc().update_weights(with_timeout(message, limit + GRACE)).await };
    let answer = within(client, limit, call).await?;
    if answer.version != version.0 {
        let got = PolicyVersion(answer.version);
        let problem = format!("serves {got} after the push of {version}");
        return Err(PublishError::generator(client, problem));
    }
    Ok(answer)
}

async fn within<T>(
    client: &Client,
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, PublishError> {
    let problem = match tokio::time::timeout(limit, call).await {
        Ok(Ok(response)) => return Ok(response.into_inner()),
        Ok(Err(status)) => format!("failed: {}", describe(&status)),
        Err(_) => format!("has not answered for {:.1} s", limit.as_secs_f64()),
    };
    Err(PublishError::generator(client, problem))
}
