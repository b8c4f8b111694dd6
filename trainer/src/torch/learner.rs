//! One optimizer step: packed micro-batches forward and backward, unit by unit, then the sharded update.
//!
//! Forward keeps each unit's input, and its graph unless activations are recomputed. Backward walks the units in
//! reverse, asks autograd for one unit's gradients at a time, and hands them to [`Zero`], which reduces them while the
//! next unit computes. The head is computed at positions that predict a completion token, in chunks whose gradient is
//! taken at once, so that the logits of a batch never exist together.
//!
//! Where ranks share the weights, each pass is a [`Walk`] over the units, which are whole only while they are used. A graph
//! that is kept refers to parameters whose memory comes back before its backward pass.

use std::rc::Rc;

use aha_core::batch::TrainSequence;
use aha_nn::autograd::{GradError, grad};
use aha_nn::autograd_ops::PackedBatch;
use aha_nn::comm::CommError;
use aha_nn::forward;
use aha_nn::fused_ops::TrainedMatrix;
use aha_nn::lora::{self, Merged};
use aha_nn::model_config::ModelConfig;
use aha_nn::optim::AdamW;
use aha_nn::rotary::RotaryTable;
use aha_nn::transformer::{Layer, Ops};
use aha_nn::unit::{ModelWeights, Unit, Walk};
use tch::{Device, Kind, Tensor};

use super::adapted::FrozenBase;
use super::head::HeadGradients;
use super::objective::{LossSums, Objective, Streams};
use super::parameters::Parameters;
use super::prompt_groups;
use super::step_times::{Lap, StepTimes};
use super::targets::Targets;
use super::unread::Unread;
use super::zero::{Zero, ZeroError};

/// What a step needs beside its data.
#[derive(Debug, Clone, Copy)]
pub struct LearnerOptions {
    pub objective: Objective,
    /// Logits are divided by it before the softmax, as they were when the tokens were sampled.
    pub temperature: f64,
    pub max_grad_norm: f64,
    /// Compute activations again in the backward pass instead of keeping them.
    pub gradient_checkpointing: bool,
    /// Do so for every so many-th layer only; 1 is all.
    pub gradient_checkpointing_interval: usize,
    /// Compute the prompt that sequences of a micro-batch have in common once.
    pub share_prompts: bool,
    /// Longest sequence.
    pub max_length: usize,
    /// Tokens whose logits exist together.
    pub logit_rows: i64,
}

/// The policy in training on this rank.
#[derive(Debug)]
pub struct Learner {
    pub(super) config: ModelConfig,
    pub(super) options: LearnerOptions,
    table: RotaryTable,
    /// Wait for the device before each look at the clock.
    times_device: bool,
    reference: Option<Parameters>,
    /// Where `zero` has adapters, the model that they belong to.
    pub(super) base: Option<Rc<FrozenBase>>,
    pub(super) zero: Zero,
}

/// This rank's share of a step.
#[derive(Debug)]
pub struct LocalBatch<'a> {
    pub sequences: &'a [TrainSequence],
    /// Indices into `sequences`.
    pub micro_batches: &'a [Vec<usize>],
    /// The most micro-batches that any rank has: all ranks issue the collectives of as many.
    pub num_micro_batches: usize,
}

/// What a step did. Sums are over the completion tokens of this rank.
#[derive(Debug, Default)]
pub struct StepOutput {
    pub loss: f64,
    /// Norm of the gradients over all ranks, before clipping.
    pub grad_norm: f64,
    /// Updates that were left out, because the gradients were not finite.
    pub num_skipped: u32,
    /// Log-probs of the completion tokens of every sequence, before the update.
    pub logprobs: Vec<Vec<f32>>,
    pub num_tokens: usize,
    /// Tokens that the layers computed, prompts among them: a shared one counts once.
    pub num_packed_tokens: usize,
    pub entropy_sum: f64,
    pub sums: LossSums,
    pub times: StepTimes,
    pub(super) unread: Unread,
}

/// What the current weights say of the completion tokens of every sequence; empty for those of other ranks.
#[derive(Debug)]
pub struct Statistics {
    pub logprobs: Vec<Vec<f32>>,
    /// In nats.
    pub entropies: Vec<Vec<f32>>,
}

#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(transparent)]
    Grad(#[from] GradError),
    #[error(transparent)]
    Zero(#[from] ZeroError),
    #[error(transparent)]
    Comm(#[from] CommError),
}

/// What the layers, the head and the objective need of a micro-batch.
pub(super) struct MicroBatch {
    pub(super) packed: PackedBatch,
    pub(super) targets: Targets,
    pub(super) streams: Streams,
}

/// What the forward pass leaves behind.
struct Tapes {
    /// The embedding's leaf, and its output.
    embedding: Tensor,
    embedded: Tensor,
    layers: Vec<LayerTape>,
    /// The input leaf of the head.
    last: Tensor,
}

/// A layer's part of the graph: input leaf, parameter leaves, and the output unless it is to be recomputed.
pub(super) struct LayerTape {
    pub(super) input: Tensor,
    pub(super) params: Vec<Tensor>,
    /// Where the backward pass adds the gradients of the matrices among them, in their order; empty where it hands them on.
    pub(super) sums: Vec<Tensor>,
    pub(super) output: Option<Tensor>,
}

impl Learner {
    /// `reference` is the frozen policy of the KL penalty, sharded as the policy; the objective says whether it is needed.
    pub fn new(config: ModelConfig, options: LearnerOptions, zero: Zero, reference: Option<Parameters>) -> Self {
        let table = RotaryTable::new(&config, options.max_length, zero.weights().device());
        Self { config, options, table, times_device: false, reference, base: None, zero }
    }

    /// A learner of the adapters in `zero`. The reference policy, where the objective needs one, is `base` without them.
    pub fn of_adapters(config: ModelConfig, options: LearnerOptions, zero: Zero, base: FrozenBase) -> Self {
        Self { base: Some(Rc::new(base)), ..Self::new(config, options, zero, None) }
    }

    pub fn zero(&self) -> &Zero {
        &self.zero
    }

    pub fn zero_mut(&mut self) -> &mut Zero {
        &mut self.zero
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The whole policy: the weights in training, or base and adapters, merged in fp32 as they are read.
    #[must_use]
    pub fn policy(&self) -> Box<dyn ModelWeights + '_> {
        match &self.base {
            Some(base) => Box::new(self.merged(base)),
            None => Box::new(self.zero.weights()),
        }
    }

    /// Type of the weights in the forward and backward pass.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.model().kind()
    }

    /// The model's own weights: those in training, or the frozen ones under the adapters.
    pub(super) fn model(&self) -> &dyn ModelWeights {
        match &self.base {
            Some(base) => &*base.weights,
            None => self.zero.weights(),
        }
    }

    fn merged<'a>(&'a self, base: &'a FrozenBase) -> Merged<'a> {
        Merged { base: &*base.weights, spec: &base.spec, adapters: self.zero.weights() }
    }

    /// Takes one optimizer step on the sequences of all ranks.
    ///
    /// # Errors
    /// If a collective fails or autograd does; the weights are then undefined, and the process must stop.
    pub fn step(&mut self, batch: &LocalBatch<'_>, options: &AdamW) -> Result<StepOutput, StepError> {
        let mut output = StepOutput { logprobs: vec![Vec::new(); batch.sequences.len()], ..StepOutput::default() };
        for index in 0..batch.num_micro_batches {
            let is_last = index + 1 == batch.num_micro_batches;
            match batch.micro_batches.get(index) {
                Some(indices) => self.micro_batch(batch.sequences, indices, is_last, &mut output)?,
                None => self.no_micro_batch(is_last)?,
            }
        }
        let mut lap = self.lap();
        output.grad_norm = self.zero.reduce_gradients()?;
        output.read();
        output.times.reduce += lap.take();
        if !output.grad_norm.is_finite() {
            output.num_skipped = 1;
            self.zero.zero_gradients();
        } else {
            // The constant is torch's, in clip_grad_norm_.
            let max_norm = self.options.max_grad_norm;
            let scale = if max_norm > 0.0 { (max_norm / (output.grad_norm + 1e-6)).min(1.0) } else { 1.0 };
            self.zero.update(scale, options)?;
            output.times.optimizer += lap.take();
        }
        Ok(output)
    }

    /// What the current weights say of a batch, without a step. All ranks call this together.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn statistics(&self, batch: &LocalBatch<'_>) -> Result<Statistics, CommError> {
        let empty = || vec![Vec::new(); batch.sequences.len()];
        let mut statistics = Statistics { logprobs: empty(), entropies: empty() };
        for index in 0..batch.num_micro_batches {
            let Some(indices) = batch.micro_batches.get(index) else {
                if self.base.is_none() {
                    Walk::forward(&self.config).finish(self.zero.weights())?;
                }
                continue;
            };
            let (packed, targets) = self.pack(batch.sequences, indices);
            let (logprobs, entropies) = match &self.base {
                Some(base) => {
                    let places = (&targets.rows, &targets.tokens);
                    lora::statistics(&self.config, &self.merged(base), &packed, places, self.options.temperature)?
                }
                None => self.frozen_statistics(self.zero.weights(), &packed, &targets)?,
            };
            targets.pieces.scatter(&logprobs, &mut statistics.logprobs);
            targets.pieces.scatter(&entropies, &mut statistics.entropies);
        }
        Ok(statistics)
    }

    /// From now on the times of a step are the device's: the host waits for it after each part. That makes steps on a GPU
    /// slower.
    pub fn time_device(&mut self) {
        self.times_device = true;
    }

    pub(super) fn lap(&self) -> Lap {
        Lap::start(self.times_device.then(|| self.zero.weights().device()))
    }

    /// What the reference policy says of a batch; empty for sequences of other ranks. All ranks call this together.
    ///
    /// # Errors
    /// If a collective fails.
    ///
    /// # Panics
    /// If there is no reference policy.
    pub fn reference_logprobs_of(&self, batch: &LocalBatch<'_>) -> Result<Vec<Vec<f32>>, CommError> {
        let base = self.base.as_ref().map(|base| &*base.weights);
        let weights = base.or(self.reference.as_ref().map(|reference| reference as _)).expect("there is a reference");
        let mut logprobs = vec![Vec::new(); batch.sequences.len()];
        for index in 0..batch.num_micro_batches {
            let Some(indices) = batch.micro_batches.get(index) else {
                if self.base.is_none() {
                    Walk::forward(&self.config).finish(weights)?;
                }
                continue;
            };
            let (packed, targets) = self.pack(batch.sequences, indices);
            targets.pieces.scatter(&self.frozen_statistics(weights, &packed, &targets)?.0, &mut logprobs);
        }
        Ok(logprobs)
    }

    pub fn reference(&self) -> Option<&Parameters> {
        self.reference.as_ref()
    }

    /// Moves the reference policy towards the policy: `alpha * policy + (1 - alpha) * reference`. Nothing happens
    /// without one.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn sync_reference(&mut self, alpha: f64) -> Result<(), CommError> {
        self.reference.as_ref().map_or(Ok(()), |reference| reference.mix(self.zero.weights(), alpha))
    }

    fn micro_batch(
        &mut self,
        sequences: &[TrainSequence],
        indices: &[usize],
        is_last: bool,
        output: &mut StepOutput,
    ) -> Result<(), StepError> {
        let (packed, targets) = self.pack(sequences, indices);
        output.num_packed_tokens += packed.tokens.numel();
        let mut streams = targets.streams(sequences);
        let mut lap = self.lap();
        streams.reference_logprobs = self.reference_logprobs(&packed, &targets)?;
        output.times.reference += lap.take();
        let batch = MicroBatch { packed, targets, streams };
        if let Some(base) = self.base.clone() {
            let dropout = base.dropout(sequences, indices, (&self.options, self.zero.num_updates()));
            return self.adapted(&base, &batch, (dropout.as_ref(), is_last), output);
        }

        let mut walk = Walk::forward_and_back(&self.config);
        let tapes = self.forward(&batch.packed, &mut walk)?;
        output.times.forward += lap.take();
        let head = self.head(&batch, &tapes.last, &mut walk, output)?;
        output.times.head += lap.take();
        self.backward(&batch.packed, tapes, head, (&mut walk, is_last))?;
        output.times.backward += lap.take();
        Ok(())
    }

    /// Of the tokens of a micro-batch, `[M]`; `None` where the objective has no reference policy.
    fn reference_logprobs(&self, packed: &PackedBatch, targets: &Targets) -> Result<Option<Tensor>, CommError> {
        if !self.options.objective.needs_reference() {
            return Ok(None);
        }
        let weights: &dyn ModelWeights = match (&self.base, &self.reference) {
            (Some(base), _) => &*base.weights,
            (None, Some(reference)) => reference,
            (None, None) => return Ok(None),
        };
        Ok(Some(self.frozen_statistics(weights, packed, targets)?.0))
    }

    /// Issues the collectives of a micro-batch with nothing to add.
    fn no_micro_batch(&mut self, is_last: bool) -> Result<(), StepError> {
        if self.base.is_some() {
            // The base is whole on every rank.
            for layer_idx in (0..self.config.num_layers).rev() {
                self.zero.accumulate(layer_idx, &[], is_last)?;
            }
            return Ok(());
        }
        if let Some(reference) = self.reference.as_ref().filter(|_| self.options.objective.needs_reference()) {
            Walk::forward(&self.config).finish(reference)?;
        }
        let mut walk = Walk::forward_and_back(&self.config);
        for _ in 0..=self.config.num_layers {
            walk.next(self.zero.weights())?;
        }
        drop(forward::head(self.zero.weights(), &mut walk)?);
        let head = 1 + self.config.num_layers;
        self.zero.accumulate(head, &[], is_last)?;
        for unit_idx in (1..head).rev() {
            walk.next(self.zero.weights())?;
            self.zero.accumulate(unit_idx, &[], is_last)?;
        }
        self.zero.accumulate(0, &[], is_last)?;
        Ok(())
    }

    fn pack(&self, sequences: &[TrainSequence], indices: &[usize]) -> (PackedBatch, Targets) {
        let weights = self.model();
        let groups = prompt_groups::prompt_groups(sequences, indices, self.options.share_prompts);
        let tokens: Vec<_> = groups.iter().map(|group| prompt_groups::tokens(sequences, group)).collect();
        let packed = PackedBatch::shared(&tokens, &self.table, weights.kind());
        (packed, Targets::new(sequences, &groups, weights.device()))
    }

    /// Log-probs and entropies, `[M]` each.
    fn frozen_statistics(
        &self,
        weights: &dyn ModelWeights,
        packed: &PackedBatch,
        targets: &Targets,
    ) -> Result<(Tensor, Tensor), CommError> {
        let what = (&targets.rows, &targets.tokens);
        forward::statistics(&self.config, weights, packed, what, self.options.temperature)
    }

    /// Where the backward pass may add the gradients of a unit by itself.
    pub(super) fn gradients(&mut self, unit_idx: usize, packed: &PackedBatch) -> Option<Vec<Tensor>> {
        if packed.adds_gradients() && self.kind() == Kind::Float { self.zero.gradients(unit_idx) } else { None }
    }

    fn forward(&mut self, packed: &PackedBatch, walk: &mut Walk) -> Result<Tapes, CommError> {
        let unit = walk.next(self.zero.weights())?;
        let embedding = leaf(&unit.params()[0]);
        let embedded = Tensor::from(packed.embed(&embedding)); // [N, C]
        drop(unit);
        let mut x = leaf(&embedded);
        let mut layers = Vec::with_capacity(self.config.num_layers);
        for layer_idx in 0..self.config.num_layers {
            let mut sums = self.gradients(1 + layer_idx, packed).unwrap_or_default();
            sums.retain(|sum| sum.dim() == 2);
            let unit = walk.next(self.zero.weights())?;
            let params = unit.params().iter().map(leaf).collect();
            let mut tape = LayerTape { input: x, params, sums, output: None };
            let is_recomputed = self.options.recomputes(layer_idx);
            let output = if is_recomputed {
                tch::no_grad(|| self.layer(&tape, packed, layer_idx))
            } else {
                self.layer(&tape, packed, layer_idx)
            };
            x = leaf(&output);
            tape.output = (!is_recomputed).then_some(output);
            layers.push(tape);
        }
        Ok(Tapes { embedding, embedded, layers, last: x })
    }

    fn layer(&self, tape: &LayerTape, packed: &PackedBatch, layer_idx: usize) -> Tensor {
        let params = tape.params.iter().map(Tensor::shallow_clone).collect();
        let mut sums = tape.sums.iter();
        let matrix = |weight: Tensor| match sums.next() {
            Some(sum) => TrainedMatrix::adding_to(sum.shallow_clone(), &weight),
            None => weight.into(),
        };
        let x = tape.input.shallow_clone().into();
        Layer::new(&self.config, params, matrix).forward(packed, &self.config, layer_idx, x).into()
    }

    fn backward(
        &mut self,
        packed: &PackedBatch,
        tapes: Tapes,
        head: HeadGradients,
        (walk, is_last): (&mut Walk, bool),
    ) -> Result<(), StepError> {
        let Tapes { embedding, embedded, layers, .. } = tapes;
        self.zero.accumulate(1 + self.config.num_layers, &head.params, is_last)?;
        let mut d_output = head.input;
        for (layer_idx, mut tape) in layers.into_iter().enumerate().rev() {
            let unit: Unit = walk.next(self.zero.weights())?;
            let output = tape.output.take().unwrap_or_else(|| self.layer(&tape, packed, layer_idx));
            let is_handed_on = |param: &&Tensor| tape.sums.is_empty() || param.dim() < 2;
            let mut inputs = vec![tape.input];
            inputs.extend(tape.params.iter().filter(is_handed_on).map(Tensor::shallow_clone));
            let mut grads = defined(grad(&[output], &inputs, &[Some(d_output)], false)?).into_iter();
            drop(unit);
            d_output = grads.next().expect("autograd gives as many gradients as inputs");
            let grads = tape.params.iter().map(|param| if is_handed_on(&param) { grads.next() } else { None });
            self.zero.accumulate(1 + layer_idx, &grads.collect::<Vec<_>>(), is_last)?;
        }
        let is_cpu = packed.tokens.device() == Device::Cpu;
        // By index it adds rows one by one, in order, instead of whole matrices.
        let d_embedding = match (self.gradients(0, packed), head.embedding) {
            (Some(mut sums), None) if is_cpu => {
                drop(sums[0].index_add_(0, &packed.tokens, &d_output));
                None
            }
            (_, Some(mut tied)) if is_cpu => Some(tied.index_add_(0, &packed.tokens, &d_output)),
            (_, tied) => {
                let [d_embedding] = required(grad(&[embedded], &[embedding], &[Some(d_output)], false)?);
                Some(tied.map_or_else(|| d_embedding.shallow_clone(), |tied| &d_embedding + tied))
            }
        };
        self.zero.accumulate(0, &[d_embedding], is_last)?;
        Ok(())
    }
}

impl LearnerOptions {
    /// Whether a layer's activations are computed again in the backward pass.
    pub(super) fn recomputes(&self, layer_idx: usize) -> bool {
        self.gradient_checkpointing && layer_idx.is_multiple_of(self.gradient_checkpointing_interval)
    }
}

impl StepOutput {
    /// Adds what another update did to sums, losses and norms.
    pub fn add_update(&mut self, other: &Self) {
        self.loss += other.loss;
        self.grad_norm += other.grad_norm;
        self.num_skipped += other.num_skipped;
        self.num_tokens += other.num_tokens;
        self.num_packed_tokens += other.num_packed_tokens;
        self.entropy_sum += other.entropy_sum;
        self.sums.add(&other.sums);
        self.times.add(&other.times);
    }
}

/// A tensor that shares memory and starts a graph of its own.
pub(super) fn leaf(tensor: &Tensor) -> Tensor {
    tensor.detach().set_requires_grad(true)
}

pub(super) fn defined(grads: Vec<Option<Tensor>>) -> Vec<Tensor> {
    grads.into_iter().map(|grad| grad.expect("autograd gives every gradient unless told otherwise")).collect()
}

pub(super) fn required<const N: usize>(grads: Vec<Option<Tensor>>) -> [Tensor; N] {
    defined(grads).try_into().expect("autograd gives as many gradients as inputs")
}
