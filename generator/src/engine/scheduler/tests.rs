use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::engine::batch::Runner;
use crate::engine::testing::{Ask, FakeRunner, Random, config};

/// A scheduler and a runner; every step is checked against what the cache holds.
struct Harness {
    scheduler: Scheduler,
    runner: FakeRunner,
    /// Samples that are to finish yet.
    unfinished: BTreeSet<(RequestKey, u32)>,
    /// Items of which several tokens were sampled.
    num_ahead: usize,
}

impl Harness {
    fn new(change: impl FnOnce(&mut EngineConfig)) -> Self {
        let config = config(change);
        config.check().unwrap();
        let runner = FakeRunner::new(&config);
        Self { runner, scheduler: Scheduler::new(config), unfinished: BTreeSet::new(), num_ahead: 0 }
    }

    fn add(&mut self, ask: &Ask) {
        self.scheduler.add(ask.task(), &ask.sample_indices).unwrap();
        self.unfinished.extend(ask.sample_indices.iter().map(|&sample_index| (ask.key, sample_index)));
    }

    /// Samples that are in flight, in the order of their age.
    fn in_flight(&self) -> Vec<(RequestKey, u32)> {
        let Scheduler { waiting, running, .. } = &self.scheduler;
        let running = running.iter().map(|(&id, running)| (id, &running.sequence));
        let all: BTreeMap<SequenceId, &Sequence> = running.chain(waiting.iter().map(|(&id, w)| (id, w))).collect();
        all.values().map(|sequence| (sequence.task.key, sequence.sample_index)).collect()
    }

    fn step(&mut self) -> Step {
        let step = self.scheduler.schedule();
        let running = &self.scheduler.running;
        assert!(step.sequences.contains(running.keys().next().unwrap()), "the oldest running sequence must advance");
        let decodes: Vec<bool> = step.sequences.iter().map(|id| running[id].is_decoding()).collect();
        assert!(decodes.is_sorted_by(|a, b| a >= b), "decodes come first");
        self.num_ahead += step.batch.items.iter().filter(|item| item.num_to_sample() > 1).count();
        let sampled = self.runner.run(&step.batch).unwrap();
        for (key, event) in self.scheduler.complete(&step, sampled).unwrap() {
            if event.finish().is_some() {
                assert!(self.unfinished.remove(&(key, event.sample_index())), "a sample finished twice");
            }
        }
        self.check();
        step
    }

    fn swap(&mut self) {
        self.swap_to(self.scheduler.version().next());
    }

    fn swap_to(&mut self, version: PolicyVersion) {
        self.runner.swap(version.0).unwrap();
        self.scheduler.set_version(version);
    }

    fn sleep_and_wake(&mut self) {
        self.scheduler.release_all();
        self.runner.release_cache().unwrap();
        self.runner.restore_cache().unwrap();
    }

    fn check(&self) {
        assert_eq!(self.scheduler.check_invariants(), Ok(()));
        assert_eq!(self.in_flight().into_iter().collect::<BTreeSet<_>>(), self.unfinished, "a sample was lost");
        for running in self.scheduler.running.values() {
            let tokens = running.sequence.tokens(0..running.num_computed);
            let weights = (!running.ran_across_swap).then_some(self.scheduler.version().0);
            self.runner.check_history(running.block_table.ids(), &tokens, weights);
        }
    }

    fn drain(&mut self) {
        while self.scheduler.has_work() {
            self.step();
        }
        assert_eq!((self.scheduler.num_used_blocks(), self.unfinished.len()), (0, 0));
    }
}

#[track_caller]
fn check_sharing(prompt_len: usize, expect_blocks: usize) {
    let mut harness = Harness::new(|_| {});
    harness.add(&Ask::new(1, prompt_len, 8, 4));
    assert_eq!(harness.step().batch.items.len(), 1, "the leader computes the prompt");
    let step = harness.step();
    assert_eq!(step.batch.items.len(), 8, "the others have its blocks");
    assert_eq!(harness.scheduler.counters().prompt_tokens, prompt_len as u64 + 7);
    assert_eq!(harness.scheduler.num_used_blocks(), expect_blocks);
    harness.drain();
}

// Blocks have 4 tokens. In the second step the leader has computed prompt_len + 1 tokens, the others prompt_len.
#[test]
fn a_group_computes_its_prompt_once_and_holds_its_full_blocks_once() {
    check_sharing(10, 2 + 8);
    check_sharing(8, 1 + 8 + 1);
    check_sharing(9, 2 + 8);
    check_sharing(2, 8);
}

#[test]
fn nobody_waits_for_a_prompt_of_one_token() {
    let mut harness = Harness::new(|_| {});
    harness.add(&Ask::new(1, 1, 8, 4));
    assert_eq!(harness.step().batch.items.len(), 8);
    harness.drain();
}

#[test]
fn a_prompt_outlives_the_sample_that_computed_it_for_those_that_wait() {
    let mut harness = Harness::new(|config| config.max_num_seqs = 1);
    harness.add(&Ask::new(1, 10, 4, 1));
    let items: Vec<usize> = (0..4).map(|_| harness.step().batch.items[0].tokens.len()).collect();
    assert_eq!(items, [10, 2, 2, 2], "its two full blocks are found");
    harness.drain();
    // One token, and the leader is gone after it.
    let mut harness = Harness::new(|_| {});
    harness.add(&Ask::new(1, 10, 8, 1));
    assert_eq!([harness.step(), harness.step()].map(|step| step.batch.items.len()), [1, 7]);
    harness.drain();
}

#[test]
fn cached_blocks_give_way_to_a_running_sequence() {
    let mut harness = Harness::new(|config| config.num_blocks = 3);
    harness.add(&Ask::new(1, 4, 1, 5));
    harness.add(&Ask::new(2, 8, 2, 1));
    harness.step();
    assert_eq!((harness.scheduler.num_used_blocks(), harness.scheduler.num_cached_blocks()), (1, 2));
    harness.step();
    assert_eq!((harness.scheduler.num_used_blocks(), harness.scheduler.num_cached_blocks()), (2, 1));
    harness.drain();
    let counters = harness.scheduler.counters();
    assert_eq!((counters.preemptions, counters.prompt_tokens), (0, 4 + 8 + 4));
    assert_eq!((counters.prefix_cache_queries, counters.prefix_cache_hits), (4 + 8 + 8, 4));
}

/// Where the only item of a step starts, and how many tokens it has.
#[track_caller]
fn check_item(step: &Step, start: usize, num_tokens: usize) {
    let items: Vec<_> = step.batch.items.iter().map(|item| (item.start, item.tokens.len())).collect();
    assert_eq!(items, [(start, num_tokens)]);
}

fn same_prompt(key: u64, prompt_len: usize) -> Ask {
    Ask { key: RequestKey(key), ..Ask::new(1, prompt_len, 1, 3) }
}

#[test]
fn a_prompt_is_found_in_whole_blocks_and_never_to_its_last_token() {
    let mut harness = Harness::new(|_| {});
    harness.add(&same_prompt(1, 10));
    harness.drain();
    // 10 tokens of prompt and 2 of completion were computed: three blocks, of which the third begins in the prompt.
    assert_eq!(harness.scheduler.num_cached_blocks(), 3);
    for (prompt_len, start) in [(10, 8), (9, 8), (8, 4), (5, 4), (4, 0)] {
        harness.add(&same_prompt(2, prompt_len));
        check_item(&harness.step(), start, prompt_len - start);
        harness.drain();
    }
    let other = Ask::new(3, 10, 1, 3);
    harness.add(&Ask { prompt: [&same_prompt(1, 4).prompt[..], &other.prompt].concat(), ..other });
    check_item(&harness.step(), 4, 10);
    harness.drain();
}

#[test]
fn a_prompt_is_found_while_another_request_holds_it() {
    let mut harness = Harness::new(|_| {});
    harness.add(&same_prompt(1, 10));
    harness.step();
    harness.add(&Ask { sample_indices: vec![0, 1, 2], ..same_prompt(2, 10) });
    let starts: Vec<usize> = harness.step().batch.items.iter().map(|item| item.start).collect();
    assert_eq!(starts, [10, 8, 8, 8], "with every full block there, nobody waits for a leader");
    // The two full blocks are there once, and each of the four has one of its own.
    assert_eq!(harness.scheduler.num_used_blocks(), 2 + 4);
    harness.drain();
}

#[test]
fn without_prefix_caching_nothing_is_found() {
    let mut harness = Harness::new(|config| config.enable_prefix_caching = false);
    for key in 1..3 {
        harness.add(&same_prompt(key, 10));
        check_item(&harness.step(), 0, 10);
        harness.drain();
    }
    let counters = harness.scheduler.counters();
    assert_eq!((counters.prefix_cache_queries, counters.prefix_cache_hits), (0, 0));
    assert_eq!(harness.scheduler.num_cached_blocks(), 0);
}

#[test]
fn a_preempted_sequence_finds_what_is_left_of_it() {
    let mut harness = Harness::new(|config| config.num_blocks = 7);
    harness.add(&Ask::new(1, 6, 1, 14));
    harness.add(&Ask::new(2, 6, 1, 14));
    while harness.scheduler.num_running() != 1 || harness.scheduler.num_waiting() != 1 {
        harness.step();
    }
    // Three blocks each; both want a fourth at 13 tokens. The first takes a fifth too before it ends.
    while harness.scheduler.num_waiting() == 1 {
        harness.step();
        if harness.scheduler.num_running() == 0 {
            check_item(&harness.step(), 8, 5);
        }
    }
    assert_eq!(harness.scheduler.counters().preemptions, 1);
    harness.drain();
}

#[test]
fn sleep_forgets_everything() {
    let mut harness = Harness::new(|_| {});
    harness.add(&same_prompt(1, 10));
    harness.drain();
    harness.add(&same_prompt(2, 10));
    harness.step();
    harness.sleep_and_wake();
    assert_eq!(harness.scheduler.num_cached_blocks(), 0);
    check_item(&harness.step(), 0, 11);
    harness.drain();
}

/// A sequence that ran across a swap attended to keys and values of the weights before: nobody may find its blocks,
/// whether they were full before the swap or after it, and whatever the versions are called.
#[test]
fn blocks_of_other_or_mixed_weights_are_not_found() {
    for (kv, next) in [(KvPolicy::Keep, 0), (KvPolicy::Keep, 1), (KvPolicy::Recompute, 0), (KvPolicy::Recompute, 1)] {
        let mut harness = Harness::new(|config| config.kv = kv);
        harness.add(&Ask { sampling: Ask::new(1, 10, 1, 9).sampling, ..same_prompt(1, 10) });
        harness.step();
        harness.swap_to(PolicyVersion(next));
        assert_eq!(harness.scheduler.num_cached_blocks(), 0);
        let step = harness.step();
        let whole = [same_prompt(1, 10).prompt, step.batch.items[0].tokens.clone()].concat();
        harness.drain();
        match kv {
            KvPolicy::Keep => assert_eq!(harness.scheduler.num_cached_blocks(), 0),
            KvPolicy::Recompute => assert!(harness.scheduler.num_cached_blocks() > 0),
        }
        harness.swap();
        assert_eq!(harness.scheduler.num_cached_blocks(), 0);
        harness.add(&Ask { prompt: whole.clone(), ..same_prompt(2, 1) });
        check_item(&harness.step(), 0, whole.len());
        harness.drain();
    }
}

#[test]
fn prompts_are_computed_in_chunks_beside_decodes() {
    let mut harness = Harness::new(|config| {
        config.max_num_seqs = 2;
        config.max_num_batched_tokens = 6;
    });
    harness.add(&Ask::new(1, 3, 1, 9));
    harness.add(&Ask::new(2, 14, 1, 9));
    let shape = |step: Step| step.batch.items.iter().map(|item| (item.start, item.tokens.len())).collect::<Vec<_>>();
    let steps: Vec<_> = (0..4).map(|_| shape(harness.step())).collect();
    assert_eq!(steps, [vec![(0, 3), (0, 3)], vec![(3, 1), (3, 5)], vec![(4, 1), (8, 5)], vec![(5, 1), (13, 1)]]);
    harness.drain();
}

#[test]
fn the_youngest_is_preempted_for_the_oldest() {
    let mut harness = Harness::new(|config| config.num_blocks = 5);
    harness.add(&Ask::new(1, 6, 1, 14));
    harness.add(&Ask::new(2, 6, 1, 14));
    let mut counts = Vec::new();
    while harness.scheduler.has_work() {
        counts.push(harness.step().batch.items.len());
    }
    // Two blocks each; both want a third at 9 tokens.
    assert_eq!(counts[..5], [2, 2, 2, 1, 1], "{counts:?}");
    assert_eq!(harness.scheduler.counters().preemptions, 1);
    harness.drain();
}

#[test]
fn a_sequence_that_is_alone_may_take_the_whole_cache() {
    let mut harness = Harness::new(|config| (config.block_size, config.num_blocks) = (1, 150));
    harness.add(&Ask::new(1, 150, 2, 1));
    harness.drain();
}

#[test]
fn requests_that_can_never_be_served_are_refused() {
    let mut scheduler = Scheduler::new(config(|config| config.num_blocks = 4));
    let mut refuse = |ask: &Ask| scheduler.add(ask.task(), &ask.sample_indices).unwrap_err();
    let refusal = Refusal::OverModelLen { prompt_tokens: 150, max_tokens: 51, max_model_len: 200 };
    assert_eq!(refuse(&Ask::new(1, 150, 1, 51)), refusal);
    assert_eq!(refuse(&Ask::new(1, 10, 1, 8)), Refusal::OverCache { num_tokens: 17, needed: 5, total: 4 });
    assert_eq!(refuse(&Ask::new(1, 0, 1, 8)), Refusal::EmptyPrompt);
    assert_eq!(refuse(&Ask::new(1, 1, 1, 0)), Refusal::NoTokensWanted);
    assert_eq!(refuse(&Ask::new(1, 1, 0, 1)), Refusal::NoSamples);
    let twice = Ask { sample_indices: vec![3, 1, 3], ..Ask::new(1, 1, 1, 1) };
    assert_eq!(refuse(&twice), Refusal::DuplicateSample(3));
    assert!(!scheduler.has_work());
    let fits = Ask::new(1, 10, 1, 7);
    assert_eq!(scheduler.add(fits.task(), &[0]), Ok(()));
    assert_eq!(scheduler.add(fits.task(), &[1]), Err(Refusal::DuplicateKey(RequestKey(1))));
}

#[test]
fn prompts_of_other_weights_are_not_shared() {
    for kv in [KvPolicy::Keep, KvPolicy::Recompute] {
        let mut harness = Harness::new(|config| config.kv = kv);
        harness.add(&Ask::new(1, 10, 3, 9));
        harness.step();
        harness.swap();
        let step = harness.step();
        let shape: Vec<_> = step.batch.items.iter().map(|item| (item.start, item.tokens.len())).collect();
        match kv {
            KvPolicy::Keep => assert_eq!(shape, [(10, 1), (0, 10)], "the second becomes a leader"),
            KvPolicy::Recompute => assert_eq!(shape, [(0, 11)], "the first is computed again"),
        }
        assert_eq!(harness.step().batch.items.len(), 3);
        harness.drain();
    }
}

fn random_operation(random: &mut Random, harness: &mut Harness, next_key: &mut u64) {
    match random.below(40) {
        0..6 if harness.unfinished.len() < 60 => {
            *next_key += 1;
            harness.add(&Ask::random(random, *next_key));
        }
        6 if !harness.unfinished.is_empty() => {
            let index = random.below(harness.unfinished.len());
            let (key, _) = *harness.unfinished.iter().nth(index).unwrap();
            let aborted = harness.scheduler.abort(key);
            assert!(aborted.into_iter().all(|sample_index| harness.unfinished.remove(&(key, sample_index))));
        }
        7 if !harness.unfinished.is_empty() => {
            let index = random.below(harness.unfinished.len());
            let (key, sample_index) = *harness.unfinished.iter().nth(index).unwrap();
            harness.scheduler.finish(key, sample_index, 1);
            harness.unfinished.remove(&(key, sample_index));
        }
        8 => harness.swap(),
        9 => harness.sleep_and_wake(),
        10 => {
            let table = harness.scheduler.borrow_blocks(1 + random.below(50)).unwrap();
            harness.scheduler.give_back(table);
        }
        _ if harness.scheduler.has_work() => {
            harness.step();
        }
        _ => {}
    }
    harness.check();
}

#[test]
fn random_operations_lose_nothing_and_everything_finishes() {
    for seed in 0..24 {
        let mut random = Random::new(seed);
        let mut harness = Harness::new(|config| {
            config.num_blocks = 14 + random.below(40);
            config.max_num_seqs = 1 + random.below(12);
            config.max_num_batched_tokens = config.max_num_seqs + random.below(30);
            config.kv = [KvPolicy::Keep, KvPolicy::Recompute][random.below(2)];
            config.enable_prefix_caching = seed % 4 > 0;
            config.steps_per_look = [1, 2, 3, 8][seed as usize / 4 % 4];
        });
        let mut next_key = 0;
        for _ in 0..1_500 {
            random_operation(&mut random, &mut harness, &mut next_key);
        }
        let counters = harness.scheduler.counters();
        assert!(next_key > 20 && counters.preemptions > 0);
        assert_eq!(counters.prefix_cache_hits > 100, seed % 4 > 0, "{counters:?}");
        assert_eq!(harness.num_ahead > 20, seed / 4 % 4 > 0, "{}", harness.num_ahead);
        harness.drain();
    }
}

/// The tokens that each item of a step samples.
fn nums_to_sample(step: &Step) -> Vec<usize> {
    step.batch.items.iter().map(BatchItem::num_to_sample).collect()
}

#[test]
fn a_look_at_decodes_alone_samples_several_tokens() {
    let mut harness = Harness::new(|config| config.steps_per_look = 4);
    harness.add(&Ask::new(1, 6, 2, 9));
    // The leader's prompt; its sibling's last token; then 7 tokens are left to the one and 8 to the other.
    let looks: Vec<_> = (0..4).map(|_| nums_to_sample(&harness.step())).collect();
    assert_eq!(looks, [vec![1], vec![1, 1], vec![4, 4], vec![3, 4]]);
    assert!(!harness.scheduler.has_work());
    let mut harness = Harness::new(|config| config.steps_per_look = 4);
    harness.add(&Ask::new(1, 6, 1, 9));
    harness.step();
    harness.step();
    harness.add(&Ask::new(2, 6, 1, 9));
    assert_eq!(nums_to_sample(&harness.step()), [1, 1], "somebody has come");
    assert_eq!(nums_to_sample(&harness.step()), [3, 4]);
    harness.drain();
}

#[test]
fn a_look_takes_free_blocks_and_preempts_nobody() {
    let mut harness = Harness::new(|config| (config.steps_per_look, config.num_blocks) = (8, 5));
    harness.add(&Ask::new(1, 6, 1, 14));
    harness.add(&Ask::new(2, 6, 1, 14));
    harness.step();
    // Of 7 tokens each has computed 6, in two blocks; one block is left, which the older takes.
    assert_eq!(nums_to_sample(&harness.step()), [6, 2]);
    assert_eq!(harness.scheduler.counters().preemptions, 0);
    harness.drain();
}

#[test]
fn what_the_host_must_see_is_sampled_token_by_token() {
    let edits: [fn(&mut Ask); 4] = [
        |ask| ask.sampling.frequency_penalty = 0.5,
        |ask| ask.sampling.bad_token_ids = vec![3],
        |ask| ask.sampling.logprobs = 2,
        |ask| (ask.sampling.stop_token_ids, ask.sampling.ignore_eos) = ((50..70).collect(), false),
    ];
    for edit in edits {
        let mut harness = Harness::new(|config| config.steps_per_look = 4);
        let mut ask = Ask::new(1, 6, 1, 9);
        edit(&mut ask);
        harness.add(&ask);
        harness.step();
        assert_eq!(nums_to_sample(&harness.step()), [1]);
        harness.drain();
    }
}

/// Under a load that never ends, nobody waits longer than for all the work that was there before.
#[test]
fn no_sequence_starves() {
    let mut random = Random::new(5);
    let mut harness = Harness::new(|config| {
        config.num_blocks = 20;
        config.max_num_seqs = 6;
        config.max_num_batched_tokens = 8;
    });
    let mut latest = BTreeMap::new();
    for now in 0..4_000_u64 {
        while harness.unfinished.len() < 30 {
            let ask = Ask::random(&mut random, now * 100 + harness.unfinished.len() as u64);
            harness.add(&ask);
            // Alone, one after the other, each takes a step for a token at most.
            let steps_each = (ask.prompt.len() as u64 / 8 + 1) + u64::from(ask.sampling.max_tokens);
            let ahead: u64 = latest.values().map(|&(_, steps)| steps).sum();
            let steps = steps_each * ask.sample_indices.len() as u64;
            latest.insert(ask.key, (now + ahead + steps, steps));
        }
        harness.step();
        latest.retain(|&key, _| harness.scheduler.is_in_flight(key));
        assert!(latest.values().all(|&(latest, _)| now <= latest), "a request starves");
    }
    assert!(harness.scheduler.counters().preemptions > 20);
    harness.drain();
}
