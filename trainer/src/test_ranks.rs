//! For tests: ranks as threads, over real Gloo groups.

use std::thread;
use std::time::Duration;

use aha_nn::comm::{Address, Backend, GroupSpec, ProcessGroup, Store};
use aha_nn::unit::ModelWeights;
use tch::{Device, Tensor};

const TIMEOUT: Duration = Duration::from_secs(30);

/// All parameters of a model one after the other, on the CPU. Where ranks share them, all of them call this.
pub(crate) fn flatten(weights: &dyn ModelWeights) -> Tensor {
    let unit = |unit_idx: usize| {
        let unit = weights.unit(unit_idx).unwrap();
        let params: Vec<Tensor> = unit.params().iter().map(|param| param.reshape([-1])).collect();
        Tensor::cat(&params, 0).to_device(Device::Cpu)
    };
    let units: Vec<Tensor> = (0..weights.manifest().units.len()).map(unit).collect();
    Tensor::cat(&units, 0)
}

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
