//! The one definition of the decoder that generator and trainer share.
//!
//! What differs between them is passed in as [`Ops`]: how a matrix is stored, how the small operations are computed,
//! and where attention finds its keys and values. What is computed, and in which order, stands here alone.
//!
//! Llama (arXiv 2302.13971) and its kin: pre-norm, grouped-query attention with rotary positions, SwiGLU.

use tch::Tensor;

use crate::model_config::{Family, ModelConfig};

/// The operations that a forward pass is made of, over one batch of packed tokens.
pub trait Ops {
    /// A projection's weight as this side stores it.
    type Matrix;

    /// Rows of `weight: [V, C]` for the batch's tokens. Returns `[N, C]`.
    fn embed(&self, weight: &Tensor) -> Tensor;

    /// `x / rms(x) * weight` over the last dimension (arXiv 1910.07467). Same shape as `x`.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor;

    /// `x: [N, in]` times the transpose of a weight `[out, in]`, plus a bias `[out]`. Returns `[N, out]`.
    fn linear(&self, x: &Tensor, projection: &Projection<Self::Matrix>) -> Tensor;

    /// Rotates each head by its token's position (arXiv 2104.09864, halves as in Hugging Face). `[N, H, D]`.
    fn rope(&self, x: Tensor) -> Tensor;

    /// Causal attention of each token within its own sequence.
    ///
    /// # Shapes
    /// - q: `[N, H, D]`, k and v: `[N, K, D]`; returns `[N, H * D]`.
    fn attention(&self, layer_idx: usize, qkv: [Tensor; 3]) -> Tensor;

    /// `silu(gate) * up`, `[N, F]`.
    fn silu_mul(&self, gate: Tensor, up: Tensor) -> Tensor;
}

/// `y = x W^T + b`.
#[derive(Debug)]
pub struct Projection<M> {
    pub weight: M,
    pub bias: Option<Tensor>,
}

/// The weights of one decoder layer.
#[derive(Debug)]
pub struct Layer<M> {
    input_norm: Tensor,
    q: Projection<M>,
    k: Projection<M>,
    v: Projection<M>,
    output: Projection<M>,
    /// Weights of the q and k norms.
    qk_norms: Option<[Tensor; 2]>,
    post_attention_norm: Tensor,
    gate: Projection<M>,
    up: Projection<M>,
    down: Projection<M>,
}

impl<M> Layer<M> {
    /// Takes a layer's parameters in the order of its unit in the manifest; `matrix` stores a weight `[out, in]`.
    ///
    /// # Panics
    /// If there are fewer parameters than the manifest names.
    pub fn new(config: &ModelConfig, params: Vec<Tensor>, mut matrix: impl FnMut(Tensor) -> M) -> Self {
        let mut params = params.into_iter();
        let mut next = || params.next().expect("a unit has the parameters that the manifest names");
        let mut projection = |has_bias: bool, next: &mut dyn FnMut() -> Tensor| Projection {
            weight: matrix(next()),
            bias: has_bias.then(&mut *next),
        };
        Self {
            input_norm: next(),
            q: projection(config.qkv_bias, &mut next),
            k: projection(config.qkv_bias, &mut next),
            v: projection(config.qkv_bias, &mut next),
            output: projection(config.output_bias, &mut next),
            qk_norms: (config.family == Family::Qwen3).then(|| [next(), next()]),
            post_attention_norm: next(),
            gate: projection(config.mlp_bias, &mut next),
            up: projection(config.mlp_bias, &mut next),
            down: projection(config.mlp_bias, &mut next),
        }
    }

    /// # Shapes
    /// - x: `[N, C]`; returns `[N, C]`.
    pub fn forward<O: Ops<Matrix = M>>(&self, ops: &O, config: &ModelConfig, layer_idx: usize, x: &Tensor) -> Tensor {
        let hidden = ops.rms_norm(x, &self.input_norm, config.rms_norm_eps);
        let x = x + self.attention(ops, config, layer_idx, &hidden);
        let hidden = ops.rms_norm(&x, &self.post_attention_norm, config.rms_norm_eps);
        let gated = ops.silu_mul(ops.linear(&hidden, &self.gate), ops.linear(&hidden, &self.up)); // [N, F]
        x + ops.linear(&gated, &self.down)
    }

    fn attention<O: Ops<Matrix = M>>(
        &self,
        ops: &O,
        config: &ModelConfig,
        layer_idx: usize,
        hidden: &Tensor,
    ) -> Tensor {
        let heads = |projection: &Projection<M>, num_heads: usize| {
            ops.linear(hidden, projection).view([-1, num_heads as i64, config.head_dim as i64]) // [N, heads, D]
        };
        let mut q = heads(&self.q, config.num_heads);
        let mut k = heads(&self.k, config.num_kv_heads);
        let v = heads(&self.v, config.num_kv_heads);
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            q = ops.rms_norm(&q, q_norm, config.rms_norm_eps);
            k = ops.rms_norm(&k, k_norm, config.rms_norm_eps);
        }
        ops.linear(&ops.attention(layer_idx, [ops.rope(q), ops.rope(k), v]), &self.output)
    }
}

/// The final norm, and the head unless it is tied to the embedding.
#[derive(Debug)]
pub struct Head<M> {
    pub norm: Tensor,
    pub lm_head: Option<Projection<M>>,
}

impl<M> Head<M> {
    /// Takes the head unit's parameters in the order of the manifest.
    ///
    /// # Panics
    /// If there are none.
    pub fn new(params: Vec<Tensor>, mut matrix: impl FnMut(Tensor) -> M) -> Self {
        let mut params = params.into_iter();
        let norm = params.next().expect("the head has a norm");
        let lm_head = params.next().map(|weight| Projection { weight: matrix(weight), bias: None });
        Self { norm, lm_head }
    }
}
