//! Memory before any is taken: what a trainer rank and a generator will hold, by formulas.
//!
//! Beside the model's shapes: `N` packed tokens of a micro-batch, of which `M` are of completions, `W` ranks. What libtorch
//! itself takes (some 200 MB of a process, contexts of CUDA) and what malloc keeps of freed memory are not counted. Stages,
//! offload and recompute are exact; what one layer keeps for its backward pass follows the operations of
//! `aha_nn::fused_ops`, which a test measures on the CPU in fp32, and libtorch's where there are none of ours. Nothing has
//! been measured on a GPU.

mod adapters;

use aha_core::config::{Lora, RunConfig, Train};
use aha_core::manifest::{Manifest, ParamSpec, SHARD_BLOCK, UnitSpec};
use aha_core::optimizer::OptimizerKind;
use aha_nn::kernels::cuda::MAX_NORM_WIDTH;
use aha_nn::logprob::chunk_rows_on;
use aha_nn::model_config::{Family, ModelConfig};
use tch::{Device, Kind};

use crate::torch::optimizer::{LEAST_8BIT_NUMEL, muon_serves};

/// fp32.
const FLOAT: usize = 4;

/// What a plan is made of.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    pub model: &'a ModelConfig,
    pub train: &'a Train,
    pub lora: &'a Lora,
    /// Type and place of the weights.
    pub kind: Kind,
    pub device: Device,
    pub world_size: usize,
    /// `N`, of the largest micro-batch.
    pub num_tokens: usize,
    /// `M`, of the same.
    pub num_targets: usize,
}

/// Bytes of one process on one memory, by what they are for; what is 0 is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub terms: Vec<(&'static str, usize)>,
}

/// What a trainer rank takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainerPlan {
    /// Where it computes.
    pub device: Plan,
    /// In the CPU's memory, where that is not the device: what is offloaded.
    pub host: Plan,
}

/// Tokens `N` of the largest micro-batch of a run, and those of completions among them, `M`: completions of the greatest
/// length behind prompts of the greatest length.
#[must_use]
pub fn largest_micro_batch(config: &RunConfig, world_size: usize) -> (usize, usize) {
    let (prompt, completion) = (config.data.max_prompt_length, config.rollout.max_completion_length as usize);
    let num_completions = config.rollout.generation_batch_size / config.train.steps_per_generation.max(1);
    let per_rank = num_completions.div_ceil(world_size).max(1);
    // Completions that follow one copy of their prompt.
    let together = if config.train.share_prompts { config.rollout.num_generations.min(per_rank) } else { 1 };
    let num_groups = per_rank.div_ceil(together);
    let whole = num_groups * (prompt + together * completion);
    let num_tokens = whole.min(config.train.micro_batch_tokens);
    let share = (together * completion) as f64 / (prompt + together * completion).max(1) as f64;
    (num_tokens, (num_tokens as f64 * share).ceil() as usize)
}

/// What a trainer rank takes at the height of a step.
#[must_use]
pub fn trainer(setting: &Setting<'_>) -> TrainerPlan {
    let Setting { train, device, world_size, .. } = *setting;
    let trained = setting.trained();
    let padded: usize = trained.units.iter().map(|unit| unit.padded_numel(world_size)).sum();
    let share = |is_shared: bool| if is_shared { padded / world_size } else { padded };
    let has_master = setting.trained_element() != FLOAT;
    let weights = share(train.zero_stage == 3) * setting.trained_element();
    let masters = if has_master { share(train.zero_stage >= 1) * FLOAT } else { 0 };
    let ranks = if train.zero_stage >= 1 { world_size } else { 1 };
    let optimizer = masters + moments(&trained, train.optimizer) / ranks;
    let reference = if train.beta > 0.0 && !setting.lora.is_on() { weights } else { 0 };

    let kept = setting.kept_activations();
    let chunk = setting.logit_chunk();
    let gathered = setting.gathered();
    // A step is highest either where the head's gradient is taken, or where that of the last layer is.
    let height = (gathered + setting.head()).max(gathered + setting.last_layer()).max(chunk);
    let height = height.max(setting.dequantising());
    let is_host = device == Device::Cpu;
    let (on_device, on_host): (Vec<_>, Vec<_>) = [
        ("frozen base", setting.base(), false),
        (if setting.lora.is_on() { "adapters" } else { "weights" }, weights, train.offload_params),
        ("gradients", share(train.zero_stage >= 2) * FLOAT, false),
        ("optimizer", optimizer, train.offload_optimizer),
        ("update on the CPU", setting.host_stage(), true),
        ("reference model", reference, train.offload_params),
        ("activations", kept, false),
        ("logit chunk", chunk, false),
        ("temporary buffers", height - chunk, false),
    ]
    .into_iter()
    .partition(|(.., is_offloaded)| is_host || !is_offloaded);
    let plan =
        |terms: Vec<(&'static str, usize, bool)>| Plan::new(terms.into_iter().map(|(name, bytes, _)| (name, bytes)));
    TrainerPlan { device: plan(on_device), host: plan(on_host) }
}

/// Bytes of the optimizer's state of all that trains, masters left out.
fn moments(trained: &Manifest, optimizer: OptimizerKind) -> usize {
    let params = trained.units.iter().flat_map(|unit| unit.params.iter().map(move |param| (unit, param)));
    let bytes = |(unit, param): (&UnitSpec, &ParamSpec)| match optimizer {
        // Two bytes an element, and two scales a block.
        OptimizerKind::Adamw8bit if param.numel() >= LEAST_8BIT_NUMEL => {
            2 * param.numel() + 2 * FLOAT * param.numel().div_ceil(SHARD_BLOCK)
        }
        OptimizerKind::Muon if param.shape.len() == 2 && muon_serves(unit) => FLOAT * param.numel(),
        _ => 2 * FLOAT * param.numel(),
    };
    params.map(bytes).sum()
}

/// What a generator takes: weights, those of the next version as they arrive, and blocks of keys and values.
#[must_use]
pub fn generator(config: &RunConfig, model: &ModelConfig, kind: Kind) -> Plan {
    let element = kind.elt_size_in_bytes();
    let weights = model.manifest().numel() * element;
    let block = 2 * model.num_layers * config.generator.block_size * model.num_kv_heads * model.head_dim * element;
    let blocks = (config.generator.kv_cache_mib << 20) / block.max(1) * block;
    Plan::new([("weights", weights), ("weights that arrive", weights), ("KV blocks", blocks)])
}

/// What a rank, whose plan is that of `setting`, takes with its engine in one process (`launch.colocate`) while it samples.
/// While it trains, the engine has nothing.
#[must_use]
pub fn sampling(setting: &Setting<'_>, rank: &Plan, engine: &Plan) -> Plan {
    const ALWAYS: [&str; 5] = ["frozen base", "adapters", "weights", "optimizer", "reference model"];
    let of_engine = |name| engine.terms.iter().find(|(term, _)| *term == name).map_or(0, |(_, bytes)| *bytes);
    let weights = if setting.lends_weights() { 0 } else { of_engine("weights") };
    let held = rank.terms.iter().copied().filter(|(name, _)| ALWAYS.contains(name));
    Plan::new(held.chain([("engine's weights", weights), ("KV blocks", of_engine("KV blocks"))]))
}

impl Plan {
    fn new(terms: impl IntoIterator<Item = (&'static str, usize)>) -> Self {
        Self { terms: terms.into_iter().filter(|(_, bytes)| *bytes > 0).collect() }
    }

    #[must_use]
    pub fn total(&self) -> usize {
        self.terms.iter().map(|(_, bytes)| bytes).sum()
    }
}

impl Setting<'_> {
    /// Bytes of a weight and of an activation.
    fn element(&self) -> usize {
        self.kind.elt_size_in_bytes()
    }

    /// Whether we have kernels of our own.
    fn is_fused(&self) -> bool {
        match self.device {
            Device::Cpu => self.kind == Kind::Float,
            _ => self.model.hidden_size <= MAX_NORM_WIDTH,
        }
    }

    /// `N C`, in bytes.
    fn rows(&self) -> usize {
        self.num_tokens * self.model.hidden_size * self.element()
    }

    /// `M C`, in bytes.
    fn target_rows(&self) -> usize {
        self.num_targets * self.model.hidden_size * self.element()
    }

    /// `V C`, elements.
    fn matrix(&self) -> usize {
        self.model.vocab_size * self.model.hidden_size
    }

    /// What a layer keeps for its backward pass beside its input, in bytes.
    ///
    /// Ours: the second norm's input, `C`; q and attention's output, `2 HD`; k and v, `2 KD`; gate and up, `2 F`; norms of q
    /// and k keep their inputs. libtorch also keeps what norms and products give, attention's padded copies and `silu(gate)`.
    fn layer_activations(&self) -> usize {
        let ModelConfig { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, .. } = *self.model;
        let (q, kv) = (num_heads * head_dim, num_kv_heads * head_dim);
        let head_norms = if self.model.family == Family::Qwen3 { q + kv } else { 0 };
        let per_token = if self.is_fused() {
            hidden_size + 2 * q + 2 * kv + 2 * intermediate_size + head_norms
        } else {
            3 * hidden_size + 3 * q + 2 * kv + 4 * intermediate_size + 2 * head_norms
        };
        self.num_tokens * per_token * self.element() + self.adapter_activations()
    }

    /// Layers whose activations are kept, and those that compute them again.
    fn layers(&self) -> (usize, usize) {
        let num_layers = self.model.num_layers;
        if self.is_quantised() {
            // Matrices that come and go can be on no graph that is kept.
            return (0, num_layers);
        }
        let interval = self.train.gradient_checkpointing_interval.max(1);
        let recomputed = if self.train.gradient_checkpointing { num_layers.div_ceil(interval) } else { 0 };
        (num_layers - recomputed, recomputed)
    }

    /// What the forward pass leaves behind: every layer's input, the last one's output, and what kept layers keep.
    fn kept_activations(&self) -> usize {
        (self.model.num_layers + 1) * self.rows() + self.layers().0 * self.layer_activations()
    }

    fn logit_chunk(&self) -> usize {
        let rows = self.num_targets.min(chunk_rows_on(self.device, self.model.vocab_size as i64) as usize);
        let logit = match (self.is_fused(), self.kind) {
            (true, Kind::Float) => FLOAT,
            // With the gradient in a type of its own.
            (true, _) => FLOAT + self.element(),
            (false, _) => 3 * FLOAT,
        };
        rows * self.model.vocab_size * logit
    }

    /// Whether gradients of matrices are added where they belong, instead of coming first.
    fn adds_gradients(&self) -> bool {
        let is_alone = self.world_size == 1 || self.train.zero_stage < 2;
        self.is_fused() && self.kind == Kind::Float && is_alone && !self.lora.is_on()
    }

    /// While the head's gradient is taken: a chunk of logits, its rows before and after the norm and their gradients, and
    /// the matrix's gradient.
    fn head(&self) -> usize {
        let has_gradient = !self.lora.is_on() && !self.adds_gradients();
        let matrix = if has_gradient { self.matrix() * self.element() } else { 0 };
        self.logit_chunk() + 3 * self.target_rows() + matrix
    }

    /// While the last layer's gradient is taken: what it computes again, its widest part, gradients of that, of its output
    /// and, unless they are added where they belong, of its parameters, on their way to other ranks where there are some; and
    /// the head's, where that is the embedding's too. Beside a frozen matrix with an adapter, the gradient of their input
    /// comes from both before it is summed.
    fn last_layer(&self) -> usize {
        let again = if self.layers().1 > 0 { self.layer_activations() } else { 0 };
        let is_frozen = self.lora.is_on();
        let wide = (2 + usize::from(is_frozen)) * self.num_tokens * self.model.intermediate_size * self.element();
        let unit = self.trained().units[usize::from(!is_frozen)].numel();
        let mut parameters = if self.adds_gradients() { 0 } else { unit * self.trained_element() };
        if self.world_size > 1 && self.train.zero_stage >= 2 {
            // As one tensor, two more of which may be on their way.
            parameters += 3 * unit * FLOAT;
        }
        let is_tied = self.model.tie_word_embeddings && !is_frozen && !self.adds_gradients();
        let tied = if is_tied { self.matrix() * self.element() } else { 0 };
        self.dequantised() + again + wide + 2 * self.rows() + parameters + tied
    }

    /// Whether units are whole only while they are used.
    fn gathers(&self) -> bool {
        self.train.zero_stage == 3 && (self.world_size > 1 || self.train.offload_params)
    }

    /// Whether an engine in the rank's process reads the weights where the rank has them.
    fn lends_weights(&self) -> bool {
        self.device.is_cuda() && self.kind == Kind::BFloat16 && !self.lora.is_on() && !self.gathers()
    }

    /// Units that are whole while they are used: two layers, and with them the largest other one.
    fn gathered(&self) -> usize {
        let units = self.model.manifest().units;
        let largest = units.iter().map(|unit| unit.padded_numel(self.world_size)).max().unwrap_or(0);
        let layer = units[1].padded_numel(self.world_size);
        if self.gathers() { (2 * layer + largest) * self.element() } else { 0 }
    }

    /// Where the optimizer's state is offloaded: one unit's owned weights and gradients.
    fn host_stage(&self) -> usize {
        let units = self.trained().units;
        let largest = units.iter().map(|unit| unit.padded_numel(self.world_size)).max().unwrap_or(0);
        let owned = if self.train.zero_stage > 0 { largest / self.world_size } else { largest };
        if self.train.offload_optimizer { owned * (FLOAT + self.trained_element()) } else { 0 }
    }
}

#[cfg(test)]
mod tests;
