//! The pool against generators that fail, hang, die, repeat themselves and answer wrongly.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aha_core::config::{Credentials, RunConfig};
use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::random::derive_seed;
use aha_core::rollout::{Group, Prompt, Sampling};
use aha_proto::v1;
use tokio::runtime::{Builder, Runtime};
use tonic::Status;

use super::pool::Progress;
use super::{GeneratorPool, RolloutError, RolloutRequest, Rollouts};
use crate::clients::Connector;
use crate::test_generator::{Generate, TestGenerator, completion};

const SEED: u64 = 7;
const NUM_GENERATIONS: usize = 4;

fn request(prompt_ids: impl IntoIterator<Item = u64>) -> RolloutRequest {
    let prompt = |id| Prompt {
        id: PromptId(id),
        text: String::new(),
        token_ids: vec![1, 2, 3],
        columns: [("target".to_owned(), serde_json::json!(id))].into_iter().collect(),
    };
    RolloutRequest {
        prompts: prompt_ids.into_iter().map(prompt).collect(),
        num_generations: NUM_GENERATIONS,
        sampling: Sampling { max_tokens: 8, ..Sampling::default() },
        seed: SEED,
        rewards: vec!["format".to_owned(), "equation".to_owned()],
        version: PolicyVersion(0),
    }
}

fn runtime() -> Arc<Runtime> {
    Arc::new(Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap())
}

fn connector() -> Connector {
    Connector::new(Credentials::default(), Duration::from_secs(5)).unwrap()
}

fn pool(generators: &[&TestGenerator], deadline_seconds: f64) -> GeneratorPool {
    let mut config = RunConfig::default();
    config.generator.addresses = generators.iter().map(|generator| generator.address.clone()).collect();
    config.rollout.deadline_seconds = deadline_seconds;
    GeneratorPool::connect(&config, &connector(), runtime()).unwrap()
}

/// The completions that a faultless generator gives.
fn tokens(prompt_id: u64) -> Vec<Vec<u32>> {
    let seed = derive_seed(SEED, &[prompt_id]);
    (0..NUM_GENERATIONS as u32).map(|index| vec![(seed % 1000) as u32, index]).collect()
}

#[track_caller]
fn check_groups(groups: &[Group], prompt_ids: impl IntoIterator<Item = u64>) {
    let got: Vec<_> = groups.iter().map(|group| group.prompt.id.0).collect();
    assert_eq!(got, prompt_ids.into_iter().collect::<Vec<_>>());
    for group in groups {
        let got: Vec<_> = group.completions.iter().map(|completion| completion.token_ids.clone()).collect();
        assert_eq!(got, tokens(group.prompt.id.0));
        assert!(group.completions.iter().all(|completion| completion.prompt_id == group.prompt.id));
    }
}

/// Rolls out one prompt on one generator with this script; it must come out whole. Returns what was asked for.
#[track_caller]
fn check_recovers(script: impl IntoIterator<Item = Generate>) -> Vec<Vec<u32>> {
    let generator = TestGenerator::start(script);
    check_groups(&pool(&[&generator], 20.0).roll_out(&request([5])).unwrap(), [5]);
    generator.requests().into_iter().map(|request| request.sample_indices).collect()
}

fn fail(script: Generate, deadline_seconds: f64) -> (RolloutError, TestGenerator) {
    let generator = TestGenerator::start([script]);
    let error = pool(&[&generator], deadline_seconds).roll_out(&request([5])).unwrap_err();
    (error, generator)
}

#[test]
fn groups_are_complete_and_in_order_and_spread_over_the_generators() {
    let generators = [TestGenerator::start([]), TestGenerator::start([])];
    let mut pool = pool(&[&generators[0], &generators[1]], 20.0);
    let progress = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&progress);
    pool.set_on_progress(move |progress| seen.lock().unwrap().push(progress));

    let prompt_ids = [9, 2, 7, 4, 11, 3];
    check_groups(&pool.roll_out(&request(prompt_ids)).unwrap(), prompt_ids);
    let counts = generators.each_ref().map(|generator| generator.requests().len());
    assert_eq!(counts, [3, 3]);
    let total = prompt_ids.len() * NUM_GENERATIONS;
    let expect: Vec<_> = (1..=total).map(|done| Progress { done, total }).collect();
    assert_eq!(*progress.lock().unwrap(), expect);

    let sent = generators[0].requests().remove(0);
    assert_eq!(sent.token_ids, [1, 2, 3]);
    assert_eq!(sent.columns, format!("{{\"target\":{}}}", sent.prompt_id));
    assert_eq!(sent.sampling.unwrap().max_tokens, 8);
}

#[test]
fn only_what_is_missing_is_asked_for_again() {
    let all = vec![0, 1, 2, 3];
    assert_eq!(check_recovers([Generate::Fail(2, Status::unavailable("going down"))]), [all.clone(), vec![2, 3]]);
    assert_eq!(check_recovers([Generate::Fail(0, Status::internal("lost"))]), [all.clone(), all.clone()]);
    assert_eq!(check_recovers([Generate::End(3), Generate::End(0)]), [all.clone(), vec![3], vec![3]]);
    assert_eq!(check_recovers([Generate::Aborted]), [all.clone(), all.clone()]);
}

#[test]
fn what_comes_twice_counts_once() {
    assert_eq!(check_recovers([Generate::Twice]), [[0, 1, 2, 3]]);
}

#[test]
fn the_debts_of_a_dead_generator_go_to_another() {
    let dying = TestGenerator::start((0..8).map(|_| Generate::Hang(1)));
    let other = TestGenerator::start([]);
    let mut pool = pool(&[&dying, &other], 30.0);
    // Prompts of both generators; the first dies when it has sent one completion of each of its own.
    let (sender, receiver) = std::sync::mpsc::channel();
    pool.set_on_progress(move |progress| {
        if progress.done == 3 + 3 * NUM_GENERATIONS {
            sender.send(()).unwrap();
        }
    });
    let groups = std::thread::scope(|scope| {
        let rolling = scope.spawn(|| pool.roll_out(&request(0..6)));
        receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        dying.kill();
        rolling.join().unwrap().unwrap()
    });
    check_groups(&groups, 0..6);
    let asked_again: Vec<_> = other
        .requests()
        .into_iter()
        .map(|request| request.sample_indices)
        .filter(|indices| indices.len() == 3)
        .collect();
    // How many prompts each has depends on how fast the other is.
    assert_eq!(asked_again, vec![[1, 2, 3]; dying.requests().len()]);
}

#[test]
fn a_hanging_generator_is_named_at_the_deadline() {
    let started = Instant::now();
    let (error, generator) = fail(Generate::Hang(1), 0.3);
    assert!(started.elapsed() < Duration::from_secs(10));
    let message = error.to_string();
    let expect = format!("generator {} owes 3 of 4 completions of prompt 5 after 0.3 s", generator.address);
    assert!(matches!(error, RolloutError::Deadline { .. }) && message.contains(&expect), "{message}");
}

#[test]
fn a_generator_that_never_recovers_is_given_up_at_the_deadline() {
    let generator = TestGenerator::start((0..100).map(|_| Generate::Fail(0, Status::unavailable("full"))));
    let error = pool(&[&generator], 0.4).roll_out(&request([5])).unwrap_err();
    assert!(matches!(error, RolloutError::Deadline { missing: 4, .. }), "{error}");
    assert!(generator.requests().len() > 1);
}

#[test]
fn a_refused_request_is_not_repeated() {
    let (error, generator) = fail(Generate::Fail(0, Status::invalid_argument("token_ids: 99999 is no token")), 20.0);
    assert!(matches!(error, RolloutError::Refused { .. }), "{error}");
    let message = error.to_string();
    assert!(
        message.contains(&generator.address) && message.contains("prompt 5") && message.contains("99999"),
        "{message}"
    );
    assert_eq!(generator.requests().len(), 1);
}

#[test]
fn a_version_that_was_not_published_is_refused() {
    let (error, generator) = fail(Generate::Version(3), 20.0);
    let expect =
        format!("generator {} sampled prompt 5 with policy v3, but v0 was published to it last", generator.address);
    assert_eq!(error.to_string(), expect);
    assert_eq!(generator.requests().len(), 1);
}

#[track_caller]
fn check_malformed(spoil: impl FnOnce(&mut v1::Completion), problem: &str) {
    let request = v1::GenerateRequest {
        prompt_id: 5,
        rewards: vec!["format".to_owned(), "equation".to_owned()],
        ..Default::default()
    };
    let mut bad = completion(&request, 3, 0);
    spoil(&mut bad);
    let (error, generator) = fail(Generate::Send(bad), 20.0);
    let message = error.to_string();
    assert!(matches!(error, RolloutError::BadCompletion { .. }) && message.contains(problem), "{message}");
    assert!(message.contains(&generator.address) && message.contains("prompt 5"), "{message}");
}

#[test]
fn completions_that_make_no_sense_are_refused() {
    check_malformed(|bad| bad.prompt_id = 6, "it answers prompt 6");
    check_malformed(|bad| bad.sample_index = 4, "nobody asked for sample 4");
    check_malformed(|bad| bad.logprobs[0] = f32::NAN, "sample 3 has a token with log-prob NaN");
    check_malformed(|bad| bad.logprobs.truncate(1), "logprobs: 1 for 2 tokens");
    check_malformed(|bad| bad.spans.clear(), "spans: cover 0 of 2 tokens");
    check_malformed(|bad| drop(bad.rewards.pop()), "has rewards [\"format\"] where [\"format\", \"equation\"]");
    check_malformed(|bad| bad.rewards[0].score = f32::INFINITY, "scores inf in \"format\"");
    check_malformed(
        |bad| {
            bad.token_ids = vec![1; 9];
            bad.logprobs = vec![0.0; 9];
            bad.spans[0].num_tokens = 9;
        },
        "has 9 tokens, over the 8 that were asked for",
    );
    check_malformed(
        |bad| {
            bad.token_ids.clear();
            bad.logprobs.clear();
            bad.spans.clear();
        },
        "has no tokens",
    );
}

#[test]
fn the_published_version_is_taken() {
    let generator = TestGenerator::start([]);
    generator.set_version(4);
    let request = RolloutRequest { version: PolicyVersion(4), ..request([1]) };
    check_groups(&pool(&[&generator], 20.0).roll_out(&request).unwrap(), [1]);
}

#[test]
fn a_pool_needs_generators_that_answer() {
    let mut config = RunConfig::default();
    assert!(matches!(GeneratorPool::connect(&config, &connector(), runtime()), Err(RolloutError::NoGenerators)));
    let gone = TestGenerator::start([]);
    gone.kill();
    config.generator.addresses = vec![gone.address.clone()];
    config.generator.connect_timeout_seconds = 0.3;
    let message = GeneratorPool::connect(&config, &connector(), runtime()).unwrap_err().to_string();
    assert!(message.contains(&gone.address) && message.contains("did not answer for 0."), "{message}");
}
