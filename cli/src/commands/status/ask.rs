//! Asking one address after the other's name: each within its deadline, all at once.

use std::time::{Duration, Instant};

use aha_core::config::Credentials;
use aha_proto::caller::{Bearer, CallerError, endpoint};
use aha_proto::v1;
use aha_proto::v1::coordinator_client::CoordinatorClient;
use aha_proto::v1::generator_client::GeneratorClient;
use aha_trainer::clients::describe;
use anyhow::Result;
use futures::future::try_join_all;
use tonic::Code;

/// How everyone is asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) credentials: &'a Credentials,
    pub(super) timeout: Duration,
}

/// What an address came to.
#[derive(Debug, Clone)]
pub(super) struct Look {
    pub(super) address: String,
    pub(super) at: Instant,
    pub(super) answer: Answer,
}

#[derive(Debug, Clone)]
pub(super) enum Answer {
    Generator(v1::StatusResponse),
    Coordinator(v1::RunStatusResponse),
    /// And why.
    None(String),
}

impl Asked<'_> {
    /// Asks all of `addresses`, and the generators that coordinators among them name.
    pub(super) async fn all(self, mut addresses: Vec<String>) -> Result<Vec<Look>, CallerError> {
        let mut looks = Vec::new();
        while !addresses.is_empty() {
            looks.extend(try_join_all(addresses.iter().map(|address| self.look(address))).await?);
            addresses.clear();
            let runs = looks.iter().filter_map(|look| match &look.answer {
                Answer::Coordinator(run) => Some(run),
                _ => None,
            });
            for member in runs.flat_map(|run| &run.members) {
                let is_known =
                    looks.iter().map(|look| &look.address).chain(&addresses).any(|known| *known == member.address);
                // One that is no address is the coordinator's mistake, and no reason to end.
                if !is_known && endpoint(&member.address, self.credentials).is_ok() {
                    addresses.push(member.address.clone());
                }
            }
        }
        Ok(looks)
    }

    async fn look(self, address: &str) -> Result<Look, CallerError> {
        let channel = endpoint(address, self.credentials)?.connect_timeout(self.timeout).connect_lazy();
        let bearer = Bearer::new(self.credentials)?;
        let calls = async {
            let mut generator = GeneratorClient::with_interceptor(channel.clone(), bearer.clone());
            match generator.status(v1::StatusRequest {}).await {
                Err(status) if status.code() == Code::Unimplemented => {
                    let mut coordinator = CoordinatorClient::with_interceptor(channel, bearer);
                    coordinator
                        .run_status(v1::RunStatusRequest {})
                        .await
                        .map(|run| Answer::Coordinator(run.into_inner()))
                }
                answer => answer.map(|status| Answer::Generator(status.into_inner())),
            }
        };
        let answer = match tokio::time::timeout(self.timeout, calls).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(status)) => Answer::None(describe(&status)),
            Err(_) => Answer::None(format!("not within {:.1} s", self.timeout.as_secs_f64())),
        };
        Ok(Look { address: address.to_owned(), at: Instant::now(), answer })
    }
}
