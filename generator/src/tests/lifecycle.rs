//! Pausing, sleeping, aborting, dying, and what can be asked about it.

use std::sync::Arc;

use aha_core::config::KvPolicy;
use aha_core::ids::PolicyVersion;
use tch::{Device, Kind};
use tokio_stream::StreamExt;
use tonic::transport::server::TcpIncoming;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use super::*;
use crate::engine::{self, BlockId, EngineConfig, Runner, Sampled, StepBatch, StepTimes};
use crate::instance::Instance;
use crate::outputs::Outputs;
use crate::request::Limits;
use crate::scorer::Scorer;
use crate::testing::{byte_tokenizer, tiny_config};
use crate::torch::{DeviceWeights, WeightFormat};

#[tokio::test(flavor = "multi_thread")]
async fn abort_ends_a_request_and_gives_what_there_is() {
    let mut server = Server::start(Tiny::Qwen2).await;
    let stream = server.generate(request("endless", 3, ENDLESS)).await.unwrap();
    let status = server.generate(request("endless", 1, 2)).await.unwrap_err();
    check_status(&status, Code::AlreadyExists, "endless");
    server.wait_until(|status| status.generation_tokens > 10).await;
    let abort = v1::AbortRequest { request_id: "endless".to_owned() };
    assert_eq!(server.client.abort(abort.clone()).await.unwrap().into_inner().aborted, 3);
    let completions = collect(stream).await.unwrap();
    assert_eq!(completions.len(), 3);
    for completion in &completions {
        assert_eq!(completion.finish_reason(), v1::FinishReason::Aborted);
        assert!(completion.token_ids.len() == completion.logprobs.len() && completion.rewards.is_empty());
    }
    assert!(completions.iter().any(|completion| !completion.token_ids.is_empty()));
    assert_eq!(server.status().await.used_blocks, 0);
    check_status(&server.client.abort(abort).await.unwrap_err(), Code::NotFound, "endless");
}

#[tokio::test(flavor = "multi_thread")]
async fn pausing_and_sleeping_lose_nothing() {
    let mut server = Server::start(Tiny::Qwen3).await;
    let undisturbed = server.completions(request("undisturbed", 4, 150)).await;

    server.client.pause(v1::PauseRequest {}).await.unwrap();
    let stream = server.generate(request("disturbed", 4, 150)).await.unwrap();
    let before = server.status().await;
    assert!(before.paused && before.waiting == 4, "{before:?}");
    server.client.resume(v1::ResumeRequest {}).await.unwrap();
    server.wait_until(|status| status.generation_tokens > before.generation_tokens + 8).await;

    server.client.sleep(v1::SleepRequest { drop_weights: false }).await.unwrap();
    let asleep = server.status().await;
    assert!(asleep.paused && asleep.used_blocks == 0 && asleep.waiting > 0, "{asleep:?}");
    check_status(&server.client.resume(v1::ResumeRequest {}).await.unwrap_err(), Code::FailedPrecondition, "asleep");
    let score = server.client.score(v1::ScoreRequest { token_ids: vec![1, 2] }).await.unwrap_err();
    check_status(&score, Code::FailedPrecondition, "asleep");
    server.client.wake(v1::WakeRequest {}).await.unwrap();

    assert_eq!(collect(stream).await.unwrap(), undisturbed);
    assert!(!server.status().await.paused);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_health_and_reflection_answer() {
    let mut server = Server::start(Tiny::Llama).await;
    let status = server.status().await;
    assert_eq!((status.version, status.block_size, status.max_model_len), (0, 16, 4096));
    assert_eq!(status.manifest_hash, crate::testing::tiny_config(Tiny::Llama).manifest().hash());
    assert!(status.total_blocks * status.block_size >= status.max_model_len);

    let mut health = HealthClient::new(server.channel.clone());
    let check = HealthCheckRequest { service: "aha.v1.Generator".to_owned() };
    let answer = health.check(check).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);

    let mut reflection = ServerReflectionClient::new(server.channel.clone());
    let list = MessageRequest::ListServices(String::new());
    let ask = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut answers = reflection.server_reflection_info(tokio_stream::iter([ask])).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(services)) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = services.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"aha.v1.Generator") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_lets_requests_finish_within_the_grace() {
    let mut server = Server::start_with(Tiny::Qwen2, PATIENCE, |_| ()).await;
    let stream = server.generate(request("last", 2, 100)).await.unwrap();
    drop(server.stop);
    assert_eq!(collect(stream).await.unwrap().len(), 2);
    drop((server.client, server.channel));
    server.serving.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_aborts_requests_after_the_grace() {
    let mut server = Server::start(Tiny::Qwen2).await;
    let stream = server.generate(request("endless", 2, ENDLESS)).await.unwrap();
    server.wait_until(|status| status.generation_tokens > 0).await;
    drop(server.stop);
    let completions = collect(stream).await.unwrap();
    assert!(completions.iter().all(|completion| completion.finish_reason() == v1::FinishReason::Aborted));
    tokio::time::timeout(PATIENCE, server.serving).await.unwrap().unwrap().unwrap();
}

/// A device that is gone.
struct BrokenRunner;

impl Runner for BrokenRunner {
    type Staged = DeviceWeights;

    fn run(&mut self, _batch: &StepBatch) -> anyhow::Result<Vec<Sampled>> {
        anyhow::bail!("the device is gone")
    }

    fn score(&mut self, _tokens: &[u32], _block_table: &[BlockId]) -> anyhow::Result<Vec<f32>> {
        anyhow::bail!("the device is gone")
    }

    fn times(&self) -> StepTimes {
        StepTimes::default()
    }

    fn has_weights(&self) -> bool {
        true
    }

    fn swap(&mut self, staged: DeviceWeights) -> anyhow::Result<Option<DeviceWeights>> {
        Ok(Some(staged))
    }

    fn release_weights(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    fn release_cache(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    fn restore_cache(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_engine_fails_its_requests_and_the_server() {
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let server = GeneratorServer::over(broken_instance(), incoming).unwrap();
    let endpoint = Channel::from_shared(format!("http://{}", server.address())).unwrap();
    let serving = tokio::spawn(server.serve(PATIENCE, std::future::pending()));
    let channel = endpoint.connect().await.unwrap();
    let check = HealthCheckRequest { service: "aha.v1.Generator".to_owned() };
    let mut health = HealthClient::new(channel.clone()).watch(check).await.unwrap().into_inner();
    assert_eq!(health.message().await.unwrap().unwrap().status(), ServingStatus::Serving);

    let mut call = Request::new(request("doomed", 2, 8));
    call.set_timeout(PATIENCE);
    let failed = match GeneratorClient::new(channel).generate(call).await {
        Ok(stream) => collect(stream.into_inner()).await.unwrap_err(),
        Err(status) => status,
    };
    check_status(&failed, Code::Unavailable, "the device is gone");
    assert_eq!(health.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    drop(health);
    let error = tokio::time::timeout(PATIENCE, serving).await.unwrap().unwrap().unwrap_err();
    assert!(error.to_string().contains("the device is gone"), "{error}");
}

fn broken_instance() -> Instance {
    let config = tiny_config(Tiny::Qwen2);
    let engine_config = EngineConfig {
        block_size: 16,
        num_blocks: 8,
        max_num_seqs: 2,
        max_num_batched_tokens: 16,
        max_model_len: 64,
        steps_per_look: 1,
        kv: KvPolicy::Recompute,
        enable_prefix_caching: true,
        eos_token_ids: Vec::new(),
        version: PolicyVersion(0),
    };
    let (engine, _) = engine::spawn(engine_config, || Ok(BrokenRunner)).unwrap();
    let (scorer, tokenizer) = (Scorer::new(engine.clone()), Arc::new(byte_tokenizer()));
    Instance {
        outputs: Outputs::new(scorer.clone(), Arc::clone(&tokenizer), 64),
        scorer,
        engine,
        tokenizer,
        limits: Limits { vocab_size: config.vocab_size, max_model_len: 64, eos_token_ids: [].into() },
        manifest_hash: config.manifest().hash(),
        config,
        format: WeightFormat {
            pushed: Kind::Float,
            device: Device::Cpu,
            quantization: aha_core::config::Quantization::None,
        },
        model: "broken".into(),
    }
}
