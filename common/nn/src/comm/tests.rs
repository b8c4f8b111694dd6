//! Ranks as threads, each with its own connection and group; faults by ranks that stay away, leave, die or stop.

use super::names::tests::answering;
use super::*;
use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

const PATIENT: Duration = Duration::from_secs(60);
/// Long enough to meet on a loaded machine, short enough to wait for.
const HASTY: Duration = Duration::from_secs(8);
/// How much later than its deadline an error may come on a loaded machine.
const SLACK: Duration = Duration::from_secs(12);
const LOCALHOST: &str = "127.0.0.1";

fn spec(name: &str, rank: usize, size: usize, timeout: Duration) -> GroupSpec {
    GroupSpec { name: name.to_owned(), rank, size, timeout, address: Address::Host(LOCALHOST.to_owned()) }
}

fn join(store: &Store, spec: &GroupSpec) -> ProcessGroup {
    ProcessGroup::new(Backend::Gloo, store, spec).unwrap()
}

/// Runs `body` on `size` threads, each a rank, and returns their results in the order of ranks.
fn on_ranks<T: Send>(size: usize, timeout: Duration, body: impl Fn(ProcessGroup) -> T + Sync) -> Vec<T> {
    let host = Store::host(LOCALHOST, 0, PATIENT).unwrap();
    let rank = |rank: usize| {
        let store = Store::connect(LOCALHOST, host.port(), PATIENT).unwrap();
        body(join(&store, &spec("trainers", rank, size, timeout)))
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..size).map(|index| scope.spawn(move || rank(index))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn floats(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
}

/// `[rank, rank + 1, ...]`
fn ramp(len: usize, rank: usize, kind: Kind) -> Tensor {
    (Tensor::arange(len as i64, (Kind::Int64, Device::Cpu)) + rank as i64).to_kind(kind)
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Int64];

#[test]
fn all_reduce_reduces() {
    for size in 1..=3 {
        on_ranks(size, PATIENT, |group| {
            for kind in KINDS {
                let reduced = |op| {
                    let mut tensor = ramp(5, group.rank(), kind);
                    group.all_reduce(&mut tensor, op).unwrap();
                    assert_eq!(tensor.kind(), kind);
                    floats(&tensor)
                };
                let (ranks, last) = (size as f64, (size - 1) as f64);
                let rank_sum = ranks * last / 2.0;
                assert_eq!(reduced(ReduceOp::Sum), [0.0, 1.0, 2.0, 3.0, 4.0].map(|x| x * ranks + rank_sum));
                assert_eq!(reduced(ReduceOp::Max), [0.0, 1.0, 2.0, 3.0, 4.0].map(|x| x + last));
                assert_eq!(reduced(ReduceOp::Min), [0.0, 1.0, 2.0, 3.0, 4.0]);
            }
        });
    }
}

#[test]
fn reduce_scatter_leaves_each_rank_its_shard() {
    for size in 1..=3 {
        on_ranks(size, PATIENT, |group| {
            for kind in KINDS {
                let input = ramp(size * 2, group.rank(), kind);
                let mut output = Tensor::zeros([2], (kind, Device::Cpu));
                group.reduce_scatter(&input, &mut output, ReduceOp::Sum).unwrap();
                let element = |index: usize| (size * index + size * (size - 1) / 2) as f64;
                let first = group.rank() * 2;
                assert_eq!(floats(&output), [element(first), element(first + 1)]);
                assert_eq!(input, ramp(size * 2, group.rank(), kind), "the input must stay as it was");
            }
        });
    }
}

#[test]
fn all_gather_follows_the_order_of_ranks() {
    for size in 1..=3 {
        on_ranks(size, PATIENT, |group| {
            for kind in KINDS {
                let mut output = Tensor::zeros([size as i64 * 2], (kind, Device::Cpu));
                group.all_gather(&ramp(2, group.rank() * 2, kind), &mut output).unwrap();
                assert_eq!(output, ramp(size * 2, 0, kind));
            }
        });
    }
}

#[test]
fn all_gather_works_within_its_own_output() {
    on_ranks(2, PATIENT, |group| {
        let mut output = Tensor::zeros([6], (Kind::Float, Device::Cpu));
        let mut shard = output.narrow(0, group.rank() as i64 * 3, 3);
        shard.copy_(&ramp(3, group.rank() * 3, Kind::Float));
        group.all_gather(&shard, &mut output).unwrap();
        assert_eq!(output, ramp(6, 0, Kind::Float));
    });
}

#[test]
fn broadcast_takes_any_root() {
    for size in 1..=3 {
        on_ranks(size, PATIENT, |group| {
            for (root, kind) in (0..size).flat_map(|root| KINDS.map(|kind| (root, kind))) {
                let mut tensor = ramp(4, group.rank(), kind);
                group.broadcast(&mut tensor, root).unwrap();
                assert_eq!(tensor, ramp(4, root, kind));
            }
        });
    }
}

#[test]
fn byte_strings_keep_their_length() {
    for size in 1..=3 {
        on_ranks(size, PATIENT, |group| {
            let payload = |rank: usize, scale: usize| vec![rank as u8 + 1; rank * scale];
            for scale in [0, 1, 1000] {
                let gathered = group.all_gather_bytes(&payload(group.rank(), scale)).unwrap();
                assert_eq!(gathered, (0..size).map(|rank| payload(rank, scale)).collect::<Vec<_>>());
                for root in 0..size {
                    assert_eq!(
                        group.broadcast_bytes(&payload(group.rank(), scale), root).unwrap(),
                        payload(root, scale)
                    );
                }
            }
        });
    }
}

#[test]
fn barrier_holds_until_the_last_rank() {
    on_ranks(3, PATIENT, |group| {
        let started = Instant::now();
        if group.rank() == 2 {
            thread::park_timeout(Duration::from_millis(300));
        }
        group.barrier().unwrap();
        assert!(group.rank() == 2 || started.elapsed() >= Duration::from_millis(200));
    });
}

#[test]
fn works_in_flight_finish_in_any_order() {
    on_ranks(3, PATIENT, |group| {
        let mut tensors: Vec<_> = (0..8).map(|len| ramp(1000 * (len + 1), group.rank(), Kind::Float)).collect();
        let works: Vec<_> =
            tensors.iter_mut().map(|tensor| group.all_reduce_async(tensor, ReduceOp::Sum).unwrap()).collect();
        for work in works.into_iter().rev() {
            work.wait().unwrap();
        }
        for (index, tensor) in tensors.iter().enumerate() {
            assert_eq!(tensor, &(ramp(1000 * (index + 1), 0, Kind::Float) * 3.0 + 3.0));
        }
    });
}

#[test]
fn groups_of_one_store_do_not_mix() {
    let host = Store::host(LOCALHOST, 0, PATIENT).unwrap();
    thread::scope(|scope| {
        for rank in 0..2 {
            let host = &host;
            scope.spawn(move || {
                let store = Store::connect(LOCALHOST, host.port(), PATIENT).unwrap();
                let groups = ["trainers", "push"].map(|name| join(&store, &spec(name, rank, 2, PATIENT)));
                let mut tensors = [1.0, 10.0].map(|value| Tensor::full([1], value, (Kind::Float, Device::Cpu)));
                let [first, second] = &mut tensors;
                let works = [
                    groups[0].all_reduce_async(first, ReduceOp::Sum).unwrap(),
                    groups[1].all_reduce_async(second, ReduceOp::Sum).unwrap(),
                ];
                works.into_iter().for_each(|work| work.wait().unwrap());
                assert_eq!(tensors.map(|tensor| floats(&tensor)[0]), [2.0, 20.0]);
            });
        }
    });
}

#[test]
fn leaving_after_the_last_collective_harms_nobody() {
    for _ in 0..20 {
        on_ranks(3, PATIENT, |group| {
            let mut tensor = ramp(100_000, group.rank(), Kind::Float);
            group.all_reduce(&mut tensor, ReduceOp::Sum).unwrap();
            drop(group);
            assert_eq!(tensor, ramp(100_000, 0, Kind::Float) * 3.0 + 3.0);
        });
    }
}

#[track_caller]
fn check_refusal(result: Result<(), CommError>, expect: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, CommError::Invalid { .. }), "{error:?}");
    assert_eq!(error.to_string(), format!("group g: {expect}"));
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let group = ProcessGroup::solo("g", Device::Cpu);
    let zeros = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Device::Cpu));
    let mut undefined = Tensor::new();
    let sum = ReduceOp::Sum;
    check_refusal(group.all_reduce(&mut undefined, sum), "all_reduce on rank 0 of 1 refused: tensor is undefined");
    check_refusal(
        group.broadcast(&mut zeros(&[2], Kind::Bool), 0),
        "broadcast on rank 0 of 1 refused: tensor is of kind Bool, which no backend can send",
    );
    check_refusal(
        group.broadcast(&mut zeros(&[2], Kind::Float), 1),
        "broadcast on rank 0 of 1 refused: root 1 is not a rank",
    );
    check_refusal(
        group.all_reduce(&mut zeros(&[2, 3], Kind::Float).transpose(0, 1), sum),
        "all_reduce on rank 0 of 1 refused: tensor of shape [3, 2] is not contiguous",
    );
    check_refusal(
        group.reduce_scatter(&zeros(&[4], Kind::Float), &mut zeros(&[3], Kind::Float), sum),
        "reduce_scatter on rank 0 of 1 refused: input has 4 elements, not 1 times the 3 of output",
    );
    check_refusal(
        group.all_gather(&zeros(&[4], Kind::Float), &mut zeros(&[4], Kind::Int64)),
        "all_gather on rank 0 of 1 refused: output is Int64 and input is Float",
    );
    let cuda = ProcessGroup::solo("g", Device::Cuda(0));
    check_refusal(
        cuda.all_reduce(&mut zeros(&[1], Kind::Float), sum),
        "all_reduce on rank 0 of 1 refused: tensor is on Cpu, and the group works on Cuda(0)",
    );
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let host = Store::host(LOCALHOST, 0, PATIENT).unwrap();
    let started = Instant::now();
    let error = ProcessGroup::new(Backend::Gloo, &host, &spec("trainers", 1, 3, Duration::from_secs(1))).unwrap_err();
    assert_eq!(error.to_string(), "group trainers: rank 1 of 3 could not join: rank [0, 2] did not come within 1.0 s");
    assert!(started.elapsed() < Duration::from_secs(1) + SLACK);
}

#[test]
fn a_crowd_that_never_comes_is_not_looked_for_one_by_one() {
    let limit = Duration::from_millis(300);
    let host = Store::host(LOCALHOST, 0, PATIENT).unwrap();
    let started = Instant::now();
    let spec = spec("crowd", 1, 1 << 20, PATIENT);
    let message = ProcessGroup::meet(Backend::Gloo, &host, &spec, limit).unwrap_err().to_string();
    assert!(
        message.contains("rank [0, 2, ") && message.contains("within 0.3 s; others were not looked for"),
        "{message}"
    );
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[test]
fn a_rank_or_a_name_is_taken_once() {
    let host = Store::host(LOCALHOST, 0, PATIENT).unwrap();
    let brief = Duration::from_millis(200);
    let join = || ProcessGroup::new(Backend::Gloo, &host, &spec("trainers", 0, 2, brief)).unwrap_err().to_string();
    assert!(join().contains("rank [1] did not come"));
    assert!(join().contains("this rank is already taken"));
    let error = ProcessGroup::new(Backend::Gloo, &host, &spec("g", 2, 2, brief)).unwrap_err().to_string();
    assert_eq!(error, "group g: rank 2 of 2 could not join: ranks of g go from 0 to 1");
}

#[test]
fn a_store_that_is_not_there_is_named() {
    let port = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let started = Instant::now();
    let error = Store::connect(LOCALHOST, port, Duration::from_secs(1)).unwrap_err().to_string();
    assert!(error.starts_with(&format!("store 127.0.0.1:{port}: connect failed: ")), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1) + SLACK);
}

#[test]
fn ranks_meet_at_a_name_that_becomes_known() {
    let late = || answering(&[None, None, Some(LOCALHOST)]).0;
    let host = Store::host_by(&late(), LOCALHOST, 0, PATIENT).unwrap();
    let peer = Store::connect_by(&late(), LOCALHOST, host.port(), PATIENT).unwrap();
    peer.set("met", b"here").unwrap();
    assert_eq!(host.get("met").unwrap(), b"here");
    let never = || answering(&[None]).0;
    let brief = Duration::from_millis(700);
    let listened = Store::host_by(&never(), "rank-0", 7, brief).unwrap_err().to_string();
    assert!(
        listened.starts_with("store rank-0:7: listen failed: rank-0 is not known (no such name) after "),
        "{listened}"
    );
    let connected = Store::connect_by(&never(), "rank-0", 7, brief).unwrap_err().to_string();
    assert!(connected.starts_with("store rank-0:7: connect failed: rank-0 is not known"), "{connected}");
}

#[test]
fn a_store_that_never_answers_is_given_up() {
    let silent = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap();
    let started = Instant::now();
    let port = silent.local_addr().unwrap().port();
    assert!(Store::connect(LOCALHOST, port, Duration::from_secs(1)).is_err());
    assert!(started.elapsed() < Duration::from_secs(1) + SLACK);
}

#[test]
fn a_store_that_never_answers_takes_few_threads() {
    const FEW: usize = 8;
    let silent = std::net::TcpListener::bind((LOCALHOST, 0)).unwrap();
    let port = silent.local_addr().unwrap().port();
    let connect = || Store::connect(LOCALHOST, port, Duration::from_millis(50)).unwrap_err().to_string();
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..FEW).map(|_| scope.spawn(connect)).collect();
        for message in waiting.into_iter().map(|waiting| waiting.join().unwrap()) {
            assert!(message.contains("connect failed: no answer within "), "{message}");
        }
    });
    let refused = connect();
    assert!(refused.contains("connect failed: 8 calls to it and "), "{refused}");
    // Its connections are closed with it, and whoever waited for it goes.
    drop(silent);
    let started = Instant::now();
    while connect().contains("calls to it") {
        assert!(started.elapsed() < SLACK, "nobody goes");
        thread::park_timeout(Duration::from_millis(10));
    }
}

#[test]
fn store_keeps_values() {
    let host = Store::host(LOCALHOST, 0, PATIENT).unwrap();
    let peer = Store::connect(LOCALHOST, host.port(), PATIENT).unwrap();
    host.set("empty", b"").unwrap();
    host.set("bytes", b"a\0b").unwrap();
    assert_eq!(peer.get("empty").unwrap(), b"");
    assert_eq!(peer.get("bytes").unwrap(), b"a\0b");
    assert_eq!((host.add("n", 2).unwrap(), peer.add("n", 3).unwrap()), (2, 5));
    let error = peer.get_within("missing", Duration::from_millis(100)).unwrap_err().to_string();
    assert!(error.contains("get missing failed"), "{error}");
    let error = Store::host(LOCALHOST, host.port(), PATIENT).unwrap_err().to_string();
    assert!(error.contains("listen failed: 127.0.0.1 cannot be listened on (Address already in use"), "{error}");
}

/// Checks that `result` failed within [`HASTY`] or so, whatever the group's timeout, closed the group, and reads as it should.
#[track_caller]
fn check_failure(group: &ProcessGroup, result: Result<(), CommError>, started: Instant) -> String {
    let elapsed = started.elapsed();
    assert!(elapsed < HASTY + SLACK, "the error came after {elapsed:?}");
    let error = result.unwrap_err();
    assert!(matches!(error, CommError::Collective { .. }), "{error:?}");
    let next = group.barrier().unwrap_err();
    assert!(matches!(next, CommError::Closed { .. }), "{next:?}");
    error.to_string()
}

#[test]
fn a_rank_that_stays_silent_is_not_waited_for() {
    on_ranks(2, HASTY, |group| {
        group.barrier().unwrap();
        if group.rank() == 1 {
            let started = Instant::now();
            let result = group.all_reduce(&mut ramp(3, 0, Kind::Float), ReduceOp::Sum);
            let error = check_failure(&group, result, started);
            assert!(error.starts_with("group trainers: all_reduce #2 on rank 1 of 2 failed after "), "{error}");
        }
        group // Returned, so that rank 0 stays until rank 1 is done.
    });
}

#[test]
fn a_rank_that_leaves_is_noticed_at_once() {
    on_ranks(3, PATIENT, |group| {
        group.barrier().unwrap();
        if group.rank() > 0 {
            let started = Instant::now();
            let result = group.all_reduce(&mut ramp(3, 0, Kind::Float), ReduceOp::Sum);
            check_failure(&group, result, started);
        }
    });
}

#[test]
fn abort_frees_a_rank_that_waits() {
    on_ranks(2, PATIENT, |group| {
        group.barrier().unwrap();
        if group.rank() == 1 {
            let started = Instant::now();
            let mut tensor = ramp(3, 0, Kind::Float);
            let work = group.all_reduce_async(&mut tensor, ReduceOp::Sum).unwrap();
            let result = thread::scope(|scope| {
                let waiter = scope.spawn(|| work.wait());
                thread::park_timeout(Duration::from_millis(200));
                group.abort("membership changed");
                waiter.join().unwrap()
            });
            let error = check_failure(&group, result, started);
            assert!(error.contains("membership changed"), "{error}");
        }
        group // Returned, so that rank 0 stays until rank 1 is done.
    });
}

/// Not a test by itself: a rank in a process of its own, started by [`spawn_rank`].
#[test]
#[ignore = "run by the tests of dying and stopped ranks"]
fn child_rank() {
    let Ok(port) = env::var("AHA_TEST_STORE_PORT") else { return };
    let store = Store::connect(LOCALHOST, port.parse().unwrap(), PATIENT).unwrap();
    store.set("started", b"").unwrap();
    let group = join(&store, &spec("trainers", 1, 2, PATIENT));
    group.barrier().unwrap();
    println!("\njoined");
    thread::park_timeout(PATIENT);
}

fn spawn_rank(host: &Store) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "comm::tests::child_rank", "--ignored", "--nocapture"])
        .env("AHA_TEST_STORE_PORT", host.port().to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What rank 0 gets from a collective after `harm` was done to rank 1, a process, in the middle of the group's life.
fn error_after(timeout: Duration, harm: impl FnOnce(&mut Child)) -> String {
    let host = Store::host(LOCALHOST, 0, PATIENT).unwrap();
    let mut child = spawn_rank(&host);
    host.get("started").unwrap();
    let group = join(&host, &spec("trainers", 0, 2, timeout));
    group.barrier().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "joined"));
    harm(&mut child);
    let started = Instant::now();
    let result = group.all_reduce(&mut ramp(3, 0, Kind::Float), ReduceOp::Sum);
    let error = check_failure(&group, result, started);
    child.kill().unwrap();
    child.wait().unwrap();
    error
}

#[test]
fn a_killed_process_is_noticed() {
    let error = error_after(PATIENT, |child| {
        child.kill().unwrap();
        child.wait().unwrap();
    });
    assert!(error.starts_with("group trainers: all_reduce #2 on rank 0 of 2 failed after "), "{error}");
}

#[test]
fn a_stopped_process_is_not_waited_for() {
    let error = error_after(HASTY, |child| {
        assert!(Command::new("kill").args(["-STOP", &child.id().to_string()]).status().unwrap().success());
    });
    assert!(error.ends_with("rank [1] is stopped, gone or elsewhere"), "{error}");
    assert!(error.starts_with("group trainers: all_reduce #2 on rank 0 of 2 failed after "), "{error}");
}

#[test]
fn the_rank_that_hangs_is_told_from_those_that_wait_for_it() {
    on_ranks(3, HASTY, |group| {
        group.barrier().unwrap();
        let mut tensor = ramp(3, 0, Kind::Float);
        if group.rank() != 1 {
            let started = Instant::now();
            let error = check_failure(&group, group.all_reduce(&mut tensor, ReduceOp::Sum), started);
            let expect =
                format!("rank {} failed at all_reduce #2, rank [1] is stopped, gone or elsewhere", 2 - group.rank());
            assert!(error.ends_with(&expect), "{error}");
        }
        group // Returned, so that rank 1 stays until the others are done.
    });
}

#[test]
fn nccl_needs_its_build() {
    let host = Store::host(LOCALHOST, 0, PATIENT).unwrap();
    let result = ProcessGroup::new(Backend::Nccl { device: 0 }, &host, &spec("g", 0, 1, HASTY));
    if nccl_built() {
        assert_eq!(result.unwrap().device(), Device::Cuda(0));
    } else {
        let error = result.unwrap_err().to_string();
        assert_eq!(error, "group g: this build has no NCCL; build against a CUDA libtorch, or use gloo");
    }
}

/// What each of two ranks that do different things says.
fn disagreement(is_checked: bool, act: impl Fn(&ProcessGroup) -> Result<(), CommError> + Sync) -> Vec<String> {
    let started = Instant::now();
    let said = on_ranks(2, PATIENT, |group| {
        let group = group.checked(is_checked);
        let mut tensor = ramp(4, 0, Kind::Float);
        // Both come this far.
        group.all_reduce(&mut tensor, ReduceOp::Sum).unwrap();
        let error = act(&group).unwrap_err();
        assert!(matches!(error, CommError::Mismatch { .. }), "{error}");
        let after = group.barrier().unwrap_err().to_string();
        assert!(after.contains("the group is closed"), "{after}");
        error.to_string()
    });
    assert!(started.elapsed() < PATIENT, "they waited for their deadline");
    said
}

#[track_caller]
fn check_names_both(said: &[String], acts: [&str; 2]) {
    for (rank, text) in said.iter().enumerate() {
        let own = format!("rank {rank} of 2 is out of step: it comes to {} at ", acts[rank]);
        let other = format!("and rank {} to {} at ", 1 - rank, acts[1 - rank]);
        assert!(text.contains(&own) && text.contains(&other) && text.contains("comm/tests.rs:"), "{text}");
    }
}

#[test]
fn ranks_that_call_different_collectives_are_told_both() {
    let said = disagreement(true, |group| match group.rank() {
        0 => group.all_reduce(&mut ramp(4, 0, Kind::Float), ReduceOp::Max),
        _ => group.broadcast(&mut ramp(4, 0, Kind::Float), 1),
    });
    check_names_both(&said, ["all_reduce (Max) of 4 Float", "broadcast (from 1) of 4 Float"]);
    // The same line, with other sizes, kinds, or roots.
    let said = disagreement(true, |group| group.broadcast(&mut ramp(4 + group.rank(), 0, Kind::Float), 0));
    check_names_both(&said, ["broadcast (from 0) of 4 Float", "broadcast (from 0) of 5 Float"]);
    let said = disagreement(true, |group| group.broadcast(&mut ramp(4, 0, KINDS[group.rank()]), 0));
    check_names_both(&said, ["broadcast (from 0) of 4 Float", "broadcast (from 0) of 4 BFloat16"]);
}

#[test]
fn the_same_collective_for_different_ends_is_noticed() {
    let said = disagreement(true, |group| match group.rank() {
        0 => group.barrier(),
        _ => group.barrier(),
    });
    check_names_both(&said, ["barrier", "barrier"]);
    assert_ne!(said[0].split(" at ").nth(1), said[1].split(" at ").nth(1), "{said:?}");
    // Byte strings say where they come from in every group.
    let said = disagreement(false, |group| match group.rank() {
        0 => group.all_gather_bytes(b"what I wrote").map(drop),
        _ => group.all_gather_bytes(b"what I read").map(drop),
    });
    check_names_both(&said, ["all_gather_bytes", "all_gather_bytes"]);
}

#[test]
fn checked_collectives_give_what_others_do() {
    on_ranks(3, PATIENT, |group| {
        let group = group.checked(true);
        let mut tensor = ramp(5, group.rank(), Kind::Float);
        let work = group.all_reduce_async(&mut tensor, ReduceOp::Sum).unwrap();
        let mut shard = Tensor::zeros([0], (Kind::Float, Device::Cpu));
        group.reduce_scatter(&ramp(0, 0, Kind::Float), &mut shard, ReduceOp::Sum).unwrap();
        work.wait().unwrap();
        assert_eq!(floats(&tensor), [3.0, 6.0, 9.0, 12.0, 15.0]);
        let bytes = group.all_gather_bytes(&vec![7; group.rank()]).unwrap();
        assert_eq!(bytes, [vec![], vec![7], vec![7, 7]]);
    });
}
