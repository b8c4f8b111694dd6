//! A rank's way to those who sample for it, wherever they are.

use std::fmt::Debug;
use std::time::Duration;

use aha_core::ids::PolicyVersion;
use aha_core::rollout::{Completion, Group};
use aha_nn::comm::ProcessGroup;
use aha_nn::unit::ModelWeights;

use crate::agreement::agree;
use crate::publish::{PublishError, PushReport};
use crate::rewarders::Rewarders;
use crate::rollouts::{Late, Received, RolloutError, RolloutRequest, Rollouts};

/// Generators of a run, or engines in the trainers' own processes. All ranks call the methods together.
pub trait Generators: Debug {
    /// Lets `policy` sample from now on, as `version`.
    ///
    /// # Errors
    /// On all ranks alike, if nobody can serve it.
    fn publish(
        &mut self,
        trainers: &ProcessGroup,
        policy: &dyn ModelWeights,
        version: PolicyVersion,
    ) -> Result<PushReport, PublishError>;

    /// Gives back what the configuration says, until the next version is published.
    ///
    /// # Errors
    /// If the ranks cannot reach each other, or an engine of this process is gone.
    fn sleep(&mut self) -> Result<(), PublishError>;

    /// Those that take part.
    fn num_generators(&self) -> usize;

    /// Begins the rollout of a step, to be waited for later. `received` has what came of it before the run was
    /// interrupted.
    fn begin(&mut self, step: u64, request: &RolloutRequest, received: &[Completion]);

    /// Steps whose rollouts have begun and were not waited for.
    fn num_ahead(&self) -> usize;

    /// What has been received of steps whose rollouts have begun.
    fn received(&self) -> Vec<Received>;

    /// Who judges the completions of this rank where generators do not.
    fn rewarders(&self) -> &Rewarders;

    /// Time for which there was nothing to do for this rank, since it was last asked for.
    fn take_idle(&mut self) -> Duration;

    /// As [`Rollouts::roll_out`], while `policy` trains, which was published last, as `version`.
    ///
    /// # Errors
    /// As there, on all ranks alike.
    fn roll_out(
        &mut self,
        trainers: &ProcessGroup,
        policy: (&dyn ModelWeights, PolicyVersion),
        request: &RolloutRequest,
    ) -> Result<Vec<Option<Group>>, RolloutError>;
}

/// [`Rollouts`] while a policy trains.
#[derive(Debug)]
pub struct PolicyRollouts<'a> {
    pub generators: &'a mut dyn Generators,
    pub trainers: &'a ProcessGroup,
    /// Published last, as this version.
    pub policy: (&'a dyn ModelWeights, PolicyVersion),
}

impl Rollouts for PolicyRollouts<'_> {
    fn roll_out(&mut self, request: &RolloutRequest) -> Result<Vec<Option<Group>>, RolloutError> {
        self.generators.roll_out(self.trainers, self.policy, request)
    }
}

/// Whether all ranks have what could be had in time; else some of them want generators.
pub(crate) fn is_filled_everywhere(
    trainers: &ProcessGroup,
    filled: Result<Vec<Late>, RolloutError>,
) -> Result<bool, RolloutError> {
    let outcome = match filled {
        Ok(late) => {
            late.iter().for_each(|late| tracing::warn!("{late}; its group is given up"));
            Ok(vec![u8::from(true)])
        }
        Err(error) if error.is_want_of_generators() => {
            tracing::warn!("{error}; looking for generators");
            Ok(vec![u8::from(false)])
        }
        Err(error) => Err(error),
    };
    let answers = agree(trainers, outcome)?;
    Ok(answers.iter().all(|answer| *answer == [u8::from(true)]))
}
