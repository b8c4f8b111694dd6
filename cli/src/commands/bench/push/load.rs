//! Generators that decode, and how long their engines take from step to step.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aha_core::rollout::Sampling;
use aha_proto::v1;
use aha_proto::v1::generator_client::GeneratorClient;
use anyhow::{Result, ensure};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Of a request; after it comes the next.
const NEW_TOKENS: u32 = 512;
/// For a request, and for an engine to take steps at all.
const PATIENCE: Duration = Duration::from_secs(120);

/// Decodes until it is dropped.
pub(super) struct Load {
    tasks: Vec<JoinHandle<()>>,
    gaps: Gaps,
}

/// Times from one engine step to the next, of all generators.
type Gaps = Arc<Mutex<Vec<Duration>>>;

impl Load {
    /// Each of `addresses` decodes `batch` sequences at once.
    pub(super) fn start(addresses: &[String], batch: u32, runtime: &Runtime) -> Self {
        let gaps = Gaps::default();
        let start = |address: &String| {
            let address = format!("http://{address}");
            let decoding = report(address.clone(), decode(address.clone(), batch));
            [runtime.spawn(decoding), runtime.spawn(report(address.clone(), watch(address, Arc::clone(&gaps))))]
        };
        Self { tasks: addresses.iter().flat_map(start).collect(), gaps }
    }

    /// The gaps since the last call, so many of them at least, ascending.
    pub(super) fn gaps(&self, at_least: usize) -> Result<Vec<Duration>> {
        let started = Instant::now();
        loop {
            let mut gaps = self.gaps.lock().unwrap_or_else(PoisonError::into_inner);
            if gaps.len() >= at_least {
                let mut gaps = std::mem::take(&mut *gaps);
                gaps.sort_unstable();
                return Ok(gaps);
            }
            drop(gaps);
            ensure!(!self.tasks.iter().any(JoinHandle::is_finished), "a generator has failed");
            ensure!(started.elapsed() < PATIENCE, "no generator has decoded for {} s", PATIENCE.as_secs());
            std::thread::park_timeout(LOOK_AGAIN);
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn report(address: String, task: impl Future<Output = Result<()>>) {
    if let Err(error) = task.await {
        tracing::error!("{address}: {error:#}");
    }
}

async fn decode(address: String, batch: u32) -> Result<()> {
    let mut client = GeneratorClient::connect(address).await?;
    let sampling = Sampling { max_tokens: NEW_TOKENS, ignore_eos: true, ..Sampling::default() };
    for number in 0.. {
        let request = v1::GenerateRequest {
            request_id: format!("bench-{number}"),
            token_ids: vec![0; 16],
            sample_indices: (0..batch).collect(),
            sampling: Some((&sampling).into()),
            seed: number,
            columns: "{}".to_owned(),
            ..v1::GenerateRequest::default()
        };
        let mut request = tonic::Request::new(request);
        request.set_timeout(PATIENCE);
        let mut completions = client.generate(request).await?.into_inner();
        while completions.message().await?.is_some() {}
    }
    Ok(())
}

async fn watch(address: String, gaps: Gaps) -> Result<()> {
    let mut client = GeneratorClient::connect(address).await?;
    let mut last: Option<(u64, Instant)> = None;
    loop {
        let steps = client.status(v1::StatusRequest {}).await?.into_inner().steps;
        match last {
            Some((before, since)) if steps > before => {
                let gap = since.elapsed().div_f64((steps - before) as f64);
                gaps.lock().unwrap_or_else(PoisonError::into_inner).push(gap);
                last = Some((steps, Instant::now()));
            }
            Some(_) => {}
            None => last = Some((steps, Instant::now())),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
