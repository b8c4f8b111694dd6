//! For tests: ranks as threads, over real Gloo groups.

use std::thread;
use std::time::Duration;

use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};

const TIMEOUT: Duration = Duration::from_secs(30);

/// What `rank` makes of its group, for every rank of a world of `size`.
pub(crate) fn run_ranks<T: Send>(size: usize, rank: impl Fn(ProcessGroup) -> T + Sync) -> Vec<T> {
    let store = Store::host("127.0.0.1", 0, TIMEOUT).unwrap();
    let join = |rank_idx| {
        let address = Address::Host("127.0.0.1".to_owned());
        let spec = GroupSpec { name: "test".to_owned(), rank: rank_idx, size, timeout: TIMEOUT, address };
        ProcessGroup::new(Backend::Gloo, &store, &spec).unwrap()
    };
    let (rank, join) = (&rank, &join);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..size).map(|rank_idx| scope.spawn(move || rank(join(rank_idx)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
