//! What carries the weights: Gloo over host memory anywhere, NCCL between GPUs.

use std::collections::BTreeSet;

use aha_core::config::PushBackend;
use aha_proto::v1;

/// Of an update group whose members are on these GPUs, trainers first; empty where a member is on a CPU.
///
/// # Errors
/// Says why it cannot be NCCL where that is asked for: it refuses two ranks on one GPU, and knows no CPU.
pub(super) fn choose(asked: PushBackend, gpus: &[String]) -> Result<v1::PushBackend, String> {
    let mut seen = BTreeSet::new();
    let obstacle = gpus.iter().enumerate().find_map(|(rank, gpu)| {
        if gpu.is_empty() {
            Some(format!("member {rank} of the update group has no GPU"))
        } else if seen.insert(gpu) {
            None
        } else {
            Some(format!("member {rank} of the update group shares {gpu} with another"))
        }
    });
    match (asked, obstacle) {
        (PushBackend::Gloo, _) | (PushBackend::Auto, Some(_)) => Ok(v1::PushBackend::Gloo),
        (PushBackend::Auto | PushBackend::Nccl, None) => Ok(v1::PushBackend::Nccl),
        (PushBackend::Nccl, Some(obstacle)) => {
            Err(format!("train.push_backend is nccl, and {obstacle}: NCCL needs a GPU for each; use auto or gloo"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(asked: PushBackend, gpus: &[&str], expect: Result<v1::PushBackend, &str>) {
        let gpus: Vec<String> = gpus.iter().map(ToString::to_string).collect();
        match (choose(asked, &gpus), expect) {
            (Ok(chosen), Ok(expect)) => assert_eq!(chosen, expect),
            (Err(error), Err(expect)) => assert!(error.contains(expect), "{error}"),
            (found, expect) => panic!("{found:?}, not {expect:?}"),
        }
    }

    #[test]
    fn nccl_is_for_members_with_a_gpu_each() {
        let (gloo, nccl) = (Ok(v1::PushBackend::Gloo), Ok(v1::PushBackend::Nccl));
        check(PushBackend::Auto, &["GPU-a", "GPU-b", "GPU-c"], nccl);
        check(PushBackend::Nccl, &["GPU-a", "GPU-b"], nccl);
        check(PushBackend::Gloo, &["GPU-a", "GPU-b"], gloo);
        // Trainer and generator on the one GPU of a machine; a generator on a CPU; everybody on a CPU.
        for gpus in [["GPU-a", "GPU-a"], ["GPU-a", ""], ["", ""]] {
            check(PushBackend::Auto, &gpus, gloo);
            check(PushBackend::Gloo, &gpus, gloo);
        }
        check(PushBackend::Nccl, &["GPU-a", "GPU-b", "GPU-a"], Err("member 2 of the update group shares GPU-a"));
        check(PushBackend::Nccl, &["GPU-a", ""], Err("member 1 of the update group has no GPU"));
    }
}
