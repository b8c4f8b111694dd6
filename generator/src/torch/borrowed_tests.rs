//! The GPU's runner over emulated kernels, with weights that somebody in this process lends it.

use std::time::{Duration, Instant};

use aha_core::ids::{PolicyVersion, PromptId};
use aha_core::rollout::Sampling;
use aha_nn::gpu::{GpuModel, GpuWeights};
use aha_nn::kernels::cpu::Pool;
use aha_nn::model_config::ModelConfig;
use aha_nn::unit::ModelWeights;
use aha_nn::weights::Weights;
use tch::{Device, Kind, Tensor};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use super::GpuRunner;
use super::emulated_queue::EmulatedQueue;
use super::gpu_tests::{ask, config, gpu, item, outcomes, start_with, weights};
use super::tests::{Sequence, advance, choose, some_tokens};
use crate::engine::{BlockId, EngineError, EngineHandle, Request, RequestKey, Runner, StepBatch, TokenEvent};
use crate::testing::Tiny;

/// Asleep, for weights that come.
fn start_without_weights() -> EngineHandle<GpuWeights> {
    start_with(
        |_| {},
        |config, sizes| {
            let model = GpuModel::new(EmulatedQueue::default(), config, None, sizes).unwrap();
            GpuRunner::new(model, Pool::new(1).unwrap())
        },
    )
}

async fn serve(handle: &EngineHandle<GpuWeights>, staged: GpuWeights, version: u64) {
    assert!(handle.swap(staged, PolicyVersion(version)).await.unwrap().spare.is_none());
    handle.wake().await.unwrap();
}

fn borrowed(config: &ModelConfig, weights: &Weights) -> GpuWeights {
    GpuWeights::borrowed(config, weights.lend().unwrap().unwrap(), Device::Cpu).unwrap()
}

/// Changes every parameter where it is, by what differs from step to step.
fn train(weights: &Weights, step: u64) {
    assert!(!weights.is_lent(), "nobody reads what is written");
    for mut view in (0..weights.num_units()).flat_map(|unit_idx| weights.views(unit_idx)) {
        let change = Tensor::arange(view.numel() as i64, (Kind::Float, Device::Cpu)) * (0.3 + step as f64);
        tch::no_grad(|| view.copy_(&(&view + change.sin().view_as(&view) * 0.05)));
    }
}

/// The same prompts under every version, so that anything left of an earlier one would show.
#[tokio::test]
async fn borrowed_weights_give_the_bits_of_copies_version_after_version() {
    let config = config(Tiny::Qwen2);
    let policy = Weights::random(&config, 1, 2, Kind::BFloat16, Device::Cpu);
    train(&policy, 0);
    let addresses = || (0..policy.num_units()).map(|idx| policy.flat(idx).data_ptr()).collect::<Vec<_>>();
    let before = addresses();
    let (sharing, copying) = (start_without_weights(), start_without_weights());
    let sampling = Sampling { max_tokens: 16, ignore_eos: true, ..Sampling::default() };
    let mut all = Vec::new();
    for version in 1..=4 {
        serve(&sharing, borrowed(&config, &policy), version).await;
        serve(&copying, GpuWeights::new(&config, &policy, Device::Cpu).unwrap(), version).await;
        let [shared, copied] =
            [outcomes(ask(&sharing, &sampling).await).await, outcomes(ask(&copying, &sampling).await).await];
        assert!(shared == copied, "version {version}: {shared:?} and {copied:?}");
        assert!(shared.values().all(|outcome| outcome.versions.iter().all(|found| *found == version)));
        let logprobs: Vec<_> = shared.into_values().map(|outcome| outcome.logprobs).collect();
        assert!(!all.contains(&logprobs), "version {version} samples what another did");
        all.push(logprobs);
        // A set that comes while the engine is awake takes the place of the one before.
        serve(&sharing, borrowed(&config, &policy), version).await;
        assert!(policy.is_lent());
        sharing.sleep(true).await.unwrap();
        copying.sleep(true).await.unwrap();
        train(&policy, version);
        assert_eq!(addresses(), before);
    }
}

#[tokio::test]
async fn without_weights_nothing_is_sampled() {
    let handle = start_without_weights();
    let config = config(Tiny::Qwen2);
    let policy = Weights::random(&config, 1, 1, Kind::BFloat16, Device::Cpu);
    for round in 1..3 {
        assert_eq!(handle.wake().await, Err(EngineError::NoWeights));
        assert_eq!(handle.resume().await, Err(EngineError::Asleep));
        assert_eq!(handle.score(vec![1, 2, 3]).await, Err(EngineError::Asleep));
        assert_eq!(handle.status().await.unwrap().used_blocks, 0);
        assert!(!policy.is_lent());
        serve(&handle, borrowed(&config, &policy), round).await;
        assert_eq!(handle.score(vec![1, 2, 3]).await.unwrap().logprobs.len(), 2);
        handle.sleep(true).await.unwrap();
    }
    // A request that comes meanwhile waits.
    let (events, mut receiver) = mpsc::channel(Request::events_capacity(1, 4));
    let sampling = Sampling { max_tokens: 4, ignore_eos: true, ..Sampling::default() };
    let deadline = Instant::now() + Duration::from_secs(600);
    let (key, prompt_id, prompt) = (RequestKey(1), PromptId(1), some_tokens(5, 1));
    let request = Request { key, prompt_id, prompt, sample_indices: vec![0], sampling, seed: 1, deadline, events };
    handle.add(request).await.unwrap();
    assert_eq!(handle.status().await.unwrap().num_waiting, 1);
    assert_eq!(receiver.try_recv().unwrap_err(), TryRecvError::Empty);
    serve(&handle, borrowed(&config, &policy), 7).await;
    let Some(TokenEvent::Token { version, .. }) = receiver.recv().await else { panic!("no token comes") };
    assert_eq!(version, PolicyVersion(7));
}

/// The runner by itself: without weights, steps are refused and not computed from what is no longer there.
#[test]
fn a_step_without_weights_is_refused() {
    let config = config(Tiny::Qwen2);
    let mut runner = gpu(&config, &weights(&config, 1));
    runner.release_weights().unwrap();
    let error = format!("{:#}", runner.score(&[1, 2, 3], &[BlockId(0)]).unwrap_err());
    assert!(error.contains("no weights"), "{error}");
    let error = runner.run(&StepBatch { copies: Vec::new(), items: vec![item(choose(0.0, 0.0), 0)] }).unwrap_err();
    assert!(format!("{error:#}").contains("no weights"), "{error:#}");
}

/// Graphs hold addresses, and what is lent is never written.
#[test]
fn a_set_that_takes_the_place_of_another_is_read_and_not_written() {
    let config = config(Tiny::Qwen2);
    let policies = [1, 2].map(|seed| Weights::random(&config, seed, 1, Kind::BFloat16, Device::Cpu));
    let run = |runner: &mut GpuRunner<EmulatedQueue>| {
        let mut sequences = [Sequence::new(some_tokens(20, 1), &[4, 7], 0.0)];
        advance(runner, &mut sequences, &[32], 6);
        sequences[0].sampled.clone()
    };
    let expect = policies.each_ref().map(|policy| run(&mut gpu(&config, policy)));
    assert_ne!(expect[0], expect[1]);
    let mut runner = gpu(&config, &policies[0]);
    assert_eq!(run(&mut runner), expect[0]);
    for lent in [1, 0, 1] {
        assert!(runner.swap(borrowed(&config, &policies[lent])).unwrap().is_none());
        assert_eq!(policies.each_ref().map(Weights::is_lent), [lent == 0, lent == 1]);
        assert_eq!(run(&mut runner), expect[lent]);
    }
    let before = policies[1].copy();
    let copied = GpuWeights::new(&config, &policies[0], Device::Cpu).unwrap();
    assert!(runner.swap(copied).unwrap().is_none() && !policies[1].is_lent());
    assert_eq!(run(&mut runner), expect[0]);
    assert!((0..before.num_units()).all(|unit_idx| before.flat(unit_idx).equal(policies[1].flat(unit_idx))));
}
