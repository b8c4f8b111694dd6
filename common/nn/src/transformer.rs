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
    /// Numbers of every token of the batch, `[N, width]`.
    type Rows;

    /// Rows of `weight: [V, C]` for the batch's tokens. Returns `[N, C]`.
    fn embed(&self, weight: &Tensor) -> Self::Rows;

    /// `x / rms(x) * weight` over each row (arXiv 1910.07467). Same shape as `x`.
    fn rms_norm(&self, x: &Self::Rows, weight: &Tensor, eps: f64) -> Self::Rows;

    /// As [`Ops::rms_norm`], over each head of a row: `weight` is `[D]`, `x` is `[N, heads * D]`.
    fn head_norm(&self, x: Self::Rows, weight: &Tensor, eps: f64) -> Self::Rows;

    /// `x` as it is and its norm, as of [`Ops::rms_norm`]: `[N, C]` each. A side may add up what comes back for both.
    fn residual_norm(&self, x: Self::Rows, weight: &Tensor, eps: f64) -> [Self::Rows; 2] {
        let normed = self.rms_norm(&x, weight, eps);
        [x, normed]
    }

    /// Projections of the same `x: [N, in]`, which a side may compute as one product. Returns each `[N, out]`.
    fn linear<const P: usize>(&self, x: &Self::Rows, projections: [&Projection<Self::Matrix>; P]) -> [Self::Rows; P];

    /// `residual + projection(x)`, `[N, out]`.
    fn add_linear(&self, residual: Self::Rows, x: &Self::Rows, projection: &Projection<Self::Matrix>) -> Self::Rows;

    /// [`Ops::residual_norm`] of [`Ops::add_linear`].
    fn add_linear_norm(
        &self,
        residual: Self::Rows,
        x: &Self::Rows,
        projection: &Projection<Self::Matrix>,
        (weight, eps): (&Tensor, f64),
    ) -> [Self::Rows; 2] {
        self.residual_norm(self.add_linear(residual, x, projection), weight, eps)
    }

    /// Rotates each head by its token's position (arXiv 2104.09864, halves as in Hugging Face). `[N, heads * D]`.
    fn rope(&self, x: Self::Rows) -> Self::Rows;

    /// Causal attention of each token within its own sequence.
    ///
    /// # Shapes
    /// - q: `[N, H * D]`, k and v: `[N, K * D]`; returns `[N, H * D]`.
    fn attention(&self, layer_idx: usize, qkv: [Self::Rows; 3]) -> Self::Rows;

    /// `silu(gate) * up`, `[N, F]`, of two projections of the same rows.
    fn silu_mul(&self, gate_up: [Self::Rows; 2]) -> Self::Rows;
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
        let input_norm = next();
        let qkv = [(); 3].map(|()| matrix(next()));
        let [q, k, v] = qkv.map(|weight| Projection { weight, bias: config.qkv_bias.then(&mut next) });
        let mut projection = |has_bias: bool, next: &mut dyn FnMut() -> Tensor| Projection {
            weight: matrix(next()),
            bias: has_bias.then(&mut *next),
        };
        Self {
            input_norm,
            q,
            k,
            v,
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
    pub fn forward<O: Ops<Matrix = M>>(&self, ops: &O, config: &ModelConfig, layer_idx: usize, x: O::Rows) -> O::Rows {
        let eps = config.rms_norm_eps;
        let [x, hidden] = ops.residual_norm(x, &self.input_norm, eps);
        let [mut q, mut k, v] = ops.linear(&hidden, [&self.q, &self.k, &self.v]);
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            q = ops.head_norm(q, q_norm, eps);
            k = ops.head_norm(k, k_norm, eps);
        }
        let attended = ops.attention(layer_idx, [ops.rope(q), ops.rope(k), v]); // [N, H * D]
        let [x, hidden] = ops.add_linear_norm(x, &attended, &self.output, (&self.post_attention_norm, eps));
        let gated = ops.silu_mul(ops.linear(&hidden, [&self.gate, &self.up])); // [N, F]
        ops.add_linear(x, &gated, &self.down)
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
