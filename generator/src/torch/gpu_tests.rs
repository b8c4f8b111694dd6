//! The GPU's runner over emulated kernels: against the CPU's runner, and whole engines of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use aha_core::config::{KvPolicy, Quantization};
use aha_core::ids::{PolicyVersion, PromptId, TokenId};
use aha_core::rollout::{FinishReason, Sampling};
use aha_nn::gpu::{GpuModel, GpuSizes, GpuWeights};
use aha_nn::kernels::cpu::Pool;
use aha_nn::model_config::ModelConfig;
use aha_nn::weights::Weights;
use serde_json::json;
use tch::{Device, Kind};
use tokio::sync::mpsc;

use super::emulated_queue::EmulatedQueue;
use super::tests::{ALL, Sequence, advance, choose, most_likely, some_tokens};
use super::weights::ServingWeights;
use super::{CacheSize, CpuRunner, GpuRunner};
use crate::engine::{
    self, BatchItem, BlockCopy, BlockId, Choose, EngineConfig, EngineHandle, Request, RequestKey, Runner, StepBatch,
    TokenEvent,
};
use crate::testing::{Tiny, tiny_config_with, tiny_weights};

/// Between a log-prob in bf16 and one in fp32, over two layers of these models. The trainer's own bf16 pass is 0.025 away
/// at worst, and 0.006 on average.
const TOLERANCE: f32 = 0.05;
const MEAN_TOLERANCE: f32 = 0.015;
const BLOCK_SIZE: usize = 16;

const SIZES: GpuSizes = GpuSizes {
    block_size: BLOCK_SIZE,
    num_blocks: 64,
    max_model_len: 700,
    max_num_seqs: 16,
    max_num_batched_tokens: 128,
    steps_per_look: 8,
};

/// Sizes that the kernels can serve.
pub(super) fn config(tiny: Tiny) -> ModelConfig {
    let sizes = json!({"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "attention_bias": false,
        "initializer_range": 0.1});
    tiny_config_with(tiny, &sizes)
}

/// Weights that bf16 holds exactly.
pub(super) fn weights(config: &ModelConfig, seed: u64) -> Weights {
    let weights = tiny_weights(config, seed);
    for mut view in (0..weights.num_units()).flat_map(|unit_idx| weights.views(unit_idx)) {
        let rounded = view.to_kind(Kind::BFloat16).to_kind(Kind::Float);
        tch::no_grad(|| view.copy_(&rounded));
    }
    weights
}

fn gpu_with(
    queue: EmulatedQueue,
    config: &ModelConfig,
    weights: &Weights,
    sizes: GpuSizes,
) -> GpuRunner<EmulatedQueue> {
    let weights = GpuWeights::new(config, weights, Device::Cpu).unwrap();
    GpuRunner::new(GpuModel::new(queue, config, Some(weights), sizes).unwrap(), Pool::new(1).unwrap())
}

pub(super) fn gpu(config: &ModelConfig, weights: &Weights) -> GpuRunner<EmulatedQueue> {
    gpu_with(EmulatedQueue::default(), config, weights, SIZES)
}

fn cpu(config: &ModelConfig, weights: &Weights) -> CpuRunner {
    let pool = Pool::new(1).unwrap();
    let serving = ServingWeights::new(config, weights, Quantization::None, &pool);
    let GpuSizes { block_size, num_blocks, max_model_len, .. } = SIZES;
    CpuRunner::new(config, Some(serving), CacheSize { block_size, num_blocks }, max_model_len, pool)
}

fn blocks(num_tokens: usize) -> Vec<BlockId> {
    (0..num_tokens.div_ceil(BLOCK_SIZE) as u32).rev().map(BlockId).collect()
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let errors: Vec<f32> = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs()).collect();
    let mean = errors.iter().sum::<f32>() / errors.len() as f32;
    let worst = errors.iter().copied().fold(0.0, f32::max);
    assert!(worst < TOLERANCE && mean < MEAN_TOLERANCE, "mean {mean}, worst {worst} of {}", errors.len());
}

fn logprobs(sequence: &Sequence) -> Vec<f32> {
    sequence.sampled.iter().map(|sampled| sampled.logprob).collect()
}

#[test]
fn scores_and_decoding_agree_with_the_cpu() {
    // As the heads of Qwen2.5-0.5B.
    let wide = json!({"hidden_size": 64, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 64,
        "initializer_range": 0.1});
    let configs = ALL.map(config).into_iter().chain([tiny_config_with(Tiny::Qwen2, &wide)]);
    for config in configs {
        let weights = weights(&config, 1);
        let (mut gpu, mut cpu) = (gpu(&config, &weights), cpu(&config, &weights));
        // Two chunks.
        let tokens = some_tokens(150, 2);
        let table = blocks(150);
        assert_close(&gpu.score(&tokens, &table).unwrap(), &cpu.score(&tokens, &table).unwrap());

        let mut sequences = [
            Sequence::new(some_tokens(41, 1), &[5, 2, 9, 0], 0.0),
            Sequence::new(some_tokens(3, 7), &[11, 12, 13], 0.0),
        ];
        advance(&mut gpu, &mut sequences, &[7, 1, 20, 16], 12);
        for (sequence, prompt_len) in sequences.iter().zip([41, 3]) {
            let Sequence { tokens, sampled, .. } = sequence;
            let scores = cpu.score(tokens, &blocks(tokens.len())).unwrap();
            assert_close(&logprobs(sequence), &scores[prompt_len - 1..]);
            // All but a close call.
            let expect = most_likely(&config, &weights, tokens);
            let num_equal = sampled.iter().zip(&expect[prompt_len - 1..]).filter(|(s, e)| s.token == **e).count();
            assert!(sampled.len() >= 12 && num_equal + 1 >= sampled.len(), "{num_equal} of {}", sampled.len());
        }
    }
}

/// More keys than one thread block takes.
#[test]
fn a_long_context_agrees_with_the_cpu() {
    let config = config(Tiny::Qwen3);
    let weights = weights(&config, 1);
    let prompt = some_tokens(600, 3);
    let table: Vec<u32> = blocks(610).iter().map(|block| block.0).collect();
    let mut gpu = gpu(&config, &weights);
    let mut sequence = [Sequence::new(prompt, &table, 0.0)];
    advance(&mut gpu, &mut sequence, &[90], 4);
    let scores = cpu(&config, &weights).score(&sequence[0].tokens, &blocks(610)).unwrap();
    assert_close(&logprobs(&sequence[0]), &scores[599..]);
}

#[test]
fn company_and_places_in_memory_change_no_bit_of_the_kernels() {
    let config = config(Tiny::Qwen2);
    let weights = weights(&config, 3);
    let run = |others: usize, blocks: &[u32]| {
        let mut sequences = vec![Sequence::new(some_tokens(37, 4), blocks, 1.0)];
        let others = (0..others as u32).map(|i| (i, [20 + 4 * i, 21 + 4 * i, 22 + 4 * i, 23 + 4 * i]));
        sequences.extend(others.map(|(i, blocks)| Sequence::new(some_tokens(9 + i as usize, i), &blocks, 0.7)));
        advance(&mut gpu(&config, &weights), &mut sequences, &[12], 8);
        sequences[0].sampled.iter().map(|s| (s.token, s.logprob.to_bits())).collect::<Vec<_>>()
    };
    let alone = run(0, &[0, 1, 2]);
    assert_eq!(alone, run(1, &[9, 2, 4]));
    assert_eq!(alone, run(8, &[7, 0, 3]));
}

#[test]
fn copied_blocks_hold_what_the_original_held() {
    let config = config(Tiny::Qwen3);
    let mut runner = gpu(&config, &weights(&config, 1));
    let prompt = some_tokens(20, 6);
    let mut original = [Sequence::new(prompt.clone(), &[3, 4, 5], 0.0)];
    // The last token alone in both cases, as decoding and prompts add up in another order.
    advance(&mut runner, &mut original, &[19, 1], 1);
    let item = BatchItem {
        tokens: prompt[19..].to_vec(),
        start: 19,
        block_table: vec![BlockId(3), BlockId(8)],
        choose: Some(choose(0.0, 0.0)),
    };
    let copies = vec![BlockCopy { from: BlockId(4), to: BlockId(8) }];
    let copied = runner.run(&StepBatch { copies, items: vec![item] }).unwrap();
    assert_eq!(copied, original[0].sampled);
}

pub(super) fn item(choose: Choose, block: u32) -> BatchItem {
    BatchItem { tokens: some_tokens(5, 1), start: 0, block_table: vec![BlockId(block)], choose: Some(choose) }
}

/// The same logits, sampled on the device, and on the host because their log-probs are asked for.
#[test]
fn device_and_host_choose_alike() {
    let config = config(Tiny::Llama);
    let mut runner = gpu(&config, &weights(&config, 1));
    let likeliest =
        runner.run(&StepBatch { copies: Vec::new(), items: vec![item(choose(0.0, 0.0), 0)] }).unwrap()[0].token;
    let mut tokens = std::collections::BTreeSet::new();
    for round in 0..40 {
        let sampling = Sampling {
            temperature: [0.0, 0.7, 1.5, 3.0][round % 4],
            top_k: [0, 5, 40][round % 3],
            top_p: [1.0, 0.8, 0.95][round / 2 % 3],
            min_p: [0.0, 0.1][round / 3 % 2],
            ..Sampling::default()
        };
        let suppress: Arc<[TokenId]> = if round % 5 == 0 { [likeliest].into() } else { [].into() };
        let plain = Choose {
            sampling: sampling.clone().into(),
            uniform: (round as f32 * 0.377 + 0.01).fract(),
            suppress,
            ..choose(0.0, 0.0)
        };
        let reported = Choose { sampling: Sampling { logprobs: 3, ..sampling }.into(), ..plain.clone() };
        let items = vec![item(reported, 1), item(plain, 2)];
        let sampled = runner.run(&StepBatch { copies: Vec::new(), items }).unwrap();
        let [on_host, on_device] = sampled.as_slice() else { panic!("{sampled:?}") };
        assert_eq!(on_host.token, on_device.token, "round {round}");
        assert!((on_host.logprob - on_device.logprob).abs() < 1e-4, "{sampled:?}");
        assert_eq!(on_host.raw.as_ref().unwrap().top.len(), 3);
        assert_eq!(on_device.raw, None);
        tokens.insert(on_host.token);
    }
    assert!(tokens.len() > 5, "{tokens:?}");
}

#[test]
fn edits_are_those_of_the_cpu() {
    let config = config(Tiny::Qwen2);
    let weights = weights(&config, 1);
    let (mut gpu, mut cpu) = (gpu(&config, &weights), cpu(&config, &weights));
    let greedy = Sampling { temperature: 0.0, logprobs: 4, ..Sampling::default() };
    let mut banned = Vec::new();
    for round in 0..4 {
        let sampling =
            Sampling { bad_token_ids: banned.clone(), repetition_penalty: 1.0 + round as f32, ..greedy.clone() };
        let counts = vec![(7, 1), (30, 2), (200, 0)];
        let choose = Choose { sampling: sampling.into(), counts, ..choose(0.0, 0.0) };
        let batch = StepBatch { copies: Vec::new(), items: vec![item(choose, 0)] };
        let (on_gpu, on_cpu) = (gpu.run(&batch).unwrap().remove(0), cpu.run(&batch).unwrap().remove(0));
        assert_eq!(on_gpu.token, on_cpu.token);
        assert!((on_gpu.logprob - on_cpu.logprob).abs() < TOLERANCE);
        assert!(!banned.contains(&on_gpu.token));
        banned.push(on_gpu.token);
    }
}

/// Graphs hold addresses: a swap must not move the weights, and a cache that moved must not be found by old graphs.
#[test]
fn swaps_keep_graphs_and_sleep_drops_them() {
    let config = config(Tiny::Qwen2);
    let (old, new) = (weights(&config, 1), weights(&config, 2));
    let queue = EmulatedQueue::default();
    let num_captures = Arc::clone(&queue.num_captures);
    let mut runner = gpu_with(queue, &config, &old, SIZES);
    let run = |runner: &mut GpuRunner<EmulatedQueue>| {
        let mut sequences = [Sequence::new(some_tokens(20, 1), &[4, 7], 0.0)];
        advance(runner, &mut sequences, &[32], 6);
        sequences[0].sampled.clone()
    };
    let before = run(&mut runner);
    assert_eq!(num_captures.load(Ordering::Relaxed), 1);
    let mut staged = GpuWeights::empty(&config, Device::Cpu).unwrap();
    for unit_idx in (0..new.num_units()).rev() {
        staged.set_unit(unit_idx, &new.views(unit_idx)).unwrap();
    }
    let mut spare = runner.swap(staged).unwrap().unwrap();
    let after = run(&mut runner);
    assert_eq!(after, run(&mut gpu(&config, &new)));
    assert_ne!(after, before);
    // What comes back is memory of its own.
    for unit_idx in 0..old.num_units() {
        spare.set_unit(unit_idx, &old.views(unit_idx)).unwrap();
    }
    assert_eq!(run(&mut runner), after);
    assert_eq!(num_captures.load(Ordering::Relaxed), 1);

    runner.release_cache().unwrap();
    let error = format!("{:#}", runner.score(&[1, 2, 3], &[BlockId(0)]).unwrap_err());
    assert!(error.contains("given back"), "{error}");
    runner.restore_cache().unwrap();
    assert_eq!(run(&mut runner), after);
    assert_eq!(num_captures.load(Ordering::Relaxed), 2);
}

#[test]
fn what_does_not_fit_the_memory_is_refused_by_name() {
    let config = config(Tiny::Qwen2);
    let mut runner = gpu(&config, &weights(&config, 1));
    let plain = || item(choose(0.0, 0.0), 0);
    let token = |token| vec![token];
    let cases = [
        (BatchItem { block_table: vec![BlockId(64)], ..plain() }, "block is 64, and must be below 64"),
        (BatchItem { tokens: token(260), ..plain() }, "token is 260, and must be below 260"),
        (BatchItem { tokens: vec![3; 17], ..plain() }, "last position is 16, and must be below 16"),
        (BatchItem { tokens: vec![3; 129], block_table: blocks(129), ..plain() }, "number of rows is 129"),
        (
            BatchItem { start: 700, tokens: token(1), block_table: vec![BlockId(0); 44], ..plain() },
            "sequence length is 701",
        ),
    ];
    for (item, expect) in cases {
        let error = format!("{:#}", runner.run(&StepBatch { copies: Vec::new(), items: vec![item] }).unwrap_err());
        assert!(error.contains(expect), "{error}");
    }
    let copies = vec![BlockCopy { from: BlockId(1), to: BlockId(90) }];
    let error = format!("{:#}", runner.run(&StepBatch { copies, items: vec![plain()] }).unwrap_err());
    assert!(error.contains("block is 90"), "{error}");
}

#[test]
fn logits_that_are_not_finite_end_the_step_with_their_row() {
    let config = config(Tiny::Qwen2);
    let weights = weights(&config, 1);
    let mut runner = gpu(&config, &weights);
    let mut broken = GpuWeights::new(&config, &weights, Device::Cpu).unwrap();
    let head = weights.views(3);
    broken.set_unit(3, &[head[0].full_like(f64::NAN)]).unwrap();
    drop(runner.swap(broken).unwrap());
    for tokens in [vec![1], vec![1, 2]] {
        let item = BatchItem { tokens, ..item(choose(1.0, 0.5), 0) };
        let error = format!("{:#}", runner.run(&StepBatch { copies: Vec::new(), items: vec![item] }).unwrap_err());
        assert!(error.contains("of row 0 is NaN"), "{error}");
    }
    assert!(runner.score(&[1, 2], &[BlockId(0)]).is_err());
}

// === Whole engines ===

/// One sample: its tokens with the bits of their log-probs and their versions.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Outcome {
    tokens: Vec<TokenId>,
    pub(super) logprobs: Vec<u32>,
    pub(super) versions: Vec<u64>,
    finish: Option<FinishReason>,
}

/// Prompts of different lengths with 1 to 4 samples.
fn prompts() -> Vec<(Vec<TokenId>, u32)> {
    [(3, 1), (20, 4), (33, 2), (12, 3), (1, 2)].map(|(len, samples)| (some_tokens(len, len as u32), samples)).into()
}

fn start(change: impl FnOnce(&mut EngineConfig)) -> EngineHandle<GpuWeights> {
    let build = |config: &ModelConfig, sizes| gpu_with(EmulatedQueue::default(), config, &weights(config, 1), sizes);
    start_with(change, build)
}

/// `build` makes the runner of a [`Tiny::Qwen2`].
pub(super) fn start_with(
    change: impl FnOnce(&mut EngineConfig),
    build: impl FnOnce(&ModelConfig, GpuSizes) -> GpuRunner<EmulatedQueue> + Send + 'static,
) -> EngineHandle<GpuWeights> {
    let mut engine_config = EngineConfig {
        block_size: BLOCK_SIZE,
        num_blocks: SIZES.num_blocks,
        max_num_seqs: SIZES.max_num_seqs,
        max_num_batched_tokens: SIZES.max_num_batched_tokens,
        max_model_len: SIZES.max_model_len,
        steps_per_look: SIZES.steps_per_look,
        kv: KvPolicy::Recompute,
        enable_prefix_caching: true,
        eos_token_ids: vec![256],
        version: PolicyVersion(1),
    };
    change(&mut engine_config);
    let sizes = GpuSizes { num_blocks: engine_config.num_blocks, ..SIZES };
    engine::spawn(engine_config, move || Ok(build(&config(Tiny::Qwen2), sizes))).unwrap().0
}

/// Asks for everything before the first step.
pub(super) async fn ask(handle: &EngineHandle<GpuWeights>, sampling: &Sampling) -> Vec<mpsc::Receiver<TokenEvent>> {
    handle.pause().await.unwrap();
    let mut all = Vec::new();
    for (key, (prompt, num_samples)) in (0..).zip(prompts()) {
        let (events, receiver) = mpsc::channel(Request::events_capacity(num_samples as usize, sampling.max_tokens));
        let request = Request {
            key: RequestKey(key),
            prompt_id: PromptId(key),
            prompt,
            sample_indices: (0..num_samples).collect(),
            sampling: sampling.clone(),
            seed: key,
            deadline: Instant::now() + Duration::from_secs(600),
            events,
        };
        handle.add(request).await.unwrap();
        all.push(receiver);
    }
    handle.resume().await.unwrap();
    all
}

/// Outcomes by prompt and sample.
pub(super) async fn outcomes(receivers: Vec<mpsc::Receiver<TokenEvent>>) -> BTreeMap<(usize, u32), Outcome> {
    let mut outcomes: BTreeMap<(usize, u32), Outcome> = BTreeMap::new();
    for (key, mut events) in receivers.into_iter().enumerate() {
        while let Some(event) = events.recv().await {
            let outcome = outcomes.entry((key, event.sample_index())).or_default();
            outcome.finish = event.finish();
            let TokenEvent::Token { token, logprob, version, .. } = event else { panic!("{event:?}") };
            outcome.tokens.push(token);
            outcome.logprobs.push(logprob.to_bits());
            outcome.versions.push(version.0);
        }
    }
    outcomes
}

#[tokio::test]
async fn several_steps_a_look_give_the_same_bits() {
    let stops = Sampling { max_tokens: 21, temperature: 0.9, min_tokens: 4, ..Sampling::default() };
    let cuts = Sampling { top_k: 30, top_p: 0.9, min_p: 0.01, ignore_eos: true, ..stops.clone() };
    for sampling in [Sampling { stop_token_ids: (0..12).map(|i| i * 20).collect(), ..stops }, cuts] {
        let mut expect = None;
        for steps_per_look in [1, 3, 8] {
            let handle = start(|config| config.steps_per_look = steps_per_look);
            let found = outcomes(ask(&handle, &sampling).await).await;
            let counters = handle.status().await.unwrap().counters;
            assert_eq!(counters.preemptions, 0);
            let (expect, steps) = expect.get_or_insert_with(|| (found.clone(), counters.steps));
            assert!(found == *expect, "{steps_per_look} steps a look: {found:?} and {expect:?}");
            assert!(counters.steps * steps_per_look as u64 <= *steps + 4 * steps_per_look as u64, "{counters:?}");
        }
        let (expect, _) = expect.unwrap();
        let num_stopped = expect.values().filter(|outcome| outcome.finish == Some(FinishReason::Stop)).count();
        assert_eq!(num_stopped > 3, !sampling.ignore_eos);
        assert!(expect.len() == 12 && expect.values().all(|outcome| outcome.tokens.len() > 4));
    }
}

/// Every log-prob is that of the weights that its token was sampled under, given all tokens before it, although blocks
/// are shared, copied, lost and computed again.
#[tokio::test]
async fn forks_preemption_and_swaps_keep_to_the_model() {
    let handle = start(|config| config.num_blocks = 14);
    let sampling = Sampling { max_tokens: 40, ignore_eos: true, ..Sampling::default() };
    let mut receivers = ask(&handle, &sampling).await;
    let config = config(Tiny::Qwen2);
    let all_weights = [1, 2].map(|seed| weights(&config, seed));
    // In the middle of it all.
    let first = receivers[1].recv().await.unwrap();
    let staged = GpuWeights::new(&config, &all_weights[1], Device::Cpu).unwrap();
    drop(handle.swap(staged, PolicyVersion(2)).await.unwrap());

    let mut found = outcomes(receivers).await;
    let TokenEvent::Token { token, logprob, version, .. } = first else { panic!("{first:?}") };
    let outcome = found.get_mut(&(1, first.sample_index())).unwrap();
    outcome.tokens.insert(0, token);
    outcome.logprobs.insert(0, logprob.to_bits());
    outcome.versions.insert(0, version.0);
    assert!(handle.status().await.unwrap().counters.preemptions > 3);
    assert_eq!(found.len(), 12);
    let mut scorers = all_weights.map(|weights| cpu(&config, &weights));
    let mut num_under = [0; 2];
    for ((key, _), Outcome { tokens, logprobs, versions, .. }) in found {
        assert_eq!(tokens.len(), 40);
        let prompt = prompts()[key].0.clone();
        let whole = [prompt.clone(), tokens].concat();
        for (scorer, version) in scorers.iter_mut().zip(1..) {
            let scores = scorer.score(&whole, &blocks(whole.len())).unwrap();
            let under: Vec<usize> = (0..40).filter(|&i| versions[i] == version).collect();
            let expect: Vec<f32> = under.iter().map(|&i| scores[prompt.len() - 1 + i]).collect();
            let found: Vec<f32> = under.iter().map(|&i| f32::from_bits(logprobs[i])).collect();
            if !under.is_empty() {
                assert_close(&found, &expect);
            }
            num_under[version as usize - 1] += under.len();
        }
    }
    assert!(num_under.iter().all(|num| *num > 0), "{num_under:?}");
}
