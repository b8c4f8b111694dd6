//! A generator with a tiny random model, a trainer that pushes to it, and a coordinator, all in this process.

use std::cell::{Cell, RefCell};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use aha_core::config::{self, Credentials, RunConfig};
use aha_core::ids::PolicyVersion;
use aha_core::reward::RewardSpec;
use aha_core::rollout::Sampling;
use aha_generator::{GeneratorOptions, GeneratorServer};
use aha_nn::comm::ProcessGroup;
use aha_nn::model_config::ModelConfig;
use aha_nn::model_folder::save_weights;
use aha_nn::weights::Weights;
use aha_proto::v1;
use aha_trainer::fleet::Fleet;
use aha_trainer::generators::Generators;
use bytes::Bytes;
use h2::client::SendRequest;
use prost::Message;
use serde_json::{Map, Value, json};
use tch::{Device, Kind};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

use crate::methods::{GENERATE, Method};
use crate::wire::{self, Answer};

/// For what must be answered. A process that was stopped meanwhile is asked once more.
const PATIENCE: Duration = Duration::from_secs(20);
/// Inputs between two pushes, and between two calls to the coordinator.
const PUSH_EVERY: u32 = 64;
const REGISTER_EVERY: u32 = 16;
const OK: Option<u32> = Some(0);
const FAILED_PRECONDITION: Option<u32> = Some(9);

static MODEL: LazyLock<ModelConfig> = LazyLock::new(|| {
    let raw = json!({"model_type": "qwen3", "vocab_size": 260, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 256, "tie_word_embeddings": true, "initializer_range": 0.3});
    ModelConfig::from_json(raw.as_object().expect("an object").clone()).expect("a model that is supported")
});
pub static MANIFEST_HASH: LazyLock<u64> = LazyLock::new(|| MODEL.manifest().hash());

/// What a sensible client asks for.
pub fn good_request(id: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        request_id: id.to_owned(),
        prompt_id: 1,
        token_ids: b"a prompt".iter().map(|&byte| byte.into()).collect(),
        sample_indices: vec![0, 1],
        sampling: Some((&Sampling { max_tokens: 6, ignore_eos: true, ..Sampling::default() }).into()),
        seed: 5,
        rewards: vec![(&RewardSpec::of("format")).into()],
        columns: r#"{"target": 3, "nums": [1, 2]}"#.to_owned(),
    }
}

pub struct Services {
    runtime: Arc<Runtime>,
    generator: SocketAddr,
    coordinator: SocketAddr,
    /// Connections that are kept.
    connections: RefCell<[Option<SendRequest<Bytes>>; 2]>,
    fleet: RefCell<Fleet>,
    /// Serves the coordinator.
    _registering: Fleet,
    alone: ProcessGroup,
    weights: Weights,
    /// What the good request is answered with.
    expected: RefCell<Vec<v1::Completion>>,
    num_inputs: Cell<u32>,
    _folder: TempDir,
}

impl Services {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder for a model");
        let weights = Weights::random(&MODEL, 1, 1, Kind::Float, Device::Cpu);
        save_weights(folder.path(), &MODEL, &weights).expect("a writable folder");
        write_tokenizer(folder.path());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = Arc::new(runtime.expect("a runtime"));
        let generator = serve_generator(folder.path(), &runtime);
        let alone = ProcessGroup::solo("fuzz", Device::Cpu);
        let fleet = |adjust: &dyn Fn(&mut config::Generator)| {
            let mut config = RunConfig::default();
            config.generator.connect_timeout_seconds = 5.0;
            config.generator.probe_timeout_seconds = 2.0;
            config.train.push_timeout_seconds = 4.0;
            adjust(&mut config.generator);
            Fleet::connect(&config, &alone, &weights, Credentials::default(), Arc::clone(&runtime)).expect("a fleet")
        };
        let coordinator = free_address();
        let services = Self {
            generator,
            coordinator,
            connections: RefCell::default(),
            fleet: RefCell::new(fleet(&|generator_config| generator_config.addresses = vec![generator.to_string()])),
            _registering: fleet(&|generator_config| generator_config.coordinator = Some(coordinator.to_string())),
            expected: RefCell::default(),
            num_inputs: Cell::new(0),
            runtime,
            alone,
            weights,
            _folder: folder,
        };
        services.expected.replace(services.completions());
        services
    }

    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// A way to the service of a method.
    pub async fn connect(&self, method: &Method) -> SendRequest<Bytes> {
        self.connect_to(usize::from(method.service.ends_with("Coordinator"))).await
    }

    /// What services are for, whatever they were asked before.
    ///
    /// # Panics
    /// If it is not had.
    pub fn check(&self) {
        let num_inputs = self.num_inputs.replace(self.num_inputs.get().wrapping_add(1));
        let woken = self.ask(0, "/aha.v1.Generator/Wake", &v1::WakeRequest {});
        if woken.code == FAILED_PRECONDITION {
            self.push();
            self.expect_ok(0, "/aha.v1.Generator/Wake", &v1::WakeRequest {});
        }
        self.expect_ok(0, "/aha.v1.Generator/Resume", &v1::ResumeRequest {});
        if num_inputs % PUSH_EVERY == 0 {
            self.push();
        }
        assert_eq!(self.completions(), *self.expected.borrow(), "what the same request got before");
        if num_inputs % REGISTER_EVERY == 0 {
            let answer = self.expect_ok(1, "/aha.v1.Coordinator/RunStatus", &v1::RunStatusRequest {});
            let status = v1::RunStatusResponse::decode(answer.messages[0].clone()).expect("a message");
            assert_eq!(status.max_steps, RunConfig::default().train.max_steps);
        }
    }

    /// Pushes the weights that the generator had at first, by a group of its own where it is in none.
    fn push(&self) {
        let mut fleet = self.fleet.borrow_mut();
        let version = PolicyVersion(u64::from(self.num_inputs.get()) + 1);
        let started = Instant::now();
        let pushed = fleet.publish(&self.alone, &self.weights, version);
        assert!(pushed.is_ok(), "a push after {:?}: {:?}", started.elapsed(), pushed.err());
    }

    fn completions(&self) -> Vec<v1::Completion> {
        let answer = self.expect_ok(0, GENERATE, &good_request("good"));
        let decode = |bytes: &Bytes| v1::Completion::decode(bytes.clone()).expect("a message");
        let mut completions: Vec<v1::Completion> = answer.messages.iter().map(decode).collect();
        completions.sort_by_key(|completion| completion.sample_index);
        // Pushes change the version alone.
        completions.iter_mut().for_each(|completion| completion.spans.clear());
        completions
    }

    fn expect_ok(&self, service: usize, path: &str, message: &impl Message) -> Answer {
        let answer = self.ask(service, path, message);
        assert_eq!(answer.code, OK, "{path}: {}", answer.message);
        answer
    }

    fn ask(&self, service: usize, path: &str, message: &impl Message) -> Answer {
        let body = wire::frame(&message.encode_to_vec());
        let once = || {
            let call = async {
                let connection = self.connect_to(service).await;
                tokio::time::timeout(PATIENCE, wire::call(connection, path, Some(PATIENCE), body.clone())).await
            };
            self.block_on(call)
        };
        let answer = once().or_else(|_| once()).unwrap_or_else(|_| panic!("{path} was not answered in {PATIENCE:?}"));
        answer.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// The connection that is there, or a new one.
    async fn connect_to(&self, service: usize) -> SendRequest<Bytes> {
        let kept = self.connections.borrow()[service].clone();
        if let Some(kept) = kept
            && let Ok(ready) = kept.ready().await
        {
            return ready;
        }
        let address = [self.generator, self.coordinator][service];
        let stream = TcpStream::connect(address).await.expect("the service listens");
        let (connection, driver) = h2::client::handshake(stream).await.expect("HTTP/2");
        // Ends with the connection, whoever ends that.
        tokio::spawn(async move { drop(driver.await) });
        self.connections.borrow_mut()[service] = Some(connection.clone());
        connection
    }
}

fn serve_generator(folder: &Path, runtime: &Runtime) -> SocketAddr {
    let options = GeneratorOptions {
        model: config::Model { path: folder.to_owned(), ..Default::default() },
        seed: 0,
        generator: config::Generator { kv_cache_mib: 4, max_num_seqs: 16, threads: 1, ..Default::default() },
        gpu: 0,
    };
    let server = GeneratorServer::bind(&options, SocketAddr::from(([127, 0, 0, 1], 0)), Credentials::default());
    let server = runtime.block_on(server).expect("a generator");
    let address = server.address();
    runtime.spawn(async move {
        let ended = server.serve(Duration::ZERO, std::future::pending()).await;
        panic!("the generator ended: {ended:?}");
    });
    address
}

/// That nothing listens on.
fn free_address() -> SocketAddr {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr()).expect("a free port")
}

/// Token i is the byte i for i below 256, and 256 ends a text.
fn write_tokenizer(folder: &Path) {
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    let vocab: Map<String, Value> = (0..256)
        .map(|byte| {
            let code = if printable(&byte) { byte } else { others.next().expect("there are more") };
            (char::from_u32(code).expect("a character").to_string(), json!(byte))
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let end = json!({"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [end], "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("a writable folder");
    let settings = json!({"eos_token": "<|end|>"}).to_string();
    std::fs::write(folder.join("tokenizer_config.json"), settings).expect("a writable folder");
}
