//! Generators that refuse, hang, die and come back, over real Gloo groups: trainers as threads, generators as services in
//! this process.

use aha_core::ids::PromptId;
use aha_core::rollout::{Origin, Prompt, Sampling};
use aha_nn::model_config::ModelConfig;
use aha_nn::weights::Weights;
use tch::{Device, Kind};
use tonic::Status;

use super::*;
use crate::test_generator::{Generate, TestGenerator, Update};
use crate::test_ranks::run_ranks;

const NUM_TRAINERS: usize = 2;
const PUSH_TIMEOUT: Duration = Duration::from_secs(3);

fn model() -> ModelConfig {
    let raw = serde_json::json!({"model_type": "qwen2", "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2});
    ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap()
}

fn weights() -> Weights {
    Weights::random(&model(), 1, NUM_TRAINERS, Kind::Float, Device::Cpu)
}

fn generators(scripts: impl IntoIterator<Item = Vec<Generate>>) -> Vec<TestGenerator> {
    let start = |script| TestGenerator::with_manifest(script, weights().manifest, Update::Take);
    scripts.into_iter().map(start).collect()
}

/// What every rank makes of its fleet.
fn with_fleets<T: Send>(
    generators: &[TestGenerator],
    rank: impl Fn(Fleet, &ProcessGroup, &Weights) -> T + Sync,
) -> Vec<T> {
    let mut config = RunConfig::default();
    config.generator.addresses = generators.iter().map(|generator| generator.address.clone()).collect();
    config.generator.connect_timeout_seconds = 4.0;
    config.generator.probe_timeout_seconds = 0.5;
    config.rollout.deadline_seconds = 60.0;
    config.train.push_timeout_seconds = PUSH_TIMEOUT.as_secs_f64();
    run_ranks(NUM_TRAINERS, |trainers| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let weights = weights();
        let fleet = Fleet::connect(&config, &trainers, &weights, Credentials::default(), Arc::new(runtime)).unwrap();
        rank(fleet, &trainers, &weights)
    })
}

/// Publishes version 1, lets rank 0 do something, and publishes version 2; returns the generators that then take part.
#[track_caller]
fn check_goes_on(generators: &[TestGenerator], between: impl Fn() + Sync, serving: &[u64]) {
    let counts = with_fleets(generators, |mut fleet, trainers, weights| {
        fleet.publish(trainers, weights, PolicyVersion(1)).unwrap();
        assert_eq!(fleet.num_generators(), generators.len());
        if trainers.rank() == 0 {
            between();
        }
        trainers.barrier().unwrap();
        fleet.publish(trainers, weights, PolicyVersion(2)).unwrap();
        fleet.num_generators()
    });
    let versions: Vec<u64> = generators.iter().map(|generator| generator.serving().0).collect();
    assert_eq!(versions, serving);
    assert_eq!(counts, [serving.iter().filter(|version| **version == 2).count(); NUM_TRAINERS]);
}

#[test]
fn a_generator_that_has_died_is_left_out() {
    let generators = generators([vec![], vec![], vec![]]);
    check_goes_on(&generators, || generators[1].kill(), &[2, 1, 2]);
}

#[test]
fn a_generator_that_was_started_again_gets_the_policy() {
    let generators = generators([vec![], vec![]]);
    let again = || {
        generators[0].kill();
        generators[0].restart();
    };
    check_goes_on(&generators, again, &[2, 2]);
}

#[test]
fn a_push_that_a_generator_refuses_is_repeated_without_it() {
    let generators = generators([vec![], vec![]]);
    check_goes_on(&generators, || generators[1].set_update(Update::Refuse(Status::internal("no memory"))), &[2, 1]);
}

#[test]
fn a_push_that_a_generator_holds_up_is_repeated_without_it() {
    let generators = generators([vec![], vec![]]);
    let started = Instant::now();
    check_goes_on(&generators, || generators[0].set_update(Update::Hang), &[1, 2]);
    assert!(started.elapsed() < 5 * PUSH_TIMEOUT, "{:?}", started.elapsed());
}

#[test]
fn a_generator_that_came_back_takes_part_again() {
    let generators = generators([vec![], vec![]]);
    with_fleets(&generators, |mut fleet, trainers, weights| {
        fleet.publish(trainers, weights, PolicyVersion(1)).unwrap();
        for (version, acts) in [(2, TestGenerator::kill as fn(&TestGenerator)), (3, TestGenerator::restart)] {
            if trainers.rank() == 0 {
                acts(&generators[1]);
            }
            trainers.barrier().unwrap();
            fleet.publish(trainers, weights, PolicyVersion(version)).unwrap();
        }
        let mut version = 3;
        // It is left alone for a while after it was missed.
        while fleet.num_generators() < 2 {
            assert!(version < 100, "it never took part again");
            std::thread::park_timeout(Duration::from_millis(100));
            version += 1;
            fleet.publish(trainers, weights, PolicyVersion(version)).unwrap();
        }
    });
    assert_eq!(generators[0].serving(), generators[1].serving());
}

#[test]
fn without_any_generator_all_ranks_stop_in_time() {
    let generators = generators([vec![], vec![]]);
    let started = Instant::now();
    let errors = with_fleets(&generators, |mut fleet, trainers, weights| {
        fleet.publish(trainers, weights, PolicyVersion(1)).unwrap();
        if trainers.rank() == 0 {
            generators.iter().for_each(TestGenerator::kill);
        }
        trainers.barrier().unwrap();
        fleet.publish(trainers, weights, PolicyVersion(2)).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("no generator has answered for ") && error.contains(&generators[1].address), "{error}");
    }
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

fn request(rank: usize) -> RolloutRequest {
    let prompt = |id| Prompt {
        id: PromptId(id),
        text: String::new(),
        token_ids: vec![1, 2, 3],
        columns: serde_json::Map::new(),
        origin: Origin::default(),
    };
    RolloutRequest {
        prompts: (0..3).map(|index| prompt(10 * rank as u64 + index)).collect(),
        num_generations: 4,
        sampling: Sampling { max_tokens: 8, ..Sampling::default() },
        seed: 7,
        rewards: Vec::new(),
        min_version: PolicyVersion(5),
    }
}

/// Rolls out on all ranks; returns what each generator was asked for: prompt and samples.
fn roll_out(generators: &[TestGenerator], between: impl Fn() + Sync) -> Vec<Vec<(u64, Vec<u32>)>> {
    let groups = with_fleets(generators, |mut fleet, trainers, weights| {
        fleet.publish(trainers, weights, PolicyVersion(5)).unwrap();
        if trainers.rank() == 0 {
            between();
        }
        trainers.barrier().unwrap();
        let groups = fleet.roll_out(trainers, (weights, PolicyVersion(5)), &request(trainers.rank())).unwrap();
        groups.into_iter().map(Option::unwrap).collect::<Vec<_>>()
    });
    for (rank, groups) in groups.into_iter().enumerate() {
        assert_eq!(groups.len(), 3);
        for (index, group) in groups.into_iter().enumerate() {
            assert_eq!(group.prompt.id.0, (10 * rank + index) as u64);
            let samples: Vec<u32> = group.completions.iter().map(|completion| completion.sample_index).collect();
            assert_eq!(samples, [0, 1, 2, 3], "every sample once");
            let versions = group.completions.iter().flat_map(|completion| &completion.spans).map(|span| span.version.0);
            assert!(versions.into_iter().all(|version| version == 5));
        }
    }
    let asked = |generator: &TestGenerator| {
        generator.requests().into_iter().map(|request| (request.prompt_id, request.sample_indices)).collect()
    };
    generators.iter().map(asked).collect()
}

#[test]
fn a_rollout_whose_only_generator_was_started_again_gets_the_policy_and_goes_on() {
    let generators = generators([vec![]]);
    let asked = roll_out(&generators, || {
        generators[0].kill();
        generators[0].restart();
    });
    assert!(asked[0].len() > 6, "those of the old policy were refused: {asked:?}");
    assert_eq!(generators[0].serving().0, 5);
}

#[test]
fn what_a_lost_generator_sent_is_not_asked_for_again() {
    // Whichever prompt comes first gets two completions before the call is lost.
    let generators = generators([vec![Generate::Fail(2, Status::unavailable("going down"))]]);
    let asked = roll_out(&generators, || ());
    let again: Vec<_> = asked[0].iter().filter(|(_, samples)| samples.len() < 4).collect();
    assert_eq!((asked[0].len(), again.len()), (7, 1));
    assert_eq!(again[0].1, [2, 3]);
}

#[test]
fn rollouts_of_later_steps_begin_early_and_go_on_through_pushes() {
    // The first calls are lost after two completions, so that some of each prompt comes from the next policy.
    let generators = generators([(0..6).map(|_| Generate::Hang(2)).collect()]);
    let request = |rank| RolloutRequest { min_version: PolicyVersion(4), ..request(rank) };
    let groups = with_fleets(&generators, |mut fleet, trainers, weights| {
        fleet.publish(trainers, weights, PolicyVersion(4)).unwrap();
        fleet.begin(1, &request(trainers.rank()), &[]);
        assert_eq!(fleet.num_ahead(), 1);
        let deadline = Instant::now() + Duration::from_secs(20);
        while fleet.received()[0].completions.len() < 6 {
            assert!(Instant::now() < deadline, "nothing comes before it is waited for");
            std::thread::park_timeout(Duration::from_millis(5));
        }
        trainers.barrier().unwrap();
        if trainers.rank() == 0 {
            // Whom the calls are lost to.
            generators[0].kill();
            generators[0].restart();
        }
        trainers.barrier().unwrap();
        fleet.publish(trainers, weights, PolicyVersion(5)).unwrap();
        let groups = fleet.roll_out(trainers, (weights, PolicyVersion(5)), &request(trainers.rank())).unwrap();
        assert_eq!(fleet.num_ahead(), 0);
        groups
    });
    for group in groups.into_iter().flatten() {
        let versions = |completion: &Completion| completion.spans[0].version.0;
        let versions: Vec<u64> = group.unwrap().completions.iter().map(versions).collect();
        assert_eq!(versions, [4, 4, 5, 5]);
    }
}

#[test]
fn a_coordinator_waits_for_its_name_and_listens_where_it_may() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let entered = runtime.enter();
    let connector = Connector::new(Credentials::default(), Duration::from_secs(1)).unwrap();
    let run = || coordinator::Run { name: "r".to_owned(), max_steps: 1, manifest_hash: 1 };
    let serve =
        |address: &str| coordinator::serve((address, Duration::from_millis(600)), &connector, run(), &runtime).err();
    assert!(serve("localhost:0").is_none());
    let started = Instant::now();
    let unknown = serve("no such host:1").unwrap().to_string();
    assert!(unknown.starts_with("no such host is not known (") && unknown.contains("check the name"), "{unknown}");
    assert!(started.elapsed() >= Duration::from_millis(600), "it was asked for once");
    let open = serve("0.0.0.0:0").unwrap().to_string();
    assert!(open.starts_with("generator.coordinator: 0.0.0.0:") && open.contains("AHA_TOKEN"), "{open}");
    let nothing = serve("nowhere").unwrap().to_string();
    assert!(nothing.contains("not host:port"), "{nothing}");
    drop(entered);
}
