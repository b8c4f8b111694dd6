//! Rollouts that have begun: generators have work while the trainers train.

use std::sync::Arc;
use std::time::Duration;

use aha_core::rollout::Completion;

use crate::rollouts::{Filling, GeneratorPool, Late, Ledger, RolloutError, RolloutRequest};

/// A rollout under way.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) ledger: Arc<Ledger>,
    filling: Filling,
}

/// The rollout of a later step.
#[derive(Debug)]
pub(super) struct Ahead {
    pub(super) step: u64,
    /// As it will be asked for.
    pub(super) request: RolloutRequest,
    pub(super) begun: Begun,
}

impl Begun {
    /// Asks `pool` for what is not among `received`.
    pub(super) fn new(
        pool: &GeneratorPool,
        request: RolloutRequest,
        deadline: Duration,
        received: &[Completion],
    ) -> Self {
        let ledger = Arc::new(Ledger::new(request, deadline));
        ledger.restore(received, pool.newest());
        let filling = pool.begin(&ledger);
        Self { ledger, filling }
    }

    /// Waits until all is there that can be had in time.
    pub(super) fn wait(&mut self, pool: &GeneratorPool) -> Result<Vec<Late>, RolloutError> {
        let filling = std::mem::replace(&mut self.filling, Filling::Ended(Ok(Vec::new())));
        pool.wait(filling)
    }

    /// Asks for what is missing once more, when it has ended.
    pub(super) fn begin_again(&mut self, pool: &GeneratorPool) {
        self.filling = pool.begin(&self.ledger);
    }

    /// Goes on if it has ended for want of generators.
    pub(super) fn revive(&mut self, pool: &GeneratorPool) {
        if self.filling.is_finished() {
            self.filling = match self.wait(pool) {
                Err(error) if error.is_want_of_generators() => pool.begin(&self.ledger),
                outcome => Filling::Ended(outcome),
            };
        }
    }
}
