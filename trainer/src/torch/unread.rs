//! Results of a step that are still on their device. Reading one waits for all that is queued before it, and leaves a GPU
//! without work meanwhile; so they are read together, when the step has queued everything.

use tch::{Kind, Tensor};

use super::learner::StepOutput;
use super::objective::{Count, Loss};
use super::targets::{Pieces, Targets};

#[derive(Debug, Default)]
pub(super) struct Unread {
    /// Scalars, in the order in which they are added up.
    scalars: Vec<(What, Tensor)>,
    /// Log-probs of the completion tokens of a micro-batch, `[M]`.
    logprobs: Vec<(Pieces, Tensor)>,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Loss,
    Entropy,
    Count(Count),
}

impl Unread {
    pub(super) fn add_loss(&mut self, loss: &Loss) {
        self.scalars.push((What::Loss, loss.loss.detach()));
        self.scalars.extend(loss.counts.iter().map(|(count, value)| (What::Count(*count), value.shallow_clone())));
    }

    /// Entropies of some tokens, `[M]`.
    pub(super) fn add_entropies(&mut self, entropies: &Tensor) {
        self.scalars.push((What::Entropy, entropies.sum(Kind::Double)));
    }

    pub(super) fn add_logprobs(&mut self, targets: &Targets, logprobs: Tensor) {
        self.logprobs.push((targets.pieces.clone(), logprobs));
    }
}

impl StepOutput {
    /// Waits for the results and adds them up.
    pub(super) fn read(&mut self) {
        let Unread { scalars, logprobs } = std::mem::take(&mut self.unread);
        for (pieces, logprobs) in logprobs {
            pieces.scatter(&logprobs, &mut self.logprobs);
        }
        if scalars.is_empty() {
            return;
        }
        let all: Vec<Tensor> = scalars.iter().map(|(_, value)| value.to_kind(Kind::Double)).collect();
        let values = Vec::<f64>::try_from(Tensor::stack(&all, 0)).expect("a vector of doubles");
        for ((what, _), value) in scalars.into_iter().zip(values) {
            match what {
                What::Loss => self.loss += value,
                What::Entropy => self.entropy_sum += value,
                What::Count(count) => self.sums.count(count, value),
            }
        }
    }
}
