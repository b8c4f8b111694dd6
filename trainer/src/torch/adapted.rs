//! Passes of a micro-batch through a frozen model with adapters.

use aha_core::batch::TrainSequence;
use aha_nn::autograd::grad;
use aha_nn::autograd_ops::PackedBatch;
use aha_nn::comm::CommError;
use aha_nn::lora::{self, AdapterSpec, Dropout, LoraOps};
use aha_nn::model_config::ModelConfig;
use aha_nn::transformer::Ops;
use aha_nn::unit::ModelWeights;
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
        dropout: Option<&Dropout>,
        output: &mut StepOutput,
    ) -> Result<(), StepError> {
        let (mut tapes, last) = self.pass(base, batch, dropout).forward()?;
        let embedding = base.weights.unit(0)?.params().remove(0);
        let mut d_output = Some(self.head(batch, &last, &embedding, output)?.input);
        while let (Some(tape), Some(d_layer)) = (tapes.pop(), d_output.take()) {
            let layer_idx = tapes.len();
            let grads;
            (d_output, grads) = self.pass(base, batch, dropout).backward(tape, layer_idx, d_layer)?;
            self.zero.accumulate(layer_idx, &grads)?;
        }
        Ok(())
    }

    fn pass<'a>(
        &'a self,
        base: &'a FrozenBase,
        batch: &'a MicroBatch,
        dropout: Option<&'a Dropout>,
    ) -> AdaptedPass<'a> {
        let keeps_graphs = !self.options.gradient_checkpointing && !base.is_quantised;
        let (config, packed, adapters) = (&self.config, &batch.packed, self.zero.weights());
        AdaptedPass { config, base, adapters, packed, dropout, keeps_graphs }
    }
}

/// One micro-batch, layer by layer. Gradients flow to adapters, and to the inputs of all layers but the first: nothing
/// below it trains.
struct AdaptedPass<'a> {
    config: &'a ModelConfig,
    base: &'a FrozenBase,
    /// A unit a layer.
    adapters: &'a dyn ModelWeights,
    packed: &'a PackedBatch,
    dropout: Option<&'a Dropout>,
    keeps_graphs: bool,
}

impl AdaptedPass<'_> {
    /// Returns the layers' tapes, and the input leaf of the head, `[N, C]`.
    fn forward(&self) -> Result<(Vec<LayerTape>, Tensor), CommError> {
        let mut x = self.packed.embed(&self.base.weights.unit(0)?.params()[0]).detach(); // [N, C]
        let mut tapes = Vec::with_capacity(self.config.num_layers);
        for layer_idx in 0..self.config.num_layers {
            let adapters = self.adapters.unit(layer_idx)?;
            let params = adapters.params().iter().map(leaf).collect();
            let mut tape = LayerTape { input: x, params, output: None };
            let output = if self.keeps_graphs {
                self.layer(&tape, layer_idx)?
            } else {
                tch::no_grad(|| self.layer(&tape, layer_idx))?
            };
            x = leaf(&output);
            tape.output = self.keeps_graphs.then_some(output);
            tapes.push(tape);
        }
        Ok((tapes, x))
    }

    /// Returns the gradients of a layer's input, unless it is the first, and of its adapters in manifest order.
    fn backward(
        &self,
        mut tape: LayerTape,
        layer_idx: usize,
        d_output: Tensor,
    ) -> Result<(Option<Tensor>, Vec<Tensor>), StepError> {
        // The tape's leaves have memory while the unit is there.
        let _adapters = self.adapters.unit(layer_idx)?;
        let output = match tape.output.take() {
            Some(output) => output,
            None => self.layer(&tape, layer_idx)?,
        };
        let mut inputs = tape.params;
        if layer_idx > 0 {
            inputs.push(tape.input);
        }
        let mut grads = defined(grad(&[output], &inputs, &[Some(d_output)], false)?);
        let d_input = if layer_idx > 0 { grads.pop() } else { None };
        Ok((d_input, grads))
    }

    fn layer(&self, tape: &LayerTape, layer_idx: usize) -> Result<Tensor, CommError> {
        let base = self.base.weights.unit(1 + layer_idx)?;
        let layer = lora::layer(self.config, &self.base.spec, base.params(), &tape.params);
        let ops = LoraOps { packed: self.packed, scale: self.base.spec.scale(), dropout: self.dropout, layer_idx };
        Ok(layer.forward(&ops, self.config, layer_idx, tape.input.shallow_clone()))
    }
}
