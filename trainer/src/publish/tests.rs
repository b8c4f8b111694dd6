//! Pushes over real Gloo groups: trainers as threads, generators as services in this process.

use aha_core::config::{Credentials, InitLoraWeights, SleepMode, TargetModule};
use aha_core::manifest::Manifest;
use aha_nn::lora::{AdapterSpec, Merged, fresh_adapters};
use aha_nn::model_config::ModelConfig;
use aha_nn::weights::Weights;
use futures::future::try_join_all;
use tonic::Status;

use super::*;
use crate::clients::Connector;
use crate::test_generator::{TestGenerator, Update};
use crate::test_ranks::run_ranks;
use crate::torch::parameters::Parameters;

const TIMEOUT: Duration = Duration::from_secs(20);

fn model() -> ModelConfig {
    let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
    ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
}

fn weights(seed: u64, world_size: usize) -> Weights {
    Weights::random(&model(), seed, world_size, Kind::Float, Device::Cpu)
}

fn generators(updates: impl IntoIterator<Item = Update>) -> Vec<TestGenerator> {
    updates.into_iter().map(|update| TestGenerator::with_manifest([], weights(0, 1).manifest, update)).collect()
}

/// The bytes of the units, without padding.
fn bytes(weights: &Weights) -> Vec<Vec<u8>> {
    let unit = |(unit_idx, numel)| tensor_data::bytes(&weights.flat(unit_idx).narrow(0, 0, numel)).to_vec();
    weights.manifest.units.iter().map(|unit| unit.numel() as i64).enumerate().map(unit).collect()
}

fn runtime() -> Arc<Runtime> {
    Arc::new(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap())
}

fn connector() -> Connector {
    Connector::new(Credentials::default(), TIMEOUT).unwrap()
}

/// What every rank makes of its publisher.
fn with_publishers<T: Send>(
    num_trainers: usize,
    timeout: Duration,
    generators: &[TestGenerator],
    rank: impl Fn(Result<Publisher, PublishError>, &Weights) -> T + Sync,
) -> Vec<T> {
    run_ranks(num_trainers, |trainers| {
        let runtime = runtime();
        let connector = connector();
        let connecting = generators.iter().map(|generator| connector.connect(&generator.address, TIMEOUT));
        let clients = runtime.block_on(try_join_all(connecting)).unwrap();
        let weights = weights(1, num_trainers);
        // Buckets smaller than units, so that a unit comes in several.
        let limits = Limits { timeout, bucket_bytes: 1000, backend: PushBackend::Auto, sleep_mode: SleepMode::Cache };
        rank(Publisher::join_within(limits, &trainers, &weights, &clients, runtime), &weights)
    })
}

#[test]
fn every_generator_serves_what_was_pushed() {
    for (num_trainers, num_generators) in [(1, 1), (2, 2), (3, 1)] {
        let generators = generators(vec![Update::Take; num_generators]);
        let reports = with_publishers(num_trainers, TIMEOUT, &generators, |publisher, weights| {
            let mut publisher = publisher.unwrap();
            let first = publisher.publish(&self::weights(2, num_trainers), PolicyVersion(7)).unwrap();
            let last = publisher.publish(weights, PolicyVersion(8)).unwrap();
            [first, last]
        });
        let weights = weights(1, num_trainers);
        for generator in &generators {
            assert_eq!(generator.serving(), (8, bytes(&weights)));
        }
        for report in reports.into_iter().flatten() {
            assert_eq!(report.bytes, 4 * weights.manifest.numel() as u64);
            assert_eq!((report.receive_seconds, report.swap_seconds), (0.25, 0.125));
            assert!(report.seconds > 0.0);
        }
    }
}

#[test]
fn a_generator_that_cannot_sleep_is_named_on_all_ranks() {
    let generators = generators([Update::Take]);
    for (rank, error) in
        with_publishers(2, TIMEOUT, &generators, |publisher, _| publisher.unwrap().sleep().unwrap_err().to_string())
            .into_iter()
            .enumerate()
    {
        let named = error.contains(&generators[0].address) && error.contains("cannot sleep");
        assert!(named, "rank {rank}: {error}");
    }
}

#[test]
fn adapters_arrive_merged_into_their_base() {
    let targets = vec![TargetModule::K, TargetModule::Down];
    let spec = AdapterSpec { r: 3, alpha: 6.0, use_rslora: false, targets };
    let adapters = fresh_adapters(&model(), &spec, (InitLoraWeights::Gaussian, 2), (2, Device::Cpu));
    // Each unit is one of its own: W + 2 B A, where B is a number more than 0.
    let expect = weights(1, 1);
    for layer_idx in 0..adapters.num_units() {
        for (pair, name) in adapters.views(layer_idx).chunks(2).zip(["k_proj.weight", "down_proj.weight"]) {
            let mut b = pair[1].shallow_clone();
            tch::no_grad(|| b += 0.1 + layer_idx as f64);
            let params = &expect.manifest.units[1 + layer_idx].params;
            let param_idx = params.iter().position(|param| param.name.ends_with(name)).unwrap();
            let mut weight = expect.views(1 + layer_idx).remove(param_idx);
            tch::no_grad(|| weight += b.matmul(&pair[0]) * 2.0);
        }
    }
    for num_trainers in [1, 2] {
        let generators = generators([Update::Take]);
        let adapters = std::sync::Mutex::new(adapters.copy());
        with_publishers(num_trainers, TIMEOUT, &generators, |publisher, base| {
            let adapters = adapters.lock().unwrap().copy();
            let merged = Merged { base, spec: &spec, adapters: &adapters };
            let report = publisher.unwrap().publish(&merged, PolicyVersion(4)).unwrap();
            assert_eq!(report.bytes, 4 * base.manifest.numel() as u64);
        });
        assert_eq!(generators[0].serving(), (4, bytes(&expect)));
    }
}

#[test]
fn shared_weights_are_pushed_as_if_each_had_them_whole() {
    for num_trainers in [2, 3] {
        let generators = generators([Update::Take]);
        run_ranks(num_trainers, |trainers| {
            let runtime = runtime();
            let client = runtime.block_on(connector().connect(&generators[0].address, TIMEOUT)).unwrap();
            let trainers = Arc::new(trainers);
            let shared = Parameters::of(3.into(), &trainers, weights(1, num_trainers));
            let limits = Limits {
                timeout: TIMEOUT,
                bucket_bytes: 1000,
                backend: PushBackend::Auto,
                sleep_mode: SleepMode::Cache,
            };
            let publisher = Publisher::join_within(limits, &trainers, &shared, &[client], runtime);
            publisher.unwrap().publish(&shared, PolicyVersion(4)).unwrap();
            assert_eq!(shared.most_gathered(), 2);
        });
        assert_eq!(generators[0].serving(), (4, bytes(&weights(1, num_trainers))));
    }
}

#[test]
fn a_generator_that_fails_ends_the_push_of_shared_weights_on_all_ranks() {
    let refusal = Update::Refuse(Status::failed_precondition("no room"));
    let generators = generators([Update::Take, refusal]);
    let started = Instant::now();
    let messages = run_ranks(2, |trainers| {
        let runtime = runtime();
        let connector = connector();
        let connecting = generators.iter().map(|generator| connector.connect(&generator.address, TIMEOUT));
        let clients = runtime.block_on(try_join_all(connecting)).unwrap();
        let trainers = Arc::new(trainers);
        let shared = Parameters::of(3.into(), &trainers, weights(1, 2));
        let limits =
            Limits { timeout: TIMEOUT, bucket_bytes: 1000, backend: PushBackend::Auto, sleep_mode: SleepMode::Cache };
        let mut publisher = Publisher::join_within(limits, &trainers, &shared, &clients, runtime).unwrap();
        let message = publisher.publish(&shared, PolicyVersion(4)).unwrap_err().to_string();
        // What the ranks share can still be put together: nobody left a gather out.
        assert!(crate::test_ranks::flatten(&shared).numel() > 0);
        message
    });
    assert!(messages[0].contains(&generators[1].address), "{messages:?}");
    assert!(started.elapsed() < TIMEOUT, "{:?}", started.elapsed());
}

/// As from a GPU: the group's tensors are in host memory, and the weights are not.
#[test]
fn staged_weights_arrive_as_they_are() {
    for num_trainers in [1, 2] {
        let generators = generators([Update::Take]);
        with_publishers(num_trainers, TIMEOUT, &generators, |publisher, weights| {
            let mut publisher = publisher.unwrap();
            let longest = publisher.buckets.iter().map(|bucket| bucket.numel).max().unwrap();
            publisher.scratch = Tensor::full([longest as i64], f64::NAN, (Kind::Float, Device::Cpu));
            publisher.is_staged = true;
            publisher.publish(weights, PolicyVersion(3)).unwrap();
        });
        assert_eq!(generators[0].serving(), (3, bytes(&weights(1, num_trainers))));
    }
}

#[test]
fn generators_learn_what_is_pushed_and_by_what() {
    let generators = generators([Update::Take]);
    with_publishers(2, TIMEOUT, &generators, |publisher, _| drop(publisher.unwrap()));
    let joined = generators[0].joined().unwrap();
    assert_eq!((joined.backend(), joined.dtype()), (v1::PushBackend::Gloo, v1::WeightType::Float32));
}

#[test]
fn weights_are_pushed_in_the_type_that_generators_take() {
    let manifest = weights(0, 1).manifest;
    let generators = [TestGenerator::with_dtype([], manifest, Update::Take, v1::WeightType::Bfloat16)];
    let reports = with_publishers(2, TIMEOUT, &generators, |publisher, weights| {
        publisher.unwrap().publish(weights, PolicyVersion(3)).unwrap()
    });
    let exact = weights(1, 2);
    let halves = Weights::zeros(exact.manifest.clone(), 2, Kind::BFloat16, Device::Cpu);
    for unit_idx in 0..exact.num_units() {
        tch::no_grad(|| halves.flat(unit_idx).shallow_clone().copy_(exact.flat(unit_idx)));
    }
    assert_eq!(generators[0].serving(), (3, bytes(&halves)));
    assert_eq!(reports[1].bytes, 2 * exact.manifest.numel() as u64);
}

#[test]
fn generators_that_take_different_types_are_refused() {
    let other = TestGenerator::with_dtype([], weights(0, 1).manifest, Update::Take, v1::WeightType::Bfloat16);
    let mut generators = generators([Update::Take]);
    generators.push(other);
    let messages = with_publishers(1, TIMEOUT, &generators, |publisher, _| publisher.unwrap_err().to_string());
    let expect = format!("generator {} takes weights as WEIGHT_TYPE_BFLOAT16", generators[1].address);
    assert!(messages[0].contains(&expect), "{}", messages[0]);
}

#[test]
fn nccl_without_gpus_is_refused_on_all_ranks() {
    let generators = generators([Update::Take]);
    let messages = run_ranks(2, |trainers| {
        let runtime = runtime();
        let client = runtime.block_on(connector().connect(&generators[0].address, TIMEOUT)).unwrap();
        let limits =
            Limits { timeout: TIMEOUT, bucket_bytes: 1000, backend: PushBackend::Nccl, sleep_mode: SleepMode::Cache };
        Publisher::join_within(limits, &trainers, &weights(1, 2), &[client], runtime).unwrap_err().to_string()
    });
    assert!(messages.iter().all(|message| message.contains("train.push_backend is nccl")), "{messages:?}");
}

/// How long a push may take that fails at once: long beside such a push, short beside [`TIMEOUT`].
const AT_ONCE: Duration = Duration::from_secs(8);

/// Pushes to generators of which the last one fails: all ranks must fail in time, naming it. `before_push` is called when
/// everybody has joined.
#[track_caller]
fn check_fails(
    (num_trainers, timeout, in_time): (usize, Duration, Duration),
    generators: &[TestGenerator],
    before_push: impl Fn() + Sync,
    expect: &str,
) {
    let outcomes = with_publishers(num_trainers, timeout, generators, |publisher, weights| {
        let mut publisher = publisher.unwrap();
        before_push();
        let started = Instant::now();
        let error = publisher.publish(weights, PolicyVersion(1)).unwrap_err();
        (error.to_string(), started.elapsed())
    });
    let expect = format!("generator {} {expect}", generators.last().unwrap().address);
    let first = &outcomes[0].0;
    assert!(first.contains("the push of v1 failed after") && first.contains(&expect), "{first}");
    for (message, elapsed) in &outcomes {
        assert!(*elapsed < in_time, "after {elapsed:?}: {message}");
        assert!(!message.is_empty());
    }
}

#[test]
fn a_generator_that_refuses_is_named_at_once() {
    let others = [(1, vec![]), (1, vec![Update::Take]), (2, vec![Update::Take]), (3, vec![]), (2, vec![Update::Hang])];
    for (num_trainers, others) in others {
        let refusal = Update::Refuse(Status::failed_precondition("no such group"));
        let generators = generators(others.into_iter().chain([refusal]));
        let expect = "failed: the system is not in a state required for the operation's execution: no such group";
        check_fails((num_trainers, TIMEOUT, AT_ONCE), &generators, || (), expect);
    }
}

#[test]
fn a_generator_that_dies_before_the_push_is_named_at_once() {
    for num_trainers in [1, 2] {
        let generators = generators([Update::Take, Update::Take]);
        check_fails((num_trainers, TIMEOUT, AT_ONCE), &generators, || generators[1].kill(), "failed: ");
    }
}

#[test]
fn a_generator_that_serves_something_else_is_named() {
    let generators = generators([Update::Take, Update::AnswerVersion(5)]);
    check_fails((2, TIMEOUT, AT_ONCE), &generators, || (), "serves v5 after the push of v1");
}

#[test]
fn a_generator_that_hangs_is_named_at_the_deadline() {
    let generators = generators([Update::Take, Update::Hang]);
    let timeout = Duration::from_secs(2);
    check_fails((2, timeout, 3 * timeout + AT_ONCE), &generators, || (), "has not answered for 3.0 s");
}

#[test]
fn a_generator_that_never_joins_is_named_at_the_deadline() {
    let generators = generators([Update::Take, Update::NeverJoin]);
    let timeout = Duration::from_secs(2);
    let messages = with_publishers(2, timeout, &generators, |publisher, _| publisher.unwrap_err().to_string());
    assert!(messages.iter().all(|message| message.contains("rank [3] did not come within 2.0 s")), "{messages:?}");
    // Rank 0 may hear of it first from the generator that did join, which does not know the other's address.
    for expect in ["ranks from 2 on are the generators", &generators[1].address] {
        assert!(messages.iter().any(|message| message.contains(expect)), "no {expect:?} in: {messages:?}");
    }
}

#[test]
fn a_generator_with_another_model_is_named_before_anyone_waits() {
    let mut generators = generators([Update::Take]);
    generators.push(TestGenerator::with_manifest([], Manifest { units: Vec::new() }, Update::Take));
    let messages = with_publishers(2, TIMEOUT, &generators, |publisher, _| publisher.unwrap_err().to_string());
    let expect = format!("generator {} has another model", generators[1].address);
    assert!(messages[0].contains(&expect), "{}", messages[0]);
    assert!(messages[1].starts_with("rank 0: ") && messages[1].contains(&expect), "{}", messages[1]);
}

#[test]
fn without_generators_there_is_nobody_to_publish_to() {
    let errors = with_publishers(1, TIMEOUT, &[], |publisher, _| publisher.unwrap_err());
    assert!(matches!(errors[0], PublishError::NoGenerators));
}
