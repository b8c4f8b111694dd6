//! Which generators there are: what trainer rank 0 finds out for all ranks.

use std::time::{Duration, Instant};

use aha_core::ids::PolicyVersion;
use aha_proto::v1::StatusResponse;
use futures::future::join_all;

use super::coordinator::Registry;
use crate::clients::{Client, Connector};
use crate::publish::PublishError;

/// How long a generator that failed is left alone; doubles with every time in a row.
const FIRST_BAR: Duration = Duration::from_secs(2);
const LONGEST_BAR: Duration = Duration::from_secs(60);

/// While there is none, the pause between looks, and how often the other ranks hear of it.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
const A_LITTLE: Duration = Duration::from_secs(2);

/// The generators of the configuration, and those that have registered.
#[derive(Debug)]
pub(super) struct Roster {
    known: Vec<Known>,
    registry: Option<Registry>,
    connector: Connector,
    /// For one generator at least to be there.
    patience: Duration,
}

#[derive(Debug)]
struct Known {
    client: Client,
    /// It is here as long as it is in the registry.
    is_registered: bool,
    /// Failures since it last took weights.
    strikes: u32,
    barred_until: Option<Instant>,
}

/// A generator that answers, and its answer.
pub(super) type Present = (Client, StatusResponse);

impl Roster {
    pub(super) fn new(
        clients: &[Client],
        registry: Option<Registry>,
        connector: &Connector,
        patience: Duration,
    ) -> Self {
        let known = clients.iter().map(|client| Known::new(client.clone(), false)).collect();
        Self { known, registry, connector: connector.clone(), patience }
    }

    /// The generators that answer and have this model, in the order in which they were named. Waits a little for one.
    pub(super) async fn present(&mut self, manifest_hash: u64) -> Vec<Present> {
        let started = Instant::now();
        loop {
            self.look_into_registry();
            let mut present = Vec::new();
            for (index, answer) in self.ask().await {
                let known = &mut self.known[index];
                match answer {
                    Some(status) if status.manifest_hash == manifest_hash => {
                        present.push((known.client.clone(), status));
                    }
                    Some(_) => known.bar("has another model"),
                    None => known.bar("does not answer"),
                }
            }
            if !present.is_empty() || started.elapsed() >= A_LITTLE {
                return present;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Where there is none: an error when that has lasted too long.
    pub(super) fn check_patience(&self, waited: Duration) -> Result<(), PublishError> {
        if waited < self.patience {
            return Ok(());
        }
        let generators = self.known.iter().map(|known| known.client.address().to_owned()).collect();
        Err(PublishError::Gone { waited, generators })
    }

    fn look_into_registry(&mut self) {
        let Some(registry) = &self.registry else { return };
        let members = registry.members();
        let address = |known: &Known| known.client.address().to_owned();
        self.known.retain(|known| !known.is_registered || members.contains(&address(known)));
        for member in members {
            // Whoever is registered has an address that is one.
            if let Ok(client) = self.connector.client(&member)
                && !self.known.iter().any(|known| address(known) == member)
            {
                self.known.push(Known::new(client, true));
            }
        }
    }

    /// Leaves those alone that made a push fail: whoever is silent now, as that is what the others may have failed of, or
    /// else the first of `failed`.
    pub(super) async fn blame(&mut self, failed: &[String]) {
        let silent: Vec<usize> =
            self.ask().await.into_iter().filter(|(_, answer)| answer.is_none()).map(|(index, _)| index).collect();
        if silent.is_empty() {
            let named = |known: &&mut Known| failed.first().is_some_and(|failed| failed == known.client.address());
            self.known.iter_mut().filter(named).for_each(|known| known.bar("failed a weight push"));
        }
        for index in silent {
            self.known[index].bar("does not answer after a failed weight push");
        }
    }

    /// These have taken the weights of `version`.
    pub(super) fn commend(&mut self, clients: &[Client], version: PolicyVersion) {
        if let Some(registry) = &self.registry {
            registry.note_push(version, clients.iter().map(|client| client.address().to_owned()).collect());
        }
        let is_one = |known: &&mut Known| clients.iter().any(|client| client.address() == known.client.address());
        for known in self.known.iter_mut().filter(is_one) {
            (known.strikes, known.barred_until) = (0, None);
        }
    }

    /// Asks all that are not left alone, or everybody if nobody else is there.
    async fn ask(&self) -> Vec<(usize, Option<StatusResponse>)> {
        let now = Instant::now();
        let is_barred = |known: &Known| known.barred_until.is_some_and(|until| until > now);
        let are_all_barred = self.known.iter().all(is_barred);
        let asked = self.known.iter().enumerate().filter(|(_, known)| are_all_barred || !is_barred(known));
        let answers = asked.map(async |(index, known)| {
            let answer = tokio::time::timeout(self.connector.probe_timeout(), known.client.status()).await;
            (index, answer.ok().and_then(Result::ok))
        });
        join_all(answers).await
    }
}

impl Known {
    fn new(client: Client, is_registered: bool) -> Self {
        Self { client, is_registered, strikes: 0, barred_until: None }
    }

    fn bar(&mut self, reason: &str) {
        if self.strikes == 0 {
            tracing::warn!("generator {} {reason}: going on without it", self.client.address());
        }
        let bar = FIRST_BAR.saturating_mul(1 << self.strikes.min(10)).min(LONGEST_BAR);
        self.strikes += 1;
        self.barred_until = Some(Instant::now() + bar);
    }
}
