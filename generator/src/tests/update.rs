//! New weights, pushed by a trainer that a thread of the test plays.

use std::net::TcpListener;
use std::thread;
use std::time::Instant;

use aha_core::config::Dtype;
use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use aha_nn::tensor_data::bytes;
use aha_nn::weights::Weights;
use tch::{Device, Kind};
use xxhash_rust::xxh3::xxh3_64;

use super::metrics::Page;
use super::*;
use crate::testing::{tiny_config, tiny_weights};

pub(super) const GROUP: &str = "push-1";
/// Elements; smaller than the embedding, so that a unit comes in several buckets.
const BUCKET_NUMEL: usize = 5000;
const TINY: Tiny = Tiny::Llama;

/// Rank 0 of the update group.
pub(super) struct Trainer {
    pub(super) store: Store,
    dtype: v1::WeightType,
}

impl Trainer {
    pub(super) fn new() -> Self {
        Self { store: Store::host("127.0.0.1", 0, PATIENCE).unwrap(), dtype: v1::WeightType::Float32 }
    }

    fn invitation(&self, timeout: Duration) -> v1::JoinUpdateGroupRequest {
        v1::JoinUpdateGroupRequest {
            store_host: "127.0.0.1".to_owned(),
            store_port: u32::from(self.store.port()),
            group: GROUP.to_owned(),
            rank: 1,
            size: 2,
            num_trainers: 1,
            manifest_hash: tiny_config(TINY).manifest().hash(),
            bucket_numel: BUCKET_NUMEL as u64,
            timeout_seconds: timeout.as_secs_f64(),
            backend: v1::PushBackend::Gloo.into(),
            dtype: self.dtype.into(),
        }
    }

    pub(super) fn join(&self) -> thread::JoinHandle<ProcessGroup> {
        let store = self.store.clone();
        thread::spawn(move || {
            let address = Address::Host("127.0.0.1".to_owned());
            let spec = GroupSpec { name: GROUP.to_owned(), rank: 0, size: 2, timeout: PATIENCE, address };
            ProcessGroup::new(Backend::Gloo, &store, &spec).unwrap()
        })
    }

    /// Brings trainer and generator together.
    async fn meet(&self, server: &mut Server, timeout: Duration) -> ProcessGroup {
        let joining = self.join();
        server.client.join_update_group(self.invitation(timeout)).await.unwrap();
        joining.join().unwrap()
    }
}

fn send(group: ProcessGroup, weights: Weights) -> thread::JoinHandle<ProcessGroup> {
    send_in(BUCKET_NUMEL, group, weights)
}

pub(super) fn send_in(bucket_numel: usize, group: ProcessGroup, weights: Weights) -> thread::JoinHandle<ProcessGroup> {
    thread::spawn(move || {
        for bucket in weights.manifest.buckets(1, bucket_numel) {
            let mut part = weights.flat(bucket.unit_idx).narrow(0, bucket.offset as i64, bucket.numel as i64);
            group.broadcast(&mut part, bucket.owner).unwrap();
        }
        group
    })
}

pub(super) fn announcement(version: u64, weights: &Weights) -> v1::UpdateWeightsRequest {
    let hash = |unit_idx: usize| {
        let numel = weights.manifest.units[unit_idx].numel() as i64;
        xxh3_64(bytes(&weights.flat(unit_idx).narrow(0, 0, numel)))
    };
    let unit_hashes = (0..weights.num_units()).map(hash).collect();
    v1::UpdateWeightsRequest { group: GROUP.to_owned(), version, unit_hashes }
}

/// Log-probs of some tokens by the trainer's own forward pass.
fn expected(weights: &Weights) -> Vec<f32> {
    aha_nn::forward::score(&tiny_config(TINY), weights, &probe())
}

fn probe() -> Vec<u32> {
    (0..30).map(|index| index * 7 % 256).collect()
}

async fn serves(server: &mut Server, weights: &Weights) -> bool {
    let found = server.score(probe()).await;
    found.iter().zip(expected(weights)).all(|(found, expected)| (found - expected).abs() < 1e-4)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_changes_the_version_once_in_the_middle_of_a_request() {
    let metrics_address = Some("127.0.0.1:0".parse().unwrap());
    let mut server =
        Server::start_with(TINY, Duration::ZERO, |options| options.generator.metrics_address = metrics_address).await;
    let (old, new) = (tiny_weights(&tiny_config(TINY), 1), tiny_weights(&tiny_config(TINY), 2));
    let trainer = Trainer::new();
    let group = trainer.meet(&mut server, PATIENCE).await;
    assert!(serves(&mut server, &old).await && !serves(&mut server, &new).await);

    let stream = server.generate(request("running", 4, ENDLESS)).await.unwrap();
    server.wait_until(|status| status.running == 4 && status.generation_tokens > 20).await;
    let announced = announcement(7, &new);
    let sending = send(group, new.copy());
    let pushed = server.client.update_weights(announced).await.unwrap().into_inner();
    assert!(pushed.version == 7 && pushed.receive_seconds > 0.0 && pushed.swap_seconds < pushed.receive_seconds);
    sending.join().unwrap();

    let swapped = server.status().await;
    assert_eq!(swapped.version, 7);
    let page = Page::scrape(&server).await;
    for (name, seconds) in [("weight_swap", pushed.swap_seconds), ("weight_receive", pushed.receive_seconds)] {
        page.check(&format!("{name}_seconds_count"), 1);
        assert!((page.of(&format!("aha_generator_{name}_seconds_sum")) - seconds).abs() < 1e-9, "{name}");
    }
    server.wait_until(|status| status.generation_tokens > swapped.generation_tokens + 20).await;
    server.client.abort(v1::AbortRequest { request_id: "running".to_owned() }).await.unwrap();
    for completion in collect(stream).await.unwrap() {
        let versions: Vec<u64> = completion.spans.iter().map(|span| span.version).collect();
        assert_eq!(versions, [0, 7], "{:?}", completion.spans);
        let covered: usize = completion.spans.iter().map(|span| span.num_tokens as usize).sum();
        assert_eq!(covered, completion.token_ids.len());
    }
    assert!(serves(&mut server, &new).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generator_that_gave_its_weights_back_waits_for_others() {
    let mut server = Server::start(TINY).await;
    let weights = tiny_weights(&tiny_config(TINY), 1);
    let undisturbed = server.completions(request("undisturbed", 4, 150)).await;
    let trainer = Trainer::new();
    let mut group = trainer.meet(&mut server, PATIENCE).await;

    let stream = server.generate(request("disturbed", 4, 150)).await.unwrap();
    server.wait_until(|status| status.generation_tokens > 600 + 8).await;
    // The first time there is no second set of weights yet, the second time it was given back.
    for version in [0, 0] {
        server.client.sleep(v1::SleepRequest { drop_weights: true }).await.unwrap();
        let wake = server.client.wake(v1::WakeRequest {}).await.unwrap_err();
        check_status(&wake, Code::FailedPrecondition, "no weights");
        let sending = send(group, weights.copy());
        server.client.update_weights(announcement(version, &weights)).await.unwrap();
        group = sending.join().unwrap();
        server.client.wake(v1::WakeRequest {}).await.unwrap();
    }
    assert_eq!(collect(stream).await.unwrap(), undisturbed);
    assert!(serves(&mut server, &weights).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_other_weights_computed_is_found_after_a_push() {
    let mut server = Server::start(TINY).await;
    let (old, new) = (tiny_weights(&tiny_config(TINY), 1), tiny_weights(&tiny_config(TINY), 2));
    let mut group = Trainer::new().meet(&mut server, PATIENCE).await;
    let asked = request("again", 1, 40);
    let before = server.completions(asked.clone()).await;
    assert_eq!(server.completions(asked.clone()).await, before);
    let hits = server.status().await.prefix_cache_hits;
    assert!(hits > 0);
    for (version, weights) in [(1, &new), (2, &old)] {
        let sending = send(group, weights.copy());
        server.client.update_weights(announcement(version, weights)).await.unwrap();
        group = sending.join().unwrap();
        assert_eq!(server.status().await.cached_blocks, 0);
        let after = server.completions(asked.clone()).await;
        assert_eq!(server.status().await.prefix_cache_hits, hits);
        assert_eq!(after[0].token_ids == before[0].token_ids, version == 2);
        let scored = server.score([&asked.token_ids[..], &after[0].token_ids].concat()).await;
        let scored = &scored[asked.token_ids.len() - 1..];
        let close = scored.iter().zip(&after[0].logprobs).all(|(scored, sampled)| (scored - sampled).abs() < 1e-4);
        assert!(close, "{scored:?} and {:?}", after[0].logprobs);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_with_another_hash_are_not_taken_and_the_next_push_is() {
    let mut server = Server::start(TINY).await;
    let (old, new) = (tiny_weights(&tiny_config(TINY), 1), tiny_weights(&tiny_config(TINY), 2));
    let trainer = Trainer::new();
    let group = trainer.meet(&mut server, PATIENCE).await;

    let mut wrong = announcement(1, &new);
    wrong.unit_hashes[2] ^= 1;
    let sending = send(group, new.copy());
    let refused = server.client.update_weights(wrong).await.unwrap_err();
    check_status(&refused, Code::DataLoss, "layers.1");
    let mut group = sending.join().unwrap();
    assert_eq!(server.status().await.version, 0);
    assert!(serves(&mut server, &old).await);

    for (version, weights) in [(1, &new), (2, &old), (3, &new)] {
        let sending = send(group, weights.copy());
        server.client.update_weights(announcement(version, weights)).await.unwrap();
        group = sending.join().unwrap();
        assert!(serves(&mut server, weights).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_that_never_shows_up_is_not_waited_for() {
    let mut server = Server::start(TINY).await;
    let old = tiny_weights(&tiny_config(TINY), 1);
    let trainer = Trainer::new();
    let short = Duration::from_millis(500);
    let alone = server.client.join_update_group(trainer.invitation(short)).await.unwrap_err();
    check_status(&alone, Code::Aborted, "did not come");

    let mut elsewhere = trainer.invitation(short);
    elsewhere.store_port = 1;
    let status = server.client.join_update_group(elsewhere).await.unwrap_err();
    check_status(&status, Code::Aborted, "127.0.0.1:1");

    let trainer = Trainer::new();
    let _silent = trainer.meet(&mut server, short).await;
    let late = server.client.update_weights(announcement(1, &old)).await.unwrap_err();
    check_status(&late, Code::Aborted, "broadcast");
    assert_eq!(server.status().await.version, 0);
    assert!(serves(&mut server, &old).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_group_ends_the_wait_for_a_lost_one() {
    let mut server = Server::start(TINY).await;
    let (lost, found) = (Trainer::new(), Trainer::new());
    let _silent = lost.meet(&mut server, PATIENCE).await;
    let weights = tiny_weights(&tiny_config(TINY), 2);
    let (mut client, announced) = (server.client.clone(), announcement(1, &weights));
    let waiting = tokio::spawn(async move { client.update_weights(announced).await });

    let group = found.meet(&mut server, PATIENCE).await;
    check_status(&waiting.await.unwrap().unwrap_err(), Code::Aborted, "another group");
    let sending = send(group, weights.copy());
    server.client.update_weights(announcement(2, &weights)).await.unwrap();
    sending.join().unwrap();
    assert!(serves(&mut server, &weights).await);
}

/// Where connections are taken and nothing is said.
fn silence() -> (TcpListener, u32) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_to_nowhere_ends_at_its_deadline_and_holds_up_no_other() {
    let mut server = Server::start(TINY).await;
    let (trainer, (_silent, store_port)) = (Trainer::new(), silence());
    let week = Duration::from_secs(7 * 24 * 3600);
    let mut call = Request::new(v1::JoinUpdateGroupRequest { store_port, ..trainer.invitation(week) });
    call.set_timeout(Duration::from_millis(300));
    let started = Instant::now();
    let code = server.client.join_update_group(call).await.unwrap_err().code();
    assert!([Code::Cancelled, Code::DeadlineExceeded, Code::Aborted].contains(&code), "{code:?}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    let group = trainer.meet(&mut server, PATIENCE).await;
    assert_eq!(server.status().await.update_group, GROUP);
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    drop(group);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_join_ends_an_older_one() {
    let mut server = Server::start(TINY).await;
    let (trainer, (silent, store_port)) = (Trainer::new(), silence());
    let nowhere = v1::JoinUpdateGroupRequest { store_port, group: "lost".to_owned(), ..trainer.invitation(PATIENCE) };
    let mut client = server.client.clone();
    let older = tokio::spawn(async move { client.join_update_group(nowhere).await });
    // It has begun when its connection is there.
    silent.set_nonblocking(true).unwrap();
    let held = tokio::net::TcpListener::from_std(silent).unwrap().accept().await.unwrap();
    let started = Instant::now();
    let group = trainer.meet(&mut server, PATIENCE).await;
    check_status(&older.await.unwrap().unwrap_err(), Code::Aborted, "given up");
    assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
    drop((group, held));
}

#[tokio::test(flavor = "multi_thread")]
async fn bfloat16_weights_are_taken_as_the_trainer_holds_them() {
    let mut server = Server::start_with(TINY, Duration::ZERO, |options| options.model.dtype = Dtype::Bfloat16).await;
    let exact = tiny_weights(&tiny_config(TINY), 2);
    let [halves, rounded] = [Kind::BFloat16, Kind::Float].map(|kind| {
        let weights = Weights::zeros(exact.manifest.clone(), 1, kind, Device::Cpu);
        for unit_idx in 0..weights.num_units() {
            let values = exact.flat(unit_idx).to_kind(Kind::BFloat16);
            tch::no_grad(|| weights.flat(unit_idx).shallow_clone().copy_(&values));
        }
        weights
    });
    let trainer = Trainer { dtype: v1::WeightType::Bfloat16, ..Trainer::new() };
    let group = trainer.meet(&mut server, PATIENCE).await;
    let announced = announcement(1, &halves);
    let sending = send(group, halves);
    server.client.update_weights(announced).await.unwrap();
    sending.join().unwrap();
    assert!(serves(&mut server, &rounded).await && !serves(&mut server, &exact).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn joins_and_pushes_that_make_no_sense_are_refused() {
    let mut server = Server::start(TINY).await;
    let weights = tiny_weights(&tiny_config(TINY), 1);
    let status = server.client.update_weights(announcement(1, &weights)).await.unwrap_err();
    check_status(&status, Code::FailedPrecondition, GROUP);

    let trainer = Trainer::new();
    type Damage = fn(&mut v1::JoinUpdateGroupRequest);
    let cases: [(&str, Damage); 11] = [
        ("manifest_hash: ", |join| join.manifest_hash ^= 1),
        ("rank: ", |join| join.rank = 0),
        ("num_trainers: ", |join| join.num_trainers = 2),
        ("size: must be at most 8192, got 4294967295", |join| join.size = u32::MAX),
        ("store_port: ", |join| join.store_port = 70_000),
        ("bucket_numel: ", |join| join.bucket_numel = 0),
        ("timeout_seconds: ", |join| join.timeout_seconds = f64::NAN),
        ("backend: is unset", |join| join.backend = 0),
        ("backend: NCCL", |join| join.set_backend(v1::PushBackend::Nccl)),
        ("dtype: is unset", |join| join.dtype = 99),
        ("dtype: the trainer pushes BFloat16", |join| join.set_dtype(v1::WeightType::Bfloat16)),
    ];
    for (field, damage) in cases {
        let mut join = trainer.invitation(PATIENCE);
        damage(&mut join);
        check_status(&server.client.join_update_group(join).await.unwrap_err(), Code::InvalidArgument, field);
    }
}
