//! Where the time of a step goes.

use std::time::{Duration, Instant};

/// Where the time of a step went. On a GPU these are the host's times: it runs ahead until a result is read.
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
pub(super) struct Lap(Instant);

impl Lap {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn take(&mut self) -> Duration {
        let elapsed = self.0.elapsed();
        self.0 += elapsed;
        elapsed
    }
}
