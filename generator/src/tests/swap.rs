//! For how long decoding stands still while new weights come in.

use std::time::Instant;

use aha_core::config::{self, KvPolicy};
use aha_core::ids::{PolicyVersion, PromptId};
use aha_nn::model_config::ModelConfig;
use aha_nn::weights::Weights;
use serde_json::json;
use tch::{Device, Kind};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::update::{GROUP, Trainer, announcement, send_in};
use super::*;
use crate::engine::{self, RequestKey, TokenEvent};
use crate::instance::Instance;
use crate::testing::{tiny_config, write_tokenizer};
use crate::torch::{Membership, Push, WeightReceiver};

/// Sequences that decode, and the tokens that each gets before the push and after the swap.
const NUM_SEQUENCES: u32 = 8;
const NUM_TOKENS: usize = 40;

/// One token of the first sequence.
struct Arrival {
    at: Instant,
    version: u64,
}

/// What a push does to sequences that decode.
#[derive(Debug)]
struct Figures {
    /// Median time between two tokens: before the push, while the weights are received, and after the swap.
    before: Duration,
    meanwhile: Duration,
    after: Duration,
    /// Between the last token of the old weights and the first one of the new ones.
    across: Duration,
    /// As the engine reports it: for which it could take no step.
    stood_still: Duration,
    receive: Duration,
    num_meanwhile: usize,
}

/// Decodes, pushes, and decodes on; every token has one of two versions, in this order. The weights come when `late` more
/// tokens are there after they were announced.
async fn measure(config: &ModelConfig, kv: KvPolicy, bucket_numel: usize, late: usize) -> Figures {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_json("float32").to_string()).unwrap();
    write_tokenizer(folder.path());
    let mut options = tiny_options(folder.path());
    options.model = config::Model { random_init: true, ..options.model };
    options.generator = config::Generator { kv, kv_cache_mib: 256, max_model_len: 2048, ..options.generator };
    let instance = Instance::start(&options).unwrap();
    let engine = instance.engine.clone();
    let receiver = WeightReceiver::start(config, instance.format, engine.clone(), Handle::current()).unwrap();

    let (trainer, weights) = (Trainer::new(), Weights::random(config, 2, 1, Kind::Float, Device::Cpu));
    let joining = trainer.join();
    let membership = Membership {
        store_host: "127.0.0.1".to_owned(),
        store_port: trainer.store.port(),
        group: GROUP.to_owned(),
        rank: 1,
        size: 2,
        num_trainers: 1,
        manifest_hash: config.manifest().hash(),
        bucket_numel,
        limit: PATIENCE,
        timeout: PATIENCE,
        is_nccl: false,
        kind: Kind::Float,
    };
    receiver.join(membership).await.unwrap();
    let group = joining.join().unwrap();
    let push =
        Push { group: GROUP.to_owned(), version: PolicyVersion(1), unit_hashes: announcement(1, &weights).unit_hashes };

    let sampling = Sampling { max_tokens: 1900, ignore_eos: true, ..Sampling::default() };
    let (events, mut incoming) = mpsc::channel(engine::Request::events_capacity(NUM_SEQUENCES as usize, 1900));
    let request = engine::Request {
        key: RequestKey(1),
        prompt_id: PromptId(1),
        prompt: (1..100).collect(),
        sample_indices: (0..NUM_SEQUENCES).collect(),
        sampling,
        seed: 3,
        deadline: Instant::now() + 10 * PATIENCE,
        events,
    };
    engine.add(request).await.unwrap();
    let mut arrivals = arrivals(&mut incoming, |arrivals| arrivals.len() == NUM_TOKENS).await;
    let pushed_at = Instant::now();
    let pushing = tokio::spawn(async move { receiver.receive(push).await.unwrap() });
    arrivals.extend(self::arrivals(&mut incoming, |arrivals| arrivals.len() == late).await);
    let sending = send_in(bucket_numel, group, weights);
    let is_enough = |arrivals: &[Arrival]| arrivals.iter().filter(|arrival| arrival.version == 1).count() == NUM_TOKENS;
    arrivals.extend(self::arrivals(&mut incoming, is_enough).await);
    let pushed = pushing.await.unwrap();
    sending.join().unwrap();

    assert!(arrivals.is_sorted_by_key(|arrival| arrival.version));
    let swapped = arrivals.iter().position(|arrival| arrival.version == 1).unwrap();
    let begun = arrivals.iter().position(|arrival| arrival.at > pushed_at).unwrap();
    Figures {
        before: median_gap(&arrivals[..begun]),
        meanwhile: median_gap(&arrivals[begun..swapped]),
        after: median_gap(&arrivals[swapped..]),
        across: arrivals[swapped].at - arrivals[swapped - 1].at,
        stood_still: pushed.swap,
        receive: pushed.receive,
        num_meanwhile: swapped - begun,
    }
}

/// Tokens of the first sequence as they come, until there are enough.
async fn arrivals(incoming: &mut mpsc::Receiver<TokenEvent>, is_enough: impl Fn(&[Arrival]) -> bool) -> Vec<Arrival> {
    let mut arrivals = Vec::new();
    while !is_enough(&arrivals) {
        let event = incoming.recv().await.expect("tokens come until there are enough");
        if let TokenEvent::Token { sample_index: 0, version, .. } = event {
            arrivals.push(Arrival { at: Instant::now(), version: version.0 });
        }
    }
    arrivals
}

fn median_gap(arrivals: &[Arrival]) -> Duration {
    let mut gaps: Vec<Duration> = arrivals.windows(2).map(|pair| pair[1].at - pair[0].at).collect();
    gaps.sort();
    gaps.get(gaps.len() / 2).copied().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn decoding_stands_still_for_less_than_a_step() {
    for kv in [KvPolicy::Keep, KvPolicy::Recompute] {
        let figures = measure(&tiny_config(Tiny::Llama), kv, 5000, 20).await;
        assert!(figures.stood_still < figures.before, "{kv:?}: {figures:?}");
        assert!(figures.num_meanwhile >= 20, "decoding does not wait for the weights: {kv:?}: {figures:?}");
    }
}

/// `cargo test -p aha-generator a_push_to_smollm2 -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: takes 3 GB of memory and a minute"]
async fn a_push_to_smollm2_135m() {
    let raw = json!({"model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 100_000.0, "tie_word_embeddings": true});
    let config = ModelConfig::from_json(raw.as_object().unwrap().clone()).unwrap();
    for kv in [KvPolicy::Keep, KvPolicy::Recompute] {
        let figures = measure(&config, kv, 16 << 20, 0).await;
        let Figures { before, meanwhile, after, across, stood_still, receive, num_meanwhile } = figures;
        println!(
            "{kv:?}: a step takes {before:.1?}, {meanwhile:.1?} while {receive:.2?} of weights come ({num_meanwhile} steps), \
             {after:.1?} after; {across:.1?} from the last old token to the first new one, of which {stood_still:.1?} swap"
        );
        assert!(stood_still < before);
    }
}
