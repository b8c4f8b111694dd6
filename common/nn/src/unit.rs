//! The weights of a model a unit at a time: what a pass over the model needs, wherever they lie between uses.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::rc::Rc;
use std::sync::Arc;

use aha_core::manifest::Manifest;
use tch::{Device, Kind, Tensor};

use crate::comm::CommError;
use crate::model_config::ModelConfig;

/// The weights of a whole model.
///
/// Where ranks share them, each call may be a collective: all ranks then make the same calls in the same order, whatever
/// their own data.
pub trait ModelWeights: Debug {
    fn manifest(&self) -> &Manifest;

    /// Type of the tensors that the other functions return.
    fn kind(&self) -> Kind;

    /// Where they are.
    fn device(&self) -> Device;

    /// A unit, whole for as long as the result lives.
    ///
    /// # Errors
    /// If ranks share the weights and cannot reach each other.
    fn unit(&self, unit_idx: usize) -> Result<Unit, CommError>;

    /// Begins to fetch what [`ModelWeights::unit`] is asked for next, and returns at once.
    ///
    /// # Errors
    /// As [`ModelWeights::unit`].
    fn prefetch(&self, _unit_idx: usize) -> Result<(), CommError> {
        Ok(())
    }

    /// The weights where they are, to be read while the loan lives; none where they are not whole there. What has been
    /// queued on the device may still write them.
    ///
    /// # Errors
    /// As [`ModelWeights::unit`].
    fn lend(&self) -> Result<Option<Loan>, CommError> {
        Ok(None)
    }
}

/// The memory of a whole model, which nobody writes for as long as this lives.
#[derive(Debug)]
pub struct Loan {
    /// One a unit, `[at least numel]`, in the order of the manifest.
    pub(crate) flats: Vec<Tensor>,
    _held: Arc<()>,
}

/// Knows whether anybody reads what is its owner's to write.
#[derive(Debug, Default)]
pub(crate) struct Lender(Arc<()>);

impl Lender {
    pub(crate) fn lend(&self, flats: Vec<Tensor>) -> Loan {
        Loan { flats, _held: Arc::clone(&self.0) }
    }

    /// Whether there is a loan.
    pub(crate) fn is_lent(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl<T: ModelWeights + ?Sized> ModelWeights for &T {
    fn manifest(&self) -> &Manifest {
        (**self).manifest()
    }

    fn kind(&self) -> Kind {
        (**self).kind()
    }

    fn device(&self) -> Device {
        (**self).device()
    }

    fn unit(&self, unit_idx: usize) -> Result<Unit, CommError> {
        (**self).unit(unit_idx)
    }

    fn prefetch(&self, unit_idx: usize) -> Result<(), CommError> {
        (**self).prefetch(unit_idx)
    }

    fn lend(&self) -> Result<Option<Loan>, CommError> {
        (**self).lend()
    }
}

/// The parameters of one unit.
#[derive(Debug)]
pub struct Unit {
    flat: Tensor,
    params: Vec<Tensor>,
    /// Gives their memory back when it is dropped.
    _lease: Option<Rc<dyn Debug>>,
}

impl Unit {
    /// `flat` is `[at least numel]`, and `params` are views of it in manifest order.
    pub(crate) fn new(flat: Tensor, params: Vec<Tensor>, lease: Option<Rc<dyn Debug>>) -> Self {
        Self { flat, params, _lease: lease }
    }

    /// The parameters one after the other; padding may follow. `[at least numel]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The parameters in manifest order. They have memory for as long as a [`Unit`] of the same index lives.
    #[must_use]
    pub fn params(&self) -> Vec<Tensor> {
        self.params.iter().map(Tensor::shallow_clone).collect()
    }
}

/// Units in an order known beforehand: while one is used, the next is on its way.
#[derive(Debug)]
pub struct Walk {
    order: VecDeque<usize>,
}

impl Walk {
    /// Every unit once, in the order of the manifest.
    #[must_use]
    pub fn all(weights: &dyn ModelWeights) -> Self {
        Self { order: (0..weights.manifest().units.len()).collect() }
    }

    /// Embedding, layers, head; then the embedding once more where it is the head's matrix.
    #[must_use]
    pub fn forward(config: &ModelConfig) -> Self {
        let mut order: VecDeque<usize> = (0..config.num_layers + 2).collect();
        if config.tie_word_embeddings {
            order.push_back(0);
        }
        Self { order }
    }

    /// As [`Walk::forward`], then the layers back to the first. The head's pass goes both ways at once, and the
    /// embedding's backward pass needs no weights.
    #[must_use]
    pub fn forward_and_back(config: &ModelConfig) -> Self {
        let mut walk = Self::forward(config);
        walk.order.extend((1..=config.num_layers).rev());
        walk
    }

    /// The next unit.
    ///
    /// # Errors
    /// As [`ModelWeights::unit`].
    ///
    /// # Panics
    /// After the last.
    pub fn next(&mut self, weights: &dyn ModelWeights) -> Result<Unit, CommError> {
        let unit = weights.unit(self.order.pop_front().expect("a walk ends after its last unit"))?;
        if let Some(&next) = self.order.front() {
            weights.prefetch(next)?;
        }
        Ok(unit)
    }

    /// Fetches what is left and uses nothing of it: the part of a rank that has no data, or nothing to do.
    ///
    /// # Errors
    /// As [`ModelWeights::unit`].
    pub fn finish(mut self, weights: &dyn ModelWeights) -> Result<(), CommError> {
        while !self.order.is_empty() {
            drop(self.next(weights)?);
        }
        Ok(())
    }
}
