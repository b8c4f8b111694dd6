//! For tests: a generator that speaks the protocol on a port of its own and misbehaves as it is told.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aha_core::manifest::Manifest;
use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use aha_nn::tensor_data;
use aha_proto::v1;
use aha_proto::v1::generator_server::{Generator, GeneratorServer};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

/// What becomes of one call of Generate; without one the answer is as it should be.
#[derive(Debug, Clone)]
pub(crate) enum Generate {
    /// This many completions, then this failure.
    Fail(usize, Status),
    /// This many completions, then the end of the stream.
    End(usize),
    /// This many completions, then nothing more.
    Hang(usize),
    /// Every completion twice.
    Twice,
    /// Completions that were cancelled.
    Aborted,
    /// Sampled by this version.
    Version(u64),
    /// The last completion is this one.
    Send(v1::Completion),
}

/// What becomes of a weight push.
#[derive(Debug, Clone)]
pub(crate) enum Update {
    /// The weights are received, checked and served.
    Take,
    /// The call of UpdateWeights fails before anything is received.
    Refuse(Status),
    /// Nothing is received, and nothing answered.
    Hang,
    /// The call of JoinUpdateGroup is never answered.
    NeverJoin,
    /// The weights are taken, and another version is answered.
    AnswerVersion(u64),
}

/// A generator on its own runtime; gone with all its connections when it is dropped.
#[derive(Debug)]
pub(crate) struct TestGenerator {
    pub(crate) address: String,
    service: Service,
    runtime: Mutex<Option<Runtime>>,
}

#[derive(Debug, Clone)]
struct Service(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    manifest: Manifest,
    /// In which weights are taken.
    dtype: v1::WeightType,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    version: u64,
    script: VecDeque<Generate>,
    update: Update,
    requests: Vec<v1::GenerateRequest>,
    joined: Option<(v1::JoinUpdateGroupRequest, Arc<ProcessGroup>)>,
    received: Vec<Vec<u8>>,
}

impl TestGenerator {
    pub(crate) fn start(script: impl IntoIterator<Item = Generate>) -> Self {
        Self::with_manifest(script, Manifest { units: Vec::new() }, Update::Take)
    }

    pub(crate) fn with_manifest(
        script: impl IntoIterator<Item = Generate>,
        manifest: Manifest,
        update: Update,
    ) -> Self {
        Self::with_dtype(script, manifest, update, v1::WeightType::Float32)
    }

    pub(crate) fn with_dtype(
        script: impl IntoIterator<Item = Generate>,
        manifest: Manifest,
        update: Update,
        dtype: v1::WeightType,
    ) -> Self {
        let state = State {
            version: 0,
            script: script.into_iter().collect(),
            update,
            requests: Vec::new(),
            joined: None,
            received: Vec::new(),
        };
        let service = Service(Arc::new(Shared { manifest, dtype, state: Mutex::new(state) }));
        let (address, runtime) = serve(&service, SocketAddr::from(([127, 0, 0, 1], 0)));
        Self { address: address.to_string(), service, runtime: Mutex::new(Some(runtime)) }
    }

    /// A killed one comes back at its address, with the weights that it began with.
    pub(crate) fn restart(&self) {
        self.set_version(0);
        let address = self.address.parse().unwrap();
        // Until the killed one has let go of it.
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::net::TcpListener::bind(address).is_err() {
            assert!(Instant::now() < deadline, "{address} stays in use");
            std::thread::park_timeout(Duration::from_millis(10));
        }
        *self.runtime.lock().unwrap() = Some(serve(&self.service, address).1);
    }

    pub(crate) fn set_update(&self, update: Update) {
        self.service.0.state.lock().unwrap().update = update;
    }

    /// Its service, for a test with a server of its own.
    pub(crate) fn service(&self) -> impl Generator + use<> {
        self.service.clone()
    }

    /// Ends the generator as a kill would.
    pub(crate) fn kill(&self) {
        self.service.0.state.lock().unwrap().joined = None;
        if let Some(runtime) = self.runtime.lock().unwrap().take() {
            runtime.shutdown_background();
        }
    }

    pub(crate) fn set_version(&self, version: u64) {
        self.service.0.state.lock().unwrap().version = version;
    }

    /// The calls of Generate so far.
    pub(crate) fn requests(&self) -> Vec<v1::GenerateRequest> {
        self.service.0.state.lock().unwrap().requests.clone()
    }

    /// What it was asked into an update group with.
    pub(crate) fn joined(&self) -> Option<v1::JoinUpdateGroupRequest> {
        self.service.0.state.lock().unwrap().joined.as_ref().map(|(request, _)| request.clone())
    }

    /// The version that serves, and the bytes of its units.
    pub(crate) fn serving(&self) -> (u64, Vec<Vec<u8>>) {
        let state = self.service.0.state.lock().unwrap();
        (state.version, state.received.clone())
    }
}

fn serve(service: &Service, address: SocketAddr) -> (SocketAddr, Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder().add_service(GeneratorServer::new(service.clone()));
    runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, runtime)
}

impl Drop for TestGenerator {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The completion that a generator makes of a request: a function of seed and sample index.
pub(crate) fn completion(request: &v1::GenerateRequest, sample_index: u32, version: u64) -> v1::Completion {
    let token_ids = vec![(request.seed % 1000) as u32, sample_index];
    let reward = |function: &v1::RewardFunction| v1::Reward {
        function: function.name.clone(),
        score: 1.0,
        outcome: "score".to_owned(),
    };
    v1::Completion {
        prompt_id: request.prompt_id,
        sample_index,
        logprobs: vec![-0.5; token_ids.len()],
        spans: vec![v1::Span { version, num_tokens: token_ids.len() as u32 }],
        token_ids,
        finish_reason: v1::FinishReason::Stop.into(),
        text: format!("{sample_index}"),
        rewards: request.rewards.iter().map(reward).collect(),
        ..Default::default()
    }
}

#[tonic::async_trait]
impl Generator for Service {
    type GenerateStream = ReceiverStream<Result<v1::Completion, Status>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        if !request.metadata().contains_key("grpc-timeout") {
            return Err(Status::invalid_argument("no deadline"));
        }
        let request = request.into_inner();
        let (version, script) = {
            let mut state = self.0.state.lock().unwrap();
            state.requests.push(request.clone());
            (state.version, state.script.pop_front())
        };
        let good = |version| -> Vec<Result<v1::Completion, Status>> {
            request.sample_indices.iter().map(|&index| Ok(completion(&request, index, version))).collect()
        };
        let mut items = good(version);
        let mut hangs = false;
        match script {
            None => {}
            Some(Generate::End(num_sent)) => items.truncate(num_sent),
            Some(Generate::Fail(num_sent, status)) => {
                items.truncate(num_sent);
                items.push(Err(status));
            }
            Some(Generate::Hang(num_sent)) => {
                items.truncate(num_sent);
                hangs = true;
            }
            Some(Generate::Twice) => items = items.into_iter().flat_map(|item| [item.clone(), item]).collect(),
            Some(Generate::Aborted) => {
                let abort = |completion: &mut v1::Completion| completion.set_finish_reason(v1::FinishReason::Aborted);
                items.iter_mut().flatten().for_each(abort);
            }
            Some(Generate::Version(version)) => items = good(version),
            Some(Generate::Send(last)) => {
                items.pop();
                items.push(Ok(last));
            }
        }
        let (sender, receiver) = mpsc::channel(items.len().max(1));
        for item in items {
            sender.send(item).await.map_err(|_| Status::cancelled("nobody listens"))?;
        }
        if hangs {
            tokio::spawn(async move { sender.closed().await });
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let state = self.0.state.lock().unwrap();
        Ok(Response::new(v1::StatusResponse {
            version: state.version,
            manifest_hash: self.0.manifest.hash(),
            dtype: self.0.dtype.into(),
            update_group: state.joined.as_ref().map(|(join, _)| join.group.clone()).unwrap_or_default(),
            ..Default::default()
        }))
    }

    async fn join_update_group(
        &self,
        request: Request<v1::JoinUpdateGroupRequest>,
    ) -> Result<Response<v1::JoinUpdateGroupResponse>, Status> {
        let never_joins = matches!(self.0.state.lock().unwrap().update, Update::NeverJoin);
        if never_joins {
            return std::future::pending().await;
        }
        let request = request.into_inner();
        let join = request.clone();
        let group = tokio::task::spawn_blocking(move || join_group(&join)).await.unwrap();
        let group = Arc::new(group.map_err(Status::unavailable)?);
        self.0.state.lock().unwrap().joined = Some((request, group));
        Ok(Response::new(v1::JoinUpdateGroupResponse {}))
    }

    async fn update_weights(
        &self,
        request: Request<v1::UpdateWeightsRequest>,
    ) -> Result<Response<v1::UpdateWeightsResponse>, Status> {
        let request = request.into_inner();
        let update = self.0.state.lock().unwrap().update.clone();
        let answered = match update {
            Update::Take => request.version,
            Update::AnswerVersion(version) => version,
            Update::Refuse(status) => return Err(status),
            Update::Hang | Update::NeverJoin => return std::future::pending().await,
        };
        let shared = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || receive(&shared, &request)).await.unwrap()?;
        Ok(Response::new(v1::UpdateWeightsResponse { version: answered, receive_seconds: 0.25, swap_seconds: 0.125 }))
    }

    async fn score(&self, _: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        Err(Status::unimplemented("score"))
    }

    async fn pause(&self, _: Request<v1::PauseRequest>) -> Result<Response<v1::PauseResponse>, Status> {
        Err(Status::unimplemented("pause"))
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        Err(Status::unimplemented("resume"))
    }

    async fn sleep(&self, _: Request<v1::SleepRequest>) -> Result<Response<v1::SleepResponse>, Status> {
        Err(Status::failed_precondition("cannot sleep"))
    }

    async fn wake(&self, _: Request<v1::WakeRequest>) -> Result<Response<v1::WakeResponse>, Status> {
        Ok(Response::new(v1::WakeResponse {}))
    }

    async fn abort(&self, _: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        Err(Status::unimplemented("abort"))
    }
}

fn join_group(request: &v1::JoinUpdateGroupRequest) -> Result<ProcessGroup, String> {
    let timeout = Duration::from_secs_f64(request.timeout_seconds);
    let port = u16::try_from(request.store_port).unwrap();
    let store = Store::connect(&request.store_host, port, timeout).map_err(|error| error.to_string())?;
    let spec = GroupSpec {
        name: request.group.clone(),
        rank: request.rank as usize,
        size: request.size as usize,
        timeout,
        address: Address::Host("127.0.0.1".to_owned()),
    };
    ProcessGroup::new(Backend::Gloo, &store, &spec).map_err(|error| error.to_string())
}

fn receive(shared: &Shared, request: &v1::UpdateWeightsRequest) -> Result<(), Status> {
    let (join, group) = shared.state.lock().unwrap().joined.clone().expect("a push comes after joining");
    assert_eq!(join.group, request.group);
    assert_eq!(join.manifest_hash, shared.manifest.hash());
    let kind = if join.dtype() == v1::WeightType::Bfloat16 { Kind::BFloat16 } else { Kind::Float };
    let flats: Vec<Tensor> =
        shared.manifest.units.iter().map(|unit| Tensor::zeros([unit.numel() as i64], (kind, Device::Cpu))).collect();
    for bucket in shared.manifest.buckets(join.num_trainers as usize, join.bucket_numel as usize) {
        let mut part = flats[bucket.unit_idx].narrow(0, bucket.offset as i64, bucket.numel as i64);
        group.broadcast(&mut part, bucket.owner).map_err(|error| Status::unavailable(error.to_string()))?;
    }
    let received: Vec<Vec<u8>> = flats.iter().map(|flat| tensor_data::bytes(flat).to_vec()).collect();
    let hashes: Vec<u64> = received.iter().map(|bytes| xxhash_rust::xxh3::xxh3_64(bytes)).collect();
    if hashes != request.unit_hashes {
        return Err(Status::data_loss("the weights that arrived are not those that were sent"));
    }
    let mut state = shared.state.lock().unwrap();
    state.version = request.version;
    state.received = received;
    Ok(())
}
