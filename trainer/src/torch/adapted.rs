//! Passes of a micro-batch through a frozen model with adapters.

use aha_core::batch::TrainSequence;
use aha_nn::autograd::grad;
use aha_nn::autograd_ops::PackedBatch;
use aha_nn::comm::CommError;
use aha_nn::lora::{self, AdapterSpec, Dropout, LoraOps};
use aha_nn::model_config::ModelConfig;
use aha_nn::transformer::Ops;
use aha_nn::unit::{ModelWeights, Unit, Walk};
use tch::Tensor;

use super::learner::{LayerTape, Learner, LearnerOptions, MicroBatch, StepError, StepOutput, defined, leaf};
use super::prompt_groups::{prompt_groups, tokens};

/// A model that does not train, and what the adapters in training are to it.
#[derive(Debug)]
pub struct FrozenBase {
    pub weights: Box<dyn ModelWeights>,
    /// Its layers have weights only while they compute: no graph of one may be kept.
    pub is_quantised: bool,
    pub spec: AdapterSpec,
    /// Share of the adapters' inputs that become 0 in training.
    pub dropout: f64,
    /// Of the dropout.
    pub seed: u64,
}

impl FrozenBase {
    /// The masks of a micro-batch in the update after `num_updates`; `None` where nothing is dropped.
    pub(super) fn dropout(
        &self,
        sequences: &[TrainSequence],
        indices: &[usize],
        (options, num_updates): (&LearnerOptions, u64),
    ) -> Option<Dropout> {
        (self.dropout > 0.0).then(|| {
            let groups = prompt_groups(sequences, indices, options.share_prompts);
            let tokens: Vec<_> = groups.iter().map(|group| tokens(sequences, group)).collect();
            Dropout::new(self.dropout, (self.seed, num_updates), &tokens)
        })
    }
}

impl Learner {
    /// Forward and backward through the frozen model and its adapters.
    pub(super) fn adapted(
        &mut self,
        base: &FrozenBase,
        batch: &MicroBatch,
        (dropout, is_last): (Option<&Dropout>, bool),
        output: &mut StepOutput,
    ) -> Result<(), StepError> {
        let mut lap = self.lap();
        let mut walk = Walk::forward_and_back(&self.config);
        let (mut tapes, last) = self.pass(base, batch, dropout).forward(&mut walk)?;
        output.times.forward += lap.take();
        let mut d_output = Some(self.head(batch, &last, &mut walk, output)?.input);
        output.times.head += lap.take();
        while let (Some(tape), Some(d_layer)) = (tapes.pop(), d_output.take()) {
            let layer_idx = tapes.len();
            let unit = walk.next(&*base.weights)?;
            let grads;
            (d_output, grads) = self.pass(base, batch, dropout).backward(&unit, (tape, layer_idx), d_layer)?;
            drop(unit);
            self.zero.accumulate(layer_idx, &grads, is_last)?;
        }
        output.times.backward += lap.take();
        Ok(())
    }

    fn pass<'a>(
        &'a self,
        base: &'a FrozenBase,
        batch: &'a MicroBatch,
        dropout: Option<&'a Dropout>,
    ) -> AdaptedPass<'a> {
        let (config, packed, adapters) = (&self.config, &batch.packed, self.zero.weights());
        AdaptedPass { config, options: &self.options, base, adapters, packed, dropout }
    }
}

/// One micro-batch, layer by layer. Gradients flow to adapters, and to the inputs of all layers but the first: nothing
/// below it trains.
struct AdaptedPass<'a> {
    config: &'a ModelConfig,
    options: &'a LearnerOptions,
    base: &'a FrozenBase,
    /// A unit a layer.
    adapters: &'a dyn ModelWeights,
    packed: &'a PackedBatch,
    dropout: Option<&'a Dropout>,
}

impl AdaptedPass<'_> {
    /// Returns the layers' tapes, and the input leaf of the head, `[N, C]`.
    fn forward(&self, walk: &mut Walk) -> Result<(Vec<LayerTape>, Tensor), CommError> {
        let embedding = walk.next(&*self.base.weights)?;
        let mut x = Tensor::from(self.packed.embed(&embedding.params()[0])).detach(); // [N, C]
        drop(embedding);
        let mut tapes = Vec::with_capacity(self.config.num_layers);
        for layer_idx in 0..self.config.num_layers {
            let (unit, adapters) = (walk.next(&*self.base.weights)?, self.adapters.unit(layer_idx)?);
            let params = adapters.params().iter().map(leaf).collect();
            let mut tape = LayerTape { input: x, params, sums: Vec::new(), output: None };
            let keeps_graph = !self.options.recomputes(layer_idx) && !self.base.is_quantised;
            let output = if keeps_graph {
                self.layer(&unit, &tape, layer_idx)
            } else {
                tch::no_grad(|| self.layer(&unit, &tape, layer_idx))
            };
            x = leaf(&output);
            tape.output = keeps_graph.then_some(output);
            tapes.push(tape);
        }
        Ok((tapes, x))
    }

    /// Returns the gradients of a layer's input, unless it is the first, and of its adapters in manifest order.
    fn backward(
        &self,
        unit: &Unit,
        (mut tape, layer_idx): (LayerTape, usize),
        d_output: Tensor,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>), StepError> {
        // The tape's leaves have memory while the unit is there.
        let _adapters = self.adapters.unit(layer_idx)?;
        let output = match tape.output.take() {
            Some(output) => output,
            None => self.layer(unit, &tape, layer_idx),
        };
        let mut inputs = tape.params;
        if layer_idx > 0 {
            inputs.push(tape.input);
        }
        let mut grads = defined(grad(&[output], &inputs, &[Some(d_output)], false)?);
        let d_input = if layer_idx > 0 { grads.pop() } else { None };
        Ok((d_input, grads.into_iter().map(Some).collect()))
    }

    /// `unit` is the layer's of the base.
    fn layer(&self, unit: &Unit, tape: &LayerTape, layer_idx: usize) -> Tensor {
        let layer = lora::layer(self.config, &self.base.spec, unit.params(), &tape.params);
        let ops = LoraOps { packed: self.packed, scale: self.base.spec.scale(), dropout: self.dropout, layer_idx };
        layer.forward(&ops, self.config, layer_idx, tape.input.shallow_clone().into()).into()
    }
}
