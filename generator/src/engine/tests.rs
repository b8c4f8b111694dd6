//! The engine with a fake runner: what comes out, whatever happens in between.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use aha_core::config::KvPolicy;
use aha_core::ids::{PolicyVersion, PromptId, TokenId};
use aha_core::rollout::FinishReason;
use tokio::sync::{mpsc, oneshot};

use super::handle::Command;
use super::testing::{Ask, FakeRunner, Random, Trouble, config};
use super::thread::Engine;
use super::*;

const HOUR: Duration = Duration::from_secs(3600);

impl Ask {
    fn request(&self, deadline: Instant) -> (Request, mpsc::Receiver<TokenEvent>) {
        let capacity = Request::events_capacity(self.sample_indices.len(), self.sampling.max_tokens);
        let (events, receiver) = mpsc::channel(capacity);
        let Self { key, prompt, sample_indices, sampling, seed } = self.clone();
        let prompt_id = PromptId(key.0);
        (Request { key, prompt_id, prompt, sample_indices, sampling, seed, deadline, events }, receiver)
    }
}

/// What the events of one sample add up to.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    tokens: Vec<TokenId>,
    versions: Vec<PolicyVersion>,
    finish: Option<FinishReason>,
}

fn collect(events: impl IntoIterator<Item = TokenEvent>) -> BTreeMap<u32, Outcome> {
    let mut outcomes: BTreeMap<u32, Outcome> = BTreeMap::new();
    for event in events {
        let outcome = outcomes.entry(event.sample_index()).or_default();
        assert_eq!(outcome.finish, None, "an event after the last");
        outcome.finish = event.finish();
        if let TokenEvent::Token { token, logprob, version, .. } = event {
            assert!(logprob <= 0.0);
            outcome.tokens.push(token);
            outcome.versions.push(version);
        }
    }
    outcomes
}

fn received(events: &mut mpsc::Receiver<TokenEvent>) -> BTreeMap<u32, Outcome> {
    collect(std::iter::from_fn(|| events.try_recv().ok()))
}

fn engine(change: impl FnOnce(&mut EngineConfig)) -> Engine<FakeRunner> {
    let config = config(change);
    config.check().unwrap();
    Engine::new(config.clone(), FakeRunner::new(&config))
}

fn tell<T>(
    engine: &mut Engine<FakeRunner>,
    command: impl FnOnce(oneshot::Sender<Result<T, EngineError>>) -> Command<u64>,
) -> Result<T, EngineError> {
    let (reply, mut answer) = oneshot::channel();
    assert!(engine.apply(command(reply)).unwrap().is_continue());
    answer.try_recv().unwrap()
}

fn add(engine: &mut Engine<FakeRunner>, ask: &Ask) -> mpsc::Receiver<TokenEvent> {
    let (request, events) = ask.request(Instant::now() + HOUR);
    tell(engine, |reply| Command::Add { request: Box::new(request), reply }).unwrap();
    events
}

fn swap(engine: &mut Engine<FakeRunner>, version: u64) -> u64 {
    tell(engine, |reply| Command::Swap { staged: version, version: PolicyVersion(version), reply })
        .unwrap()
        .spare
        .unwrap()
}

fn finish(engine: &mut Engine<FakeRunner>, ask: &Ask, sample_index: u32, num_tokens: usize) {
    assert!(engine.apply(Command::Finish { key: ask.key, sample_index, num_tokens }).unwrap().is_continue());
}

fn drain(engine: &mut Engine<FakeRunner>) {
    while engine.has_work() {
        engine.step().unwrap();
    }
    assert_is_empty(engine);
}

fn assert_is_empty(engine: &Engine<FakeRunner>) {
    let EngineStatus { num_running, num_waiting, used_blocks, .. } = engine.status();
    assert_eq!((num_running, num_waiting, used_blocks), (0, 0, 0));
}

#[track_caller]
fn assert_expected(ask: &Ask, outcomes: &BTreeMap<u32, Outcome>) {
    assert!(outcomes.keys().eq(ask.sample_indices.iter().rev().collect::<std::collections::BTreeSet<_>>()));
    for (&sample_index, Outcome { tokens, finish, .. }) in outcomes {
        let expected = ask.expect(sample_index, |_| 0, |_, _| 0);
        assert_eq!((tokens, *finish), (&expected.tokens, Some(expected.finish)), "sample {sample_index} of {ask:?}");
    }
}

#[test]
fn outputs_depend_on_seed_prompt_and_sample_alone() {
    let mut random = Random::new(3);
    let asks: Vec<Ask> = (0..40).map(|key| Ask::random(&mut random, key)).collect();
    let (mut num_preemptions, mut num_hits) = (0, 0);
    for round in 0..40 {
        let mut order = asks.clone();
        (1..order.len()).for_each(|index| order.swap(index, random.below(index + 1)));
        let mut engine = engine(|config| {
            config.block_size = 1 + random.below(8);
            // The longest sequence has 53 computed tokens.
            config.num_blocks = 53_usize.div_ceil(config.block_size) + random.below(40);
            config.max_num_seqs = 1 + random.below(24);
            config.max_num_batched_tokens = config.max_num_seqs + random.below(40);
            config.steps_per_look = [1, 2, 8][round % 3];
            config.kv = [KvPolicy::Keep, KvPolicy::Recompute][round % 2];
            config.enable_prefix_caching = round % 4 > 0;
        });
        let mut events = Vec::new();
        for ask in order {
            events.push((add(&mut engine, &ask), ask));
            for _ in 0..random.below(6) {
                if engine.has_work() {
                    engine.step().unwrap();
                }
            }
        }
        drain(&mut engine);
        let counters = engine.status().counters;
        num_preemptions += counters.preemptions;
        num_hits += counters.prefix_cache_hits;
        for (mut events, ask) in events {
            assert_expected(&ask, &received(&mut events));
            assert_eq!(events.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
        }
    }
    assert!(num_preemptions > 200 && num_hits > 20_000, "{num_preemptions} {num_hits}");
}

#[test]
fn a_repeated_request_is_the_same_and_mostly_found() {
    let mut engine = engine(|_| {});
    let (first, again) = (Ask::new(1, 30, 3, 20), Ask { key: RequestKey(2), ..Ask::new(1, 30, 3, 20) });
    let mut events = [&first, &again].map(|ask| {
        let events = add(&mut engine, ask);
        drain(&mut engine);
        events
    });
    events.iter_mut().for_each(|events| assert_expected(&first, &received(events)));
    let status = engine.status();
    // Of 30 tokens the siblings fork 29 from a leader; in the second round everyone finds 28, and nobody waits.
    let (queries, hits) = (6 * 30, 2 * 29 + 3 * 28);
    assert_eq!((status.counters.prefix_cache_queries, status.counters.prefix_cache_hits), (queries, hits));
    assert_eq!(status.counters.prompt_tokens, queries - hits);
    assert!(status.cached_blocks > 0);

    // Its answer is found too when it comes back in a longer prompt, and all is forgotten at a swap.
    let conversation = [&first.prompt[..], &first.expect(0, |_| 0, |_, _| 0).tokens].concat();
    for (key, expect) in [(3, hits + 48), (4, hits + 48 + 48), (5, hits + 48 + 48)] {
        let ask = Ask { prompt: conversation.clone(), sample_indices: vec![0], ..Ask::new(key, 1, 1, 2) };
        let version = if key == 5 { 1 } else { 0 };
        if key == 5 {
            swap(&mut engine, version);
            assert_eq!(engine.status().cached_blocks, 0);
        }
        let mut events = add(&mut engine, &ask);
        drain(&mut engine);
        assert_eq!(engine.status().counters.prefix_cache_hits, expect);
        let expected = ask.expect(0, |_| version, |_, _| version).tokens;
        assert_eq!(received(&mut events)[&0].tokens, expected);
    }
}

/// Without room for all, sequences are computed again and again; what they have sampled counts all the same.
#[test]
fn penalties_survive_preemption() {
    let mut ask = Ask::new(1, 10, 4, 20);
    ask.sampling.repetition_penalty = 1.2;
    ask.sampling.presence_penalty = 0.5;
    let mut tight = engine(|config| config.num_blocks = 9);
    let mut events = add(&mut tight, &ask);
    drain(&mut tight);
    assert!(tight.status().counters.preemptions > 0);
    let outcomes = received(&mut events);
    assert_expected(&ask, &outcomes);
    let plain = Ask::new(1, 10, 4, 20).expect(0, |_| 0, |_, _| 0);
    assert_ne!(outcomes[&0].tokens, plain.tokens, "penalties make a difference");
}

#[test]
fn equal_requests_with_different_seeds_or_samples_differ() {
    let outcome = |seed: u64, sample_index: u32| {
        let ask = Ask { seed, sample_indices: vec![sample_index], ..Ask::new(1, 5, 1, 20) };
        let mut engine = engine(|_| {});
        let mut events = add(&mut engine, &ask);
        drain(&mut engine);
        received(&mut events).remove(&sample_index).unwrap().tokens
    };
    assert_eq!(outcome(1, 0), outcome(1, 0));
    assert_ne!(outcome(1, 0), outcome(2, 0));
    assert_ne!(outcome(1, 0), outcome(1, 1));
}

#[test]
fn abort_frees_everything_at_once() {
    let mut engine = engine(|config| config.max_num_seqs = 6);
    let (first, second) = (Ask::new(1, 10, 4, 20), Ask::new(2, 10, 4, 20));
    let (mut first_events, mut second_events) = (add(&mut engine, &first), add(&mut engine, &second));
    (0..5).for_each(|_| engine.step().unwrap());
    // Two samples of the second request are running and two wait.
    assert_eq!(tell(&mut engine, |reply| Command::Abort { key: second.key, reply }), Ok(4));
    let aborted = received(&mut second_events);
    assert!(aborted.len() == 4 && aborted.values().all(|outcome| outcome.finish == Some(FinishReason::Aborted)));
    assert_eq!(second_events.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
    assert_eq!(tell(&mut engine, |reply| Command::Abort { key: second.key, reply }), Ok(0));
    let status = engine.status();
    assert_eq!((status.num_running, status.num_waiting), (4, 0));
    drain(&mut engine);
    assert_expected(&first, &received(&mut first_events));
}

#[test]
fn a_passed_deadline_or_a_client_that_left_aborts() {
    let mut engine = engine(|_| {});
    let now = Instant::now();
    let (request, mut late) = Ask::new(1, 10, 4, 20).request(now + HOUR);
    tell(&mut engine, |reply| Command::Add { request: Box::new(request), reply }).unwrap();
    let left = add(&mut engine, &Ask::new(2, 10, 4, 20));
    (0..3).for_each(|_| engine.step().unwrap());
    engine.abort_overdue(now);
    assert_eq!(engine.status().num_running, 8);
    drop(left);
    engine.abort_overdue(now);
    assert_eq!(engine.status().num_running, 4);
    engine.abort_overdue(now + HOUR);
    assert!(received(&mut late).values().all(|outcome| outcome.finish == Some(FinishReason::Aborted)));
    assert_is_empty(&engine);
}

#[test]
fn a_client_that_leaves_during_a_step_is_noticed_by_it() {
    let mut engine = engine(|_| {});
    drop(add(&mut engine, &Ask::new(1, 10, 4, 20)));
    engine.step().unwrap();
    assert_is_empty(&engine);
}

#[test]
fn a_stop_string_ends_one_sample_and_drops_what_came_after() {
    let mut engine = engine(|_| {});
    let ask = Ask::new(1, 10, 3, 20);
    let mut events = add(&mut engine, &ask);
    (0..9).for_each(|_| engine.step().unwrap());
    let before = received(&mut events);
    assert_eq!(before[&1].tokens.len(), 8);
    finish(&mut engine, &ask, 1, 5);
    // A second time, or too late, changes nothing.
    finish(&mut engine, &ask, 1, 5);
    assert_eq!((engine.status().num_running, engine.status().counters.dropped_tokens), (2, 3));
    drain(&mut engine);
    assert_eq!(received(&mut events).into_keys().collect::<Vec<_>>(), [0, 2]);
    finish(&mut engine, &ask, 1, 5);
    assert_eq!(engine.status().counters.dropped_tokens, 3);
}

#[test]
fn finishing_the_last_sample_closes_the_channel() {
    let mut engine = engine(|_| {});
    let ask = Ask::new(1, 10, 1, 20);
    let mut events = add(&mut engine, &ask);
    engine.step().unwrap();
    finish(&mut engine, &ask, 0, 1);
    assert_eq!(received(&mut events)[&0].tokens.len(), 1);
    assert_eq!(events.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
    assert_is_empty(&engine);
}

/// Swaps twice while three groups run, and compares every token with the model's definition: under `Recompute` the whole
/// cache is of the weights that sample, under `Keep` every position is of the weights that first computed it.
#[track_caller]
fn check_swaps(kv: KvPolicy, steps_per_look: usize) {
    let mut engine = engine(|config| (config.kv, config.steps_per_look) = (kv, steps_per_look));
    let asks = [Ask::new(1, 10, 4, 20), Ask::new(2, 7, 2, 20), Ask::new(3, 12, 3, 20)];
    let mut events: Vec<_> = asks.iter().map(|ask| add(&mut engine, ask)).collect();
    (0..4).for_each(|_| engine.step().unwrap());
    assert_eq!(swap(&mut engine, 1), 0);
    (0..5).for_each(|_| engine.step().unwrap());
    assert_eq!(swap(&mut engine, 2), 1);
    drain(&mut engine);
    for (ask, events) in asks.iter().zip(&mut events) {
        for (sample_index, Outcome { tokens, versions, finish }) in received(events) {
            assert!(versions.is_sorted());
            assert_eq!((versions[0], versions[19]), (PolicyVersion(0), PolicyVersion(2)));
            assert!(versions.contains(&PolicyVersion(1)));
            let sampled_under = |index: usize| versions[index].0;
            let num_prompt_tokens = ask.prompt.len();
            let expected = ask.expect(sample_index, sampled_under, |index, position| match kv {
                KvPolicy::Recompute => sampled_under(index),
                KvPolicy::Keep => sampled_under((position + 1).saturating_sub(num_prompt_tokens)),
            });
            assert_eq!((tokens, finish), (expected.tokens, Some(expected.finish)));
        }
    }
    let preemptions = engine.status().counters.preemptions;
    assert_eq!(preemptions, if kv == KvPolicy::Recompute { 18 } else { 0 });
}

#[test]
fn swaps_give_every_token_the_version_that_sampled_it() {
    for steps_per_look in [1, 2] {
        check_swaps(KvPolicy::Recompute, steps_per_look);
        check_swaps(KvPolicy::Keep, steps_per_look);
    }
}

#[test]
fn pause_sleep_and_scores_change_no_output() {
    let mut engine = engine(|config| config.num_blocks = 16);
    let ask = Ask::new(1, 10, 4, 20);
    let mut events = add(&mut engine, &ask);
    (0..4).for_each(|_| engine.step().unwrap());
    assert_eq!(tell(&mut engine, |reply| Command::Pause { reply }), Ok(()));
    assert!(!engine.has_work());
    assert_eq!(tell(&mut engine, |reply| Command::Wake { reply }), Ok(()));
    assert_eq!(engine.status().activity, Activity::Paused);
    assert_eq!(tell(&mut engine, |reply| Command::Resume { reply }), Ok(()));
    engine.step().unwrap();
    // 60 tokens take 15 of the 16 blocks, so all but the score has to go.
    let scored = tell(&mut engine, |reply| Command::Score { tokens: vec![5; 60], reply }).unwrap();
    assert_eq!((scored.logprobs.len(), scored.version), (59, PolicyVersion(0)));
    assert!(engine.status().counters.preemptions > 0);
    (0..3).for_each(|_| engine.step().unwrap());
    for _ in 0..2 {
        assert_eq!(tell(&mut engine, |reply| Command::Sleep { drop_weights: false, reply }), Ok(()));
    }
    assert_eq!((engine.status().activity, engine.status().used_blocks), (Activity::Asleep, 0));
    assert_eq!(tell(&mut engine, |reply| Command::Resume { reply }), Err(EngineError::Asleep));
    let score = tell(&mut engine, |reply| Command::Score { tokens: vec![5; 3], reply });
    assert_eq!(score, Err(EngineError::Asleep));
    assert_eq!(tell(&mut engine, |reply| Command::Sleep { drop_weights: true, reply }), Ok(()));
    assert_eq!(tell(&mut engine, |reply| Command::Wake { reply }), Err(EngineError::NoWeights));
    assert_eq!(swap(&mut engine, 0), 0);
    assert_eq!(tell(&mut engine, |reply| Command::Wake { reply }), Ok(()));
    let too_long = tell(&mut engine, |reply| Command::Score { tokens: vec![5; 65], reply });
    assert!(matches!(too_long, Err(EngineError::Refused(Refusal::OverCache { .. }))));
    drain(&mut engine);
    assert_expected(&ask, &received(&mut events));
}

#[test]
fn a_channel_that_cannot_hold_every_event_is_refused() {
    let mut engine = engine(|_| {});
    let (mut request, _events) = Ask::new(1, 10, 2, 20).request(Instant::now() + HOUR);
    let (events, _receiver) = mpsc::channel(43);
    request.events = events;
    let refused = tell(&mut engine, |reply| Command::Add { request: Box::new(request), reply });
    assert_eq!(refused, Err(Refusal::SmallChannel { capacity: 43, needed: 44 }.into()));
    assert_is_empty(&engine);
}

fn start(trouble: Option<(u64, Trouble)>) -> (EngineHandle<u64>, EngineThread) {
    let config = config(|config| config.num_blocks = 40);
    let runner_config = config.clone();
    spawn(config, move || Ok(FakeRunner::with_trouble(&runner_config, trouble))).unwrap()
}

async fn all(mut events: mpsc::Receiver<TokenEvent>) -> BTreeMap<u32, Outcome> {
    let mut received = Vec::new();
    while let Some(event) = events.recv().await {
        received.push(event);
    }
    collect(received)
}

#[tokio::test]
async fn the_thread_serves_many_at_once_and_ends_with_its_last_handle() {
    let (handle, thread) = start(None);
    let mut random = Random::new(9);
    let asks: Vec<Ask> = (0..30).map(|key| Ask::random(&mut random, key)).collect();
    let tasks: Vec<_> = asks
        .into_iter()
        .map(|ask| {
            let handle = handle.clone();
            tokio::spawn(async move {
                let (request, events) = ask.request(Instant::now() + HOUR);
                handle.add(request).await.unwrap();
                assert_expected(&ask, &all(events).await);
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let status = handle.status().await.unwrap();
    assert_eq!((status.used_blocks, status.num_running, status.num_waiting), (0, 0, 0));
    assert!(status.counters.generation_tokens > 30);
    let mut health = handle.health();
    drop(handle);
    health.wait_for(|health| *health == EngineHealth::Stopped).await.unwrap();
    thread.join().unwrap();
}

#[tokio::test]
async fn a_paused_engine_sleeps_until_the_next_deadline() {
    let (handle, _thread) = start(None);
    handle.pause().await.unwrap();
    let (request, events) = Ask::new(1, 10, 2, 20).request(Instant::now() + Duration::from_millis(30));
    handle.add(request).await.unwrap();
    let outcomes = all(events).await;
    assert!(outcomes.len() == 2 && outcomes.values().all(|outcome| outcome.finish == Some(FinishReason::Aborted)));
}

#[tokio::test]
async fn stop_aborts_what_is_in_flight() {
    let (handle, thread) = start(None);
    handle.pause().await.unwrap();
    let (request, events) = Ask::new(1, 10, 2, 20).request(Instant::now() + HOUR);
    handle.add(request).await.unwrap();
    handle.stop().await.unwrap();
    assert!(all(events).await.values().all(|outcome| outcome.finish == Some(FinishReason::Aborted)));
    thread.join().unwrap();
    assert_eq!(handle.status().await, Err(EngineError::Gone("it was stopped".to_owned())));
}

#[tokio::test]
async fn a_runner_that_fails_ends_the_engine_and_says_why() {
    let cases = [
        (Trouble::Error, "compute an engine step: the fake device is on fire"),
        (Trouble::Panic, "panicked: the fake device is gone"),
        (Trouble::OneTokenShort, "the runner sampled 1 tokens, and more are wanted"),
    ];
    for (trouble, reason) in cases {
        let (handle, thread) = start(Some((3, trouble)));
        let (request, events) = Ask::new(1, 10, 2, 20).request(Instant::now() + HOUR);
        handle.add(request).await.unwrap();
        assert!(all(events).await.values().all(|outcome| outcome.finish.is_none()), "the events end too early");
        assert_eq!(handle.gone().await, EngineError::Gone(reason.to_owned()));
        assert_eq!(*handle.health().borrow(), EngineHealth::Failed(reason.to_owned()));
        assert_eq!(handle.status().await, Err(EngineError::Gone(reason.to_owned())));
        assert_eq!(format!("{:#}", thread.join().unwrap_err()), reason);
    }
}

#[test]
fn a_runner_that_cannot_be_built_is_reported_by_spawn() {
    let error = spawn::<FakeRunner, _>(config(|_| {}), || anyhow::bail!("no such model")).unwrap_err();
    assert_eq!(error.to_string(), "no such model");
    let config = config(|config| config.max_num_batched_tokens = 1);
    let error = spawn(config.clone(), move || Ok(FakeRunner::new(&config))).unwrap_err();
    assert!(error.to_string().contains("max_num_batched_tokens"));
}
