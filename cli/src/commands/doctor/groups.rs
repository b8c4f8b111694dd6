//! Process groups, tried out: two ranks of Gloo in this process, and one of NCCL where there is a GPU.

use std::thread;
use std::time::{Duration, Instant};

use aha_nn::comm::{Address, Backend, CommError, GroupSpec, ProcessGroup, ReduceOp, Store};
use tch::{Device, Tensor};

use super::finding::Finding;

/// For the ranks to come together, and for the reduction.
const TIMEOUT: Duration = Duration::from_secs(15);
const NUMEL: i64 = 1 << 16;

/// Two ranks that reach each other at `address`, as ranks of a run on this machine would.
pub(super) fn gloo(address: &str) -> Finding {
    let started = Instant::now();
    let reduced = Store::host("127.0.0.1", 0, TIMEOUT).and_then(|store| {
        let rank = |rank| all_reduce(&store, Backend::Gloo, &spec("gloo", rank, 2, address));
        thread::scope(|scope| {
            let other = scope.spawn(|| rank(1));
            let sums = [rank(0)?, other.join().unwrap_or(Ok(f64::NAN))?];
            Ok(sums)
        })
    });
    let fix = "see that this address is one of this machine, that a firewall lets it reach itself, and that MASTER_ADDR \
               names rank 0's machine";
    match reduced {
        // Ranks 0 and 1 bring 1 and 2.
        Ok([3.0, 3.0]) => {
            let seconds = started.elapsed().as_secs_f64();
            Finding::ok("gloo", format!("two ranks at {address} reduced a tensor, in {seconds:.2} s with meeting"))
        }
        Ok(sums) => Finding::problem("gloo", format!("two ranks at {address} reduced 1 + 2 to {sums:?}"), fix),
        Err(error) => Finding::problem("gloo", format!("two ranks at {address}: {error}"), fix),
    }
}

/// A group of one on GPU `device`.
pub(super) fn nccl(device: usize) -> Finding {
    let reduced = Store::host("127.0.0.1", 0, TIMEOUT)
        .and_then(|store| all_reduce(&store, Backend::Nccl { device }, &spec("nccl", 0, 1, "127.0.0.1")));
    let fix = "NCCL_DEBUG=INFO says more; see that the driver fits libtorch's CUDA version";
    match reduced {
        Ok(1.0) => Finding::ok("nccl group", format!("GPU {device} made a group of one and reduced a tensor")),
        Ok(sum) => Finding::problem("nccl group", format!("GPU {device} reduced 1 to {sum}"), fix),
        Err(error) => Finding::problem("nccl group", format!("GPU {device}: {error}"), fix),
    }
}

fn spec(name: &str, rank: usize, size: usize, address: &str) -> GroupSpec {
    let address = Address::Host(address.to_owned());
    GroupSpec { name: format!("doctor's {name}"), rank, size, timeout: TIMEOUT, address }
}

/// The mean of what the ranks' tensors, full of rank + 1, sum up to.
fn all_reduce(store: &Store, backend: Backend, spec: &GroupSpec) -> Result<f64, CommError> {
    let device = match backend {
        Backend::Gloo => Device::Cpu,
        Backend::Nccl { device } => Device::Cuda(device),
    };
    let group = ProcessGroup::new(backend, store, spec)?;
    let mut tensor = Tensor::full([NUMEL], spec.rank as i64 + 1, (tch::Kind::Float, device));
    group.all_reduce(&mut tensor, ReduceOp::Sum)?;
    // Nobody leaves before everybody is done.
    group.barrier()?;
    Ok(tensor.mean(tch::Kind::Double).double_value(&[]))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Severity;
    use super::*;

    #[test]
    fn ranks_that_reach_each_other_are_well_and_others_are_not() {
        let found = gloo("127.0.0.1");
        assert_eq!(found.severity, Severity::Ok, "{found:?}");
        let started = Instant::now();
        let found = gloo("192.0.2.1");
        assert_eq!(found.severity, Severity::Problem, "{found:?}");
        assert!(found.finding.contains("192.0.2.1") && started.elapsed() < 4 * TIMEOUT, "{found:?}");
    }
}
