//! The pool against generators that fail, hang, die, repeat themselves and answer wrongly.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aha_core::config::{Credentials, RunConfig};
use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::random::derive_seed;
use aha_core::reward::RewardSpec;
use aha_core::rollout::{Completion, Group, Origin, Prompt, Sampling};
use aha_proto::v1;
use tokio::runtime::{Builder, Runtime};
use tonic::Status;

use super::pool::Progress;
use super::{GeneratorPool, Late, Ledger, RolloutError, RolloutRequest};
use crate::clients::Connector;
use crate::rewarders::Rewarders;
use crate::test_generator::{Generate, TestGenerator, completion};

const SEED: u64 = 7;
const NUM_GENERATIONS: usize = 4;

fn request(prompt_ids: impl IntoIterator<Item = u64>) -> RolloutRequest {
    let prompt = |id| Prompt {
        id: PromptId(id),
        text: String::new(),
        token_ids: vec![1, 2, 3],
        columns: [("target".to_owned(), serde_json::json!(id))].into_iter().collect(),
        origin: Origin::default(),
    };
    RolloutRequest {
        prompts: prompt_ids.into_iter().map(prompt).collect(),
        num_generations: NUM_GENERATIONS,
        sampling: Sampling { max_tokens: 8, ..Sampling::default() },
        seed: SEED,
        rewards: ["format", "equation"].map(RewardSpec::of).to_vec(),
        min_version: PolicyVersion(0),
    }
}

const PATIENCE: Duration = Duration::from_secs(20);

/// What comes of a request on these generators.
fn roll_out(generators: &[&TestGenerator], request: RolloutRequest) -> Result<Vec<Group>, RolloutError> {
    let ledger = Arc::new(Ledger::new(request, PATIENCE));
    let pool = pool(generators);
    let late = pool.wait(pool.begin(&ledger))?;
    assert_eq!(late, []);
    Ok(ledger.take_groups().into_iter().map(Option::unwrap).collect())
}

/// What one generator with this script does not send in time of one prompt's completions.
fn late(script: impl IntoIterator<Item = Generate>, deadline: Duration) -> (Vec<Late>, TestGenerator) {
    let generator = TestGenerator::start(script);
    let ledger = Arc::new(Ledger::new(request([5]), deadline));
    let pool = pool(&[&generator]);
    let late = pool.wait(pool.begin(&ledger)).unwrap();
    assert_eq!(ledger.take_groups(), [None]);
    (late, generator)
}

fn runtime() -> Arc<Runtime> {
    Arc::new(Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap())
}

fn connector() -> Connector {
    Connector::new(Credentials::default(), Duration::from_secs(5)).unwrap()
}

fn pool(generators: &[&TestGenerator]) -> GeneratorPool {
    let mut config = RunConfig::default();
    config.generator.addresses = generators.iter().map(|generator| generator.address.clone()).collect();
    GeneratorPool::connect(&config, &connector(), Rewarders::default(), runtime()).unwrap()
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
    check_groups(&roll_out(&[&generator], request([5])).unwrap(), [5]);
    generator.requests().into_iter().map(|request| request.sample_indices).collect()
}

fn fail(script: Generate) -> (RolloutError, TestGenerator) {
    let generator = TestGenerator::start([script]);
    let error = roll_out(&[&generator], request([5])).unwrap_err();
    (error, generator)
}

#[test]
fn groups_are_complete_and_in_order_and_spread_over_the_generators() {
    let generators = [TestGenerator::start([]), TestGenerator::start([])];
    let mut pool = pool(&[&generators[0], &generators[1]]);
    let progress = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&progress);
    pool.set_on_progress(move |progress| seen.lock().unwrap().push(progress));

    let prompt_ids = [9, 2, 7, 4, 11, 3];
    let ledger = Arc::new(Ledger::new(request(prompt_ids), PATIENCE));
    assert_eq!(pool.wait(pool.begin(&ledger)).unwrap(), []);
    let groups: Vec<Group> = ledger.take_groups().into_iter().flatten().collect();
    check_groups(&groups, prompt_ids);
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
fn a_prompt_s_source_decides_which_rewards_are_asked() {
    let generator = TestGenerator::start([]);
    let mut request = request([5, 6]);
    request.prompts[1].origin =
        Origin { source: "math".to_owned(), rewards: Some(vec!["equation".to_owned(), "other".to_owned()]) };
    let groups = roll_out(&[&generator], request).unwrap();
    let names = |group: &Group| -> Vec<String> {
        group.completions[0].rewards.iter().map(|reward| reward.function.clone()).collect()
    };
    assert_eq!(groups.iter().map(names).collect::<Vec<_>>(), [vec!["format", "equation"], vec!["equation"]]);
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
    let mut pool = pool(&[&dying, &other]);
    // Prompts of both generators; the first dies when it has sent one completion of each of its own.
    let (sender, receiver) = std::sync::mpsc::channel();
    pool.set_on_progress(move |progress| {
        if progress.done == 3 + 3 * NUM_GENERATIONS {
            sender.send(()).unwrap();
        }
    });
    let ledger = Arc::new(Ledger::new(request(0..6), Duration::from_secs(60)));
    let filling = pool.begin(&ledger);
    receiver.recv_timeout(PATIENCE).unwrap();
    dying.kill();
    assert_eq!(pool.wait(filling).unwrap(), []);
    let groups: Vec<Group> = ledger.take_groups().into_iter().flatten().collect();
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
    let (late, generator) = late([Generate::Hang(1)], Duration::from_millis(300));
    assert!(started.elapsed() < Duration::from_secs(10));
    let message = late[0].to_string();
    let expect = format!("generator {} owes 3 of 4 completions of prompt 5 after 0.3 s", generator.address);
    assert!(message.contains(&expect), "{message}");
}

#[test]
fn a_generator_that_never_recovers_is_given_up_at_the_deadline() {
    let script = (0..100).map(|_| Generate::Fail(0, Status::unavailable("full")));
    let (late, generator) = late(script, Duration::from_millis(400));
    assert_eq!(late[0].missing, 4);
    assert!(generator.requests().len() > 1);
}

#[test]
fn what_a_slow_generator_owes_is_asked_of_another_at_half_of_the_time() {
    let slow = TestGenerator::start((0..8).map(|_| Generate::Hang(1)));
    let other = TestGenerator::start([]);
    let ledger = Arc::new(Ledger::new(request(0..4), Duration::from_secs(8)));
    let pool = pool(&[&slow, &other]);
    let started = Instant::now();
    assert_eq!(pool.wait(pool.begin(&ledger)).unwrap(), []);
    assert!(started.elapsed() > Duration::from_secs(4));
    let groups: Vec<Group> = ledger.take_groups().into_iter().flatten().collect();
    check_groups(&groups, 0..4);
    let missing = other.requests().into_iter().filter(|request| request.sample_indices == [1, 2, 3]).count();
    assert_eq!(missing, slow.requests().len());
}

#[test]
fn what_was_received_before_is_not_asked_for() {
    let generator = TestGenerator::start([]);
    let pool = pool(&[&generator]);
    pool.set_newest(PolicyVersion(2));
    let asked = |id: u64| v1::GenerateRequest {
        prompt_id: id,
        seed: derive_seed(SEED, &[id]),
        rewards: ["format", "equation"].map(|name| (&RewardSpec::of(name)).into()).to_vec(),
        ..Default::default()
    };
    let completion =
        |id, sample_index, version| Completion::try_from(completion(&asked(id), sample_index, version)).unwrap();
    let request = RolloutRequest { min_version: PolicyVersion(1), ..request([5, 6]) };
    let ledger = Arc::new(Ledger::new(request, PATIENCE));
    // Too old, of another prompt, twice, and of a version that this run has not reached.
    let received = [(5, 0, 1), (5, 1, 2), (5, 2, 0), (7, 0, 1), (6, 3, 2), (6, 3, 2), (6, 2, 3)];
    ledger.restore(&received.map(|(id, sample_index, version)| completion(id, sample_index, version)), pool.newest());
    assert_eq!(ledger.num_received(), 3);
    generator.set_version(2);
    assert_eq!(pool.wait(pool.begin(&ledger)).unwrap(), []);
    let mut missing: Vec<_> =
        generator.requests().into_iter().map(|request| (request.prompt_id, request.sample_indices)).collect();
    missing.sort_unstable();
    assert_eq!(missing, [(5, vec![2, 3]), (6, vec![0, 1, 2])]);
    let versions = ledger.received().into_iter().map(|completion| completion.spans[0].version.0).collect::<Vec<_>>();
    assert_eq!(versions, [1, 2, 2, 2, 2, 2, 2, 2]);
    let groups: Vec<Group> = ledger.take_groups().into_iter().flatten().collect();
    check_groups(&groups, [5, 6]);
}

#[test]
fn rollouts_take_turns_and_what_is_between_them_is_counted() {
    let generator = TestGenerator::start((0..2).map(|_| Generate::Hang(0)));
    let pool = pool(&[&generator]);
    let [first, second] = [0..1, 1..2].map(|ids| Arc::new(Ledger::new(request(ids), Duration::from_millis(300))));
    let fillings = [&first, &second].map(|ledger| pool.begin(ledger));
    for filling in fillings {
        assert_eq!(pool.wait(filling).unwrap().len(), 1);
    }
    assert_eq!(pool.take_idle(), Duration::ZERO);
    std::thread::park_timeout(Duration::from_millis(50));
    let filling = pool.begin(&Arc::new(Ledger::new(request([3]), PATIENCE)));
    let idle = pool.take_idle();
    assert!(idle >= Duration::from_millis(40), "{idle:?}");
    assert_eq!(pool.wait(filling).unwrap(), []);
    assert_eq!(pool.take_idle(), Duration::ZERO);
}

#[test]
fn a_rollout_under_way_asks_those_who_have_joined() {
    let [gone, joined] = [(); 2].map(|()| TestGenerator::start([]));
    let mut pool = pool(&[&gone]);
    let both = self::pool(&[&gone, &joined]);
    gone.kill();
    let ledger = Arc::new(Ledger::new(request([5]), PATIENCE));
    let filling = pool.begin(&ledger);
    pool.set_clients(both.clients().to_vec());
    assert_eq!(pool.wait(filling).unwrap(), []);
    assert_eq!(joined.requests().len(), 1);
}

#[test]
fn a_refused_request_is_not_repeated() {
    let (error, generator) = fail(Generate::Fail(0, Status::invalid_argument("token_ids: 99999 is no token")));
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
    let (error, generator) = fail(Generate::Version(3));
    let expect =
        format!("generator {} sampled prompt 5 with policy v3, and only v0 to v0 may be trained on", generator.address);
    assert_eq!(error.to_string(), expect);
    assert_eq!(generator.requests().len(), 1);
}

#[track_caller]
fn check_malformed(spoil: impl FnOnce(&mut v1::Completion), problem: &str) {
    let request = v1::GenerateRequest {
        prompt_id: 5,
        rewards: ["format", "equation"].map(|name| (&RewardSpec::of(name)).into()).to_vec(),
        ..Default::default()
    };
    let mut bad = completion(&request, 3, 0);
    spoil(&mut bad);
    let (error, generator) = fail(Generate::Send(bad));
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
fn versions_within_the_bounds_are_taken() {
    let generator = TestGenerator::start([]);
    let check = |version, is_taken| {
        generator.set_version(version);
        let request = RolloutRequest { min_version: PolicyVersion(4), ..request([1]) };
        let ledger = Arc::new(Ledger::new(request, PATIENCE));
        let pool = pool(&[&generator]);
        pool.set_newest(PolicyVersion(6));
        let outcome = pool.wait(pool.begin(&ledger));
        assert_eq!(outcome.is_ok(), is_taken, "{outcome:?}");
    };
    check(3, false);
    check(4, true);
    check(6, true);
    check(7, false);
}

#[test]
fn a_pool_needs_generators_that_answer() {
    let mut config = RunConfig::default();
    assert!(matches!(
        GeneratorPool::connect(&config, &connector(), Rewarders::default(), runtime()),
        Err(RolloutError::NoGenerators)
    ));
    let gone = TestGenerator::start([]);
    gone.kill();
    config.generator.addresses = vec![gone.address.clone()];
    config.generator.connect_timeout_seconds = 0.3;
    let message =
        GeneratorPool::connect(&config, &connector(), Rewarders::default(), runtime()).unwrap_err().to_string();
    assert!(message.contains(&gone.address) && message.contains("did not answer for 0."), "{message}");
}

/// A command that gives every completion half a point and counts its batches in a file.
fn judge(counter: &std::path::Path) -> RewardSpec {
    let script = format!(
        r#"id=0; while read -r line; do echo >> '{}'; echo "{{\"id\": $id, \"scores\": [0.5, 0.5, 0.5, 0.5]}}"; id=$((id+1)); done"#,
        counter.display()
    );
    let command = serde_json::json!({"function": "command", "name": "mine", "command": ["sh", "-c", script],
        "max_batch_size": NUM_GENERATIONS, "max_retries": 0});
    serde_json::from_value(command).unwrap()
}

#[test]
fn what_generators_do_not_score_is_judged_here_and_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let counter = folder.path().join("batches");
    let rewards = [RewardSpec::of("format"), judge(&counter), RewardSpec::of("equation")];
    let request = |ids: std::ops::Range<u64>| RolloutRequest { rewards: rewards.to_vec(), ..request(ids) };
    let generator = TestGenerator::start([]);
    let config = |addresses| {
        let mut config = RunConfig::default();
        config.generator.addresses = addresses;
        config
    };
    let runtime = runtime();
    let rewarders = Rewarders::start(&rewards, None, runtime.handle()).unwrap();
    let config = config(vec![generator.address.clone()]);
    let pool = GeneratorPool::connect(&config, &connector(), rewarders, runtime).unwrap();
    let first = Arc::new(Ledger::new(request(0..2), PATIENCE));
    assert_eq!(pool.wait(pool.begin(&first)).unwrap(), []);
    let names: Vec<String> = generator.requests()[0].rewards.iter().map(|reward| reward.name.clone()).collect();
    assert_eq!(names, ["format", "equation"], "no generator hears of it");

    // After a restart: one group that was judged, one that was not yet, and one of which nothing had come.
    let mut received = first.received();
    for completion in &mut received[NUM_GENERATIONS..] {
        completion.rewards.remove(1);
    }
    let second = Arc::new(Ledger::new(request(0..3), PATIENCE));
    second.restore(&received, PolicyVersion(0));
    assert_eq!(second.num_received(), 2 * NUM_GENERATIONS);
    assert_eq!(pool.wait(pool.begin(&second)).unwrap(), []);
    for completion in second.take_groups().into_iter().flat_map(|group| group.unwrap().completions) {
        let names: Vec<&str> = completion.rewards.iter().map(|reward| reward.function.as_str()).collect();
        assert_eq!((names, completion.rewards[1].score), (vec!["format", "mine", "equation"], 0.5));
    }
    assert_eq!(std::fs::read_to_string(counter).unwrap().lines().count(), 4, "two groups, and then two more");
    assert_eq!(generator.requests().len(), 3);
}

#[test]
fn a_generator_that_judges_what_it_was_not_asked_to_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let request = RolloutRequest { rewards: vec![judge(&folder.path().join("x"))], ..request([5]) };
    let asked = request.message(&request.prompts[0], vec![3], "r".to_owned());
    let mut bad = completion(&asked, 3, 0);
    bad.rewards.push(v1::Reward { function: "mine".to_owned(), score: 1.0, outcome: "score".to_owned() });
    let generator = TestGenerator::start([Generate::Send(bad)]);
    let message = roll_out(&[&generator], request).unwrap_err().to_string();
    assert!(message.contains(r#"has rewards ["mine"] where [] were asked for"#), "{message}");
}
