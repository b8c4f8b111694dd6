//! Where the time of a step goes.

use std::time::{Duration, Instant};

use aha_nn::runtime;
use tch::Device;

/// Where the time of a step went. On a GPU these are the host's times, which runs ahead until
/// the gradients' norm is read, unless the learner is told to wait for the device.
#[derive(Debug, Default, Clone, Copy)]
pub struct StepTimes {
    /// The reference policy's log-probs.
    pub reference: Duration,
    pub forward: Duration,
    /// Head, loss and their gradients.
    pub head: Duration,
    /// Backward pass of the layers and the embedding, with the communication that overlaps it.
    pub backward: Duration,
    /// What was left of the gradients' communication, and their norm.
    pub reduce: Duration,
    pub optimizer: Duration,
}

impl StepTimes {
    pub(super) fn add(&mut self, other: &Self) {
        self.reference += other.reference;
        self.forward += other.forward;
        self.head += other.head;
        self.backward += other.backward;
        self.reduce += other.reduce;
        self.optimizer += other.optimizer;
    }

    /// Name of the metric and value of each.
    pub fn named(&self) -> [(&'static str, Duration); 6] {
        [
            ("time/reference", self.reference),
            ("time/forward", self.forward),
            ("time/head", self.head),
            ("time/backward", self.backward),
            ("time/reduce", self.reduce),
            ("time/optimizer", self.optimizer),
        ]
    }
}

/// Time since the last look.
pub(super) struct Lap {
    last: Instant,
    /// What is waited for before each look.
    device: Option<Device>,
}

impl Lap {
    pub(super) fn start(device: Option<Device>) -> Self {
        device.into_iter().for_each(runtime::synchronize);
        Self { last: Instant::now(), device }
    }

    pub(super) fn take(&mut self) -> Duration {
        self.device.into_iter().for_each(runtime::synchronize);
        let elapsed = self.last.elapsed();
        self.last += elapsed;
        elapsed
    }
}
