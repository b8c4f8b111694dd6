//! The service as a client sees it: a real server on loopback, with a tiny random model behind it.

mod generate;
mod hostile;
mod lifecycle;
mod metrics;
mod security;
mod soak;
mod swap;
mod update;

use std::net::SocketAddr;
use std::time::Duration;

use aha_core::config::Credentials;
use aha_core::reward::RewardSpec;
use aha_core::rollout::Sampling;
use aha_proto::v1;
use aha_proto::v1::generator_client::GeneratorClient;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::instance::GeneratorOptions;
use crate::server::GeneratorServer;
use crate::testing::{Tiny, tiny_folder, tiny_options};

/// Nothing here takes nearly as long.
const PATIENCE: Duration = Duration::from_secs(60);
/// More tokens than any test waits for.
const ENDLESS: u32 = 4000;

struct Server {
    client: GeneratorClient<Channel>,
    channel: Channel,
    address: SocketAddr,
    /// Tells the server to stop, by being dropped too.
    stop: oneshot::Sender<()>,
    metrics_address: Option<SocketAddr>,
    serving: JoinHandle<anyhow::Result<()>>,
    folder: TempDir,
}

impl Server {
    async fn start(tiny: Tiny) -> Self {
        Self::start_with(tiny, Duration::ZERO, |_| ()).await
    }

    async fn start_with(tiny: Tiny, grace: Duration, adjust: impl FnOnce(&mut GeneratorOptions)) -> Self {
        let folder = tiny_folder(tiny, 1);
        let mut options = tiny_options(folder.path());
        adjust(&mut options);
        let server = GeneratorServer::bind(&options, "127.0.0.1:0".parse().unwrap(), Credentials::default());
        let server = server.await.unwrap();
        let (address, metrics_address) = (server.address(), server.metrics_address());
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server.serve(grace, async { drop(stopped.await) }));
        let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Self { client: GeneratorClient::new(channel.clone()), channel, address, stop, metrics_address, serving, folder }
    }

    async fn generate(&mut self, request: v1::GenerateRequest) -> Result<Streaming<v1::Completion>, Status> {
        let mut call = Request::new(request);
        call.set_timeout(PATIENCE);
        Ok(self.client.generate(call).await?.into_inner())
    }

    /// All completions, in the order of their sample index.
    async fn completions(&mut self, request: v1::GenerateRequest) -> Vec<v1::Completion> {
        collect(self.generate(request).await.unwrap()).await.unwrap()
    }

    async fn score(&mut self, token_ids: Vec<u32>) -> Vec<f32> {
        self.client.score(v1::ScoreRequest { token_ids }).await.unwrap().into_inner().logprobs
    }

    async fn status(&mut self) -> v1::StatusResponse {
        self.client.status(v1::StatusRequest {}).await.unwrap().into_inner()
    }

    /// Asks for the status until it is as wanted.
    async fn wait_until(&mut self, wanted: impl Fn(&v1::StatusResponse) -> bool) -> v1::StatusResponse {
        let ask = async {
            loop {
                let status = self.status().await;
                if wanted(&status) {
                    return status;
                }
            }
        };
        tokio::time::timeout(PATIENCE, ask).await.expect("the engine gets there in time")
    }
}

async fn collect(mut stream: Streaming<v1::Completion>) -> Result<Vec<v1::Completion>, Status> {
    let mut completions = Vec::new();
    while let Some(completion) = stream.message().await? {
        completions.push(completion);
    }
    completions.sort_by_key(|completion| completion.sample_index);
    Ok(completions)
}

/// `num_samples` samples of `max_tokens` tokens each, whatever the model says.
fn request(id: &str, num_samples: u32, max_tokens: u32) -> v1::GenerateRequest {
    let sampling = Sampling { max_tokens, ignore_eos: true, ..Sampling::default() };
    v1::GenerateRequest {
        request_id: id.to_owned(),
        prompt_id: 11,
        token_ids: b"a prompt of some length".iter().map(|&byte| u32::from(byte)).collect(),
        sample_indices: (0..num_samples).collect(),
        sampling: Some((&sampling).into()),
        seed: 5,
        rewards: Vec::new(),
        columns: String::new(),
    }
}

fn reward(function: &str) -> v1::RewardFunction {
    (&RewardSpec::of(function)).into()
}

#[track_caller]
fn check_status(status: &Status, code: Code, message: &str) {
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(message), "{status}");
}
