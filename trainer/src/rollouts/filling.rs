//! A ledger that is being filled while others do other things.

use tokio::runtime::Runtime;
use tokio_util::task::AbortOnDropHandle;

use super::{Late, RolloutError};

type Outcome = Result<Vec<Late>, RolloutError>;

/// Nobody fills the ledger any more when this is dropped.
#[derive(Debug)]
pub enum Filling {
    Running(AbortOnDropHandle<Outcome>),
    Ended(Outcome),
}

impl Filling {
    #[must_use]
    pub fn is_finished(&self) -> bool {
        match self {
            Self::Running(task) => task.is_finished(),
            Self::Ended(_) => true,
        }
    }

    /// Waits for it.
    pub(super) fn outcome(self, runtime: &Runtime) -> Outcome {
        match self {
            Self::Running(task) => runtime.block_on(task).unwrap_or_else(|error| panic!("a rollout ended: {error}")),
            Self::Ended(outcome) => outcome,
        }
    }
}
