//! Long runs of many requests through one engine.

use aha_core::ids::TokenId;
use aha_core::random::derive_seed;
use aha_core::rollout::Completion;
use futures::stream::{self, StreamExt};

use super::*;
use crate::LocalGenerator;

/// Requests under way at once.
const CLIENTS: usize = 48;

/// Request number `index`: a prompt of 1 to 60 tokens, every third one beginning alike, and 1 to `longest` new tokens.
fn ragged(index: u64, longest: u64) -> (Vec<TokenId>, Sampling) {
    let draw = |purpose, bound| derive_seed(5, &[index, purpose]) % bound;
    let common = if index.is_multiple_of(3) { 33 } else { 0 };
    let own = (0..1 + draw(0, 60 - common)).map(|position| draw(10 + position, 256) as TokenId);
    let prompt = (0..common as TokenId).chain(own).collect();
    (prompt, Sampling { max_tokens: 1 + draw(1, longest) as u32, ..Sampling::default() })
}

async fn complete_all(generator: &LocalGenerator, indices: std::ops::Range<u64>, longest: u64) -> Vec<Vec<Completion>> {
    let requests = stream::iter(indices).map(|index| async move {
        let (prompt, sampling) = ragged(index, longest);
        generator.generate(&prompt, &sampling, index, 1 + (index % 3) as u32).await.unwrap()
    });
    requests.buffered(CLIENTS).collect().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_ragged_requests_are_the_same_under_constant_preemption() {
    let folder = tiny_folder(Tiny::Qwen2, 1);
    let roomy = tiny_options(folder.path());
    let mut cramped = tiny_options(folder.path());
    // Far less memory than 48 sequences grow to.
    (cramped.generator.kv_cache_mib, cramped.generator.max_num_seqs) = (1, 48);
    let roomy = LocalGenerator::load(&roomy).unwrap();
    let cramped = LocalGenerator::load(&cramped).unwrap();
    let expect = complete_all(&roomy, 0..1000, 80).await;
    assert!(complete_all(&cramped, 0..1000, 80).await == expect, "a completion differs");
    let status = cramped.status().await.unwrap();
    assert!(status.counters.preemptions > 100, "{status:?}");
    assert_eq!((status.used_blocks, status.num_running, status.num_waiting), (0, 0, 0), "{status:?}");
}

/// `cargo test -p aha-generator soak -- --ignored`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a soak: run it after changes to the engine"]
async fn memory_stays_flat_over_20_000_requests() {
    let folder = tiny_folder(Tiny::Qwen2, 1);
    let generator = LocalGenerator::load(&tiny_options(folder.path())).unwrap();
    let memory = || aha_nn::runtime::memory().unwrap().rss;
    let mut sizes = Vec::new();
    for batch in 0..10 {
        drop(complete_all(&generator, batch * 2000..(batch + 1) * 2000, 20).await);
        sizes.push(memory() >> 10);
    }
    let status = generator.status().await.unwrap();
    assert_eq!((status.used_blocks, status.num_running, status.num_waiting), (0, 0, 0), "{status:?}");
    // The first batches still grow pools and caches.
    assert!(sizes[9] < sizes[2] + 4096, "kB after every 2000 requests: {sizes:?}");
}
