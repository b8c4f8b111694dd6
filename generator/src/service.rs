//! The gRPC service `aha.v1.Generator` over the engine.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aha_core::ids::PolicyVersion;
use aha_nn::kernels::cuda::gpu_uuid;
use aha_proto::v1;
use aha_proto::v1::generator_server::Generator;
use futures::{Stream, stream};
use tch::{Device, Kind};
use tonic::{Code, Request, Response, Status};

use crate::deadline::{HEADER as TIMEOUT_HEADER, timeout};
use crate::engine::{Activity, EngineError, EngineHandle, RequestKey};
use crate::error::{GeneratorError, invalid};
use crate::instance::Instance;
use crate::request::check_request_id;
use crate::torch::{DeviceWeights, Membership, Push, UpdateError, WeightReceiver};

/// Requests in flight, and their samples in all; more are refused.
const MAX_IN_FLIGHT: usize = 4096;
const MAX_SAMPLES_IN_FLIGHT: usize = 1 << 18;
/// Most members of an update group: as many generators as a coordinator takes, and as many trainers.
const MAX_MEMBERS: usize = 8192;
/// Longest message of a status, in bytes: it travels in a header, and may quote what the client sent.
const MAX_MESSAGE_BYTES: usize = 1000;
/// For the members of an update group to come together, where the call has no deadline.
const JOIN_DEADLINE: Duration = Duration::from_secs(600);
/// Longest deadline of a request.
const MAX_DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Answers calls; shared by all connections.
#[derive(Debug)]
pub(crate) struct Service {
    instance: Instance,
    receiver: WeightReceiver,
    in_flight: InFlight,
    /// UUID of the GPU that the weights are on; empty on a CPU.
    gpu: String,
    started: Instant,
}

impl Service {
    pub(crate) fn new(instance: Instance, receiver: WeightReceiver) -> Self {
        let gpu = match instance.format.device {
            // A GPU that cannot be told from others is none that NCCL could be used with.
            Device::Cuda(index) => gpu_uuid(index).unwrap_or_default(),
            _ => String::new(),
        };
        Self { instance, receiver, in_flight: InFlight::default(), gpu, started: Instant::now() }
    }

    pub(crate) fn manifest_hash(&self) -> u64 {
        self.instance.manifest_hash
    }

    fn engine(&self) -> &EngineHandle<DeviceWeights> {
        &self.instance.engine
    }
}

type CompletionStream = Pin<Box<dyn Stream<Item = Result<v1::Completion, Status>> + Send>>;

#[tonic::async_trait]
impl Generator for Service {
    type GenerateStream = CompletionStream;

    async fn generate(&self, call: Request<v1::GenerateRequest>) -> Result<Response<CompletionStream>, Status> {
        let deadline = Instant::now() + timeout(call.metadata())?.min(MAX_DEADLINE);
        let wire = call.into_inner();
        check_request_id(&wire.request_id)?;
        // Before the checks that cost time: a flood is refused by looking at a number.
        let place = self.in_flight.enter(&wire.request_id, wire.sample_indices.len())?;
        // Lasts until the client has its completions, or goes.
        let span = tracing::debug_span!("request", prompt_id = wire.prompt_id, samples = wire.sample_indices.len());
        let request = self.instance.limits.check(wire)?;
        let completions = self.instance.outputs.start(place.key, request, deadline, place).await?;
        let stream = stream::unfold((completions, span), |(mut completions, span)| async {
            let done = completions.next().await?;
            Some((done.map(v1::Completion::from).map_err(Status::from), (completions, span)))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn score(&self, call: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let tokens = call.into_inner().token_ids;
        self.instance.limits.check_tokens(&tokens)?;
        let scored = self.instance.scorer.score(tokens).await?;
        Ok(Response::new(v1::ScoreResponse { logprobs: scored.logprobs, version: scored.version.0 }))
    }

    async fn status(&self, _call: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let status = self.engine().status().await?;
        Ok(Response::new(v1::StatusResponse {
            version: status.version.0,
            running: count(status.num_running),
            waiting: count(status.num_waiting),
            used_blocks: count(status.used_blocks),
            total_blocks: count(status.total_blocks),
            block_size: count(status.block_size),
            max_model_len: count(status.max_model_len),
            preemptions: status.counters.preemptions,
            prompt_tokens: status.counters.prompt_tokens,
            generation_tokens: status.counters.generation_tokens,
            steps: status.counters.steps,
            manifest_hash: self.manifest_hash(),
            paused: status.activity != Activity::Serving,
            prefix_cache_queries: status.counters.prefix_cache_queries,
            prefix_cache_hits: status.counters.prefix_cache_hits,
            cached_blocks: count(status.cached_blocks),
            gpu: self.gpu.clone(),
            dtype: match self.instance.format.pushed {
                Kind::BFloat16 => v1::WeightType::Bfloat16.into(),
                _ => v1::WeightType::Float32.into(),
            },
            update_group: self.receiver.group().unwrap_or_default(),
            asleep: status.activity == Activity::Asleep,
            model: self.instance.model.display().to_string(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
        }))
    }

    async fn join_update_group(
        &self,
        call: Request<v1::JoinUpdateGroupRequest>,
    ) -> Result<Response<v1::JoinUpdateGroupResponse>, Status> {
        let deadline = call.metadata().contains_key(TIMEOUT_HEADER).then(|| timeout(call.metadata())).transpose()?;
        let membership = membership(call.into_inner(), deadline.unwrap_or(JOIN_DEADLINE))?;
        self.receiver.join(membership).await?;
        Ok(Response::new(v1::JoinUpdateGroupResponse {}))
    }

    async fn update_weights(
        &self,
        call: Request<v1::UpdateWeightsRequest>,
    ) -> Result<Response<v1::UpdateWeightsResponse>, Status> {
        let v1::UpdateWeightsRequest { group, version, unit_hashes } = call.into_inner();
        let push = Push { group, version: PolicyVersion(version), unit_hashes };
        let pushed = self.receiver.receive(push).await?;
        self.instance.outputs.observed().pushed(pushed.receive, pushed.swap);
        Ok(Response::new(v1::UpdateWeightsResponse {
            version,
            receive_seconds: pushed.receive.as_secs_f64(),
            swap_seconds: pushed.swap.as_secs_f64(),
        }))
    }

    async fn pause(&self, _call: Request<v1::PauseRequest>) -> Result<Response<v1::PauseResponse>, Status> {
        self.engine().pause().await?;
        Ok(Response::new(v1::PauseResponse {}))
    }

    async fn resume(&self, _call: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        self.engine().resume().await?;
        Ok(Response::new(v1::ResumeResponse {}))
    }

    async fn sleep(&self, call: Request<v1::SleepRequest>) -> Result<Response<v1::SleepResponse>, Status> {
        let drop_weights = call.into_inner().drop_weights;
        if drop_weights {
            if self.instance.format.device != Device::Cpu {
                return Err(Status::failed_precondition(
                    "drop_weights: CUDA graphs refer to the weights of this generator; let it sleep with them",
                ));
            }
            self.receiver.release_spare().await?;
        }
        self.engine().sleep(drop_weights).await?;
        // What was freed in small pieces is otherwise kept by the allocator; giving it back takes its time.
        let released = tokio::task::spawn_blocking(aha_nn::runtime::release_memory).await;
        released.map_err(|error| Status::internal(format!("giving memory back: {error}")))?;
        Ok(Response::new(v1::SleepResponse {}))
    }

    async fn wake(&self, _call: Request<v1::WakeRequest>) -> Result<Response<v1::WakeResponse>, Status> {
        self.engine().wake().await?;
        Ok(Response::new(v1::WakeResponse {}))
    }

    async fn abort(&self, call: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        let key = self.in_flight.key(&call.into_inner().request_id)?;
        let aborted = self.engine().abort(key).await?;
        Ok(Response::new(v1::AbortResponse { aborted: count(aborted) }))
    }
}

impl From<GeneratorError> for Status {
    /// The one table from what went wrong to what the client is told.
    fn from(error: GeneratorError) -> Self {
        let code = match &error {
            GeneratorError::Invalid(_) => Code::InvalidArgument,
            GeneratorError::Duplicate(_) => Code::AlreadyExists,
            GeneratorError::Unknown(_) => Code::NotFound,
            GeneratorError::Busy(_) => Code::ResourceExhausted,
            GeneratorError::Late | GeneratorError::Deadline { .. } => Code::DeadlineExceeded,
            GeneratorError::Internal(_) => Code::Internal,
            GeneratorError::Engine(error) | GeneratorError::Update(UpdateError::Engine(error)) => engine_code(error),
            GeneratorError::Update(error) => match error {
                UpdateError::OtherManifest { .. }
                | UpdateError::OtherKind { .. }
                | UpdateError::NoGpu { .. }
                | UpdateError::WrongNumberOfHashes { .. } => Code::InvalidArgument,
                UpdateError::NotJoined(_) => Code::FailedPrecondition,
                UpdateError::BadHash { .. } => Code::DataLoss,
                UpdateError::Busy => Code::ResourceExhausted,
                UpdateError::Weights(_) => Code::Internal,
                UpdateError::Comm(_) | UpdateError::NoAddress { .. } => Code::Aborted,
                UpdateError::Engine(_) | UpdateError::Stopped => Code::Unavailable,
            },
        };
        Self::new(code, shortened(error.to_string()))
    }
}

impl From<EngineError> for Status {
    fn from(error: EngineError) -> Self {
        GeneratorError::from(error).into()
    }
}

impl From<UpdateError> for Status {
    fn from(error: UpdateError) -> Self {
        GeneratorError::from(error).into()
    }
}

fn shortened(mut message: String) -> String {
    if message.len() > MAX_MESSAGE_BYTES {
        let end = (0..=MAX_MESSAGE_BYTES).rfind(|&end| message.is_char_boundary(end)).unwrap_or(0);
        message.truncate(end);
        message.push_str(" ...");
    }
    message
}

fn engine_code(error: &EngineError) -> Code {
    match error {
        EngineError::Gone(_) => Code::Unavailable,
        EngineError::Refused(_) => Code::InvalidArgument,
        EngineError::Asleep | EngineError::NoWeights => Code::FailedPrecondition,
    }
}

/// Requests in flight: their ids, and the keys by which the engine knows them.
#[derive(Debug, Clone, Default)]
struct InFlight(Arc<Mutex<Requests>>);

#[derive(Debug, Default)]
struct Requests {
    keys: HashMap<String, RequestKey>,
    num_samples: usize,
    next_key: u64,
}

/// A request's place among those in flight, given up when dropped.
#[derive(Debug)]
struct Place {
    key: RequestKey,
    request_id: String,
    num_samples: usize,
    in_flight: InFlight,
}

impl InFlight {
    fn enter(&self, request_id: &str, num_samples: usize) -> Result<Place, GeneratorError> {
        let mut requests = self.lock();
        if requests.keys.contains_key(request_id) {
            return Err(GeneratorError::Duplicate(request_id.to_owned()));
        }
        let limits = [
            (requests.keys.len(), 1, MAX_IN_FLIGHT, "requests"),
            (requests.num_samples, num_samples, MAX_SAMPLES_IN_FLIGHT, "samples"),
        ];
        if let Some((held, asked, limit, what)) =
            limits.into_iter().find(|(held, asked, limit, _)| held + asked > *limit)
        {
            let problem = format!("{held} {what} are in flight and {asked} would join them, and the limit is {limit}");
            return Err(GeneratorError::Busy(problem));
        }
        let key = RequestKey(requests.next_key);
        requests.next_key += 1;
        requests.num_samples += num_samples;
        requests.keys.insert(request_id.to_owned(), key);
        Ok(Place { key, request_id: request_id.to_owned(), num_samples, in_flight: self.clone() })
    }

    fn key(&self, request_id: &str) -> Result<RequestKey, GeneratorError> {
        self.lock().keys.get(request_id).copied().ok_or_else(|| GeneratorError::Unknown(request_id.to_owned()))
    }

    /// Nothing in here can panic between two changes that belong together.
    fn lock(&self) -> MutexGuard<'_, Requests> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut requests = self.in_flight.lock();
        requests.keys.remove(&self.request_id);
        requests.num_samples -= self.num_samples;
    }
}

fn membership(wire: v1::JoinUpdateGroupRequest, deadline: Duration) -> Result<Membership, GeneratorError> {
    let is_nccl = match wire.backend() {
        v1::PushBackend::Gloo => false,
        v1::PushBackend::Nccl => true,
        v1::PushBackend::Unspecified => return Err(invalid("backend", "is unset or unknown; Gloo and NCCL are known")),
    };
    let kind = match wire.dtype() {
        v1::WeightType::Float32 => Kind::Float,
        v1::WeightType::Bfloat16 => Kind::BFloat16,
        v1::WeightType::Unspecified => {
            return Err(invalid("dtype", "is unset or unknown; float32 and bfloat16 are known"));
        }
    };
    let (rank, size, num_trainers) = (wire.rank as usize, wire.size as usize, wire.num_trainers as usize);
    if num_trainers == 0 || num_trainers >= size {
        return Err(invalid("num_trainers", format!("must be from 1 to below the size {size}, got {num_trainers}")));
    }
    if size > MAX_MEMBERS {
        return Err(invalid("size", format!("must be at most {MAX_MEMBERS}, got {size}")));
    }
    if rank < num_trainers || rank >= size {
        return Err(invalid("rank", format!("a generator's is from {num_trainers} to below {size}, got {rank}")));
    }
    if wire.group.is_empty() {
        return Err(invalid("group", "is empty"));
    }
    if wire.bucket_numel == 0 {
        return Err(invalid("bucket_numel", "must be at least 1"));
    }
    let timeout = Duration::try_from_secs_f64(wire.timeout_seconds).ok().filter(|timeout| !timeout.is_zero());
    let timeout = timeout.filter(|timeout| *timeout <= MAX_DEADLINE).ok_or_else(|| {
        invalid("timeout_seconds", format!("must be above 0 and at most a week, got {}", wire.timeout_seconds))
    })?;
    Ok(Membership {
        store_host: wire.store_host,
        store_port: u16::try_from(wire.store_port)
            .map_err(|_| invalid("store_port", format!("must be a port, got {}", wire.store_port)))?,
        group: wire.group,
        rank,
        size,
        num_trainers,
        manifest_hash: wire.manifest_hash,
        bucket_numel: usize::try_from(wire.bucket_numel).unwrap_or(usize::MAX),
        limit: timeout.min(deadline),
        timeout,
        is_nccl,
        kind,
    })
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
