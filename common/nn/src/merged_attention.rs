//! Attention with a shared prompt in two parts: of every piece over itself, causally, and of all completions over their
//! prompt, which needs neither copies of the prompt nor a mask.
//!
//! Each part gives outputs and log-sums of exponentials, from which those over all keys follow. Backward, each part's
//! kernel gets the outputs and log-sums over *all* keys: a weight is `exp(score - log_sum)`, and the gradient of a score
//! `weight * (d_weight - <d_out, out>)`, so that the parts' gradients just add up.
//!
//! Here are the pass over both parts, whatever computes them, and the parts in fp32 on the CPU, over padded batches.

use std::fmt::Debug;
use std::rc::Rc;

use tch::{Device, Tensor};

use crate::function::differentiable;
use crate::kernels::cpu::training::merge_attention;
use crate::packed_attention::{PaddedBatch, PaddedBatches, Pieces, SharedRows, batch_rows};
use crate::tensor_data::{f32_slice, f32_slice_mut};

/// Makes `exp(score - log_sum)` nothing.
const NO_WEIGHT: f64 = 1e30;

/// Both parts of a micro-batch's attention. No gradient flows.
pub(crate) trait Parts: Debug {
    /// Output, `N H D` elements, and log-sums as [`Self::backward`] wants them; both over all keys.
    ///
    /// # Shapes
    /// - q: `[N, H, D]`, k and v: `[N, K, D]`.
    fn attend(&self, qkv: &[Tensor; 3]) -> (Tensor, Tensor);

    /// Gradients of q, k and v in their shapes; `d_out` is `[N, H, D]`.
    fn backward(&self, kept: &Kept, d_out: &Tensor) -> [Tensor; 3];
}

/// What the backward pass needs: q `[N, H, D]`, k and v `[N, K, D]`, output `[N, H, D]`, and log-sums.
pub(crate) struct Kept {
    pub(crate) qkv: [Tensor; 3],
    pub(crate) out: Tensor,
    pub(crate) log_sums: Tensor,
}

/// In fp32 on the CPU.
#[derive(Debug)]
pub(crate) struct PaddedParts {
    causal: PaddedBatches,
    shared: Vec<SharedRows>,
}

/// # Shapes
/// - q: `[N, H, D]`, k and v: `[N, K, D]`; returns `[N, H * D]`.
pub(crate) fn forward(parts: &Rc<dyn Parts>, qkv: [Tensor; 3]) -> Tensor {
    let (n, h, d) = qkv[0].size3().expect("q is [N, H, D]");
    let detached = qkv.each_ref().map(Tensor::detach);
    let (out, log_sums) = tch::no_grad(|| parts.attend(&detached));
    // Detached: the graph knows it as the result of this function, not as a view of what is kept.
    let output = out.view([n, h * d]).detach();
    let kept = Kept { qkv: detached, out: out.view([n, h, d]), log_sums };
    let parts = Rc::clone(parts);
    let [output] = differentiable(&qkv.each_ref(), [output], move |mut grads| match grads.remove(0) {
        Some(d_out) => parts.backward(&kept, &d_out.reshape([n, h, d])).map(Some).into(),
        None => vec![None, None, None],
    });
    output
}

impl PaddedParts {
    pub(crate) fn new(pieces: Pieces) -> Self {
        let sequences: Vec<Vec<i64>> = pieces.rows.into_iter().map(Iterator::collect).collect();
        Self { causal: PaddedBatches::new(&sequences, pieces.num_rows, Device::Cpu), shared: pieces.shared }
    }
}

impl Parts for PaddedParts {
    /// Output `[N, H * D]` and log-sums `[N, H]`.
    fn attend(&self, qkv: &[Tensor; 3]) -> (Tensor, Tensor) {
        let (mut outputs, mut log_sums) = (Vec::new(), Vec::new());
        for batch in &self.causal.batches {
            let (out, log_sum) = flash(&qkv.each_ref().map(|x| batch.pad(x)), true);
            outputs.push(batch_rows(&out));
            log_sums.push(batch_rows(&log_sum.unsqueeze(-1)));
        }
        let (mut output, mut log_sums) = (self.causal.unpad(outputs), self.causal.unpad(log_sums));
        for shared in &self.shared {
            let (out, log_sum) = flash(&shared.views(qkv), false);
            let (other_out, other_log_sum) = (batch_rows(&out), batch_rows(&log_sum.unsqueeze(-1)));
            let [mut own_out, mut own_log_sum] = [&mut output, &mut log_sums].map(|all| shared.of_completions(all));
            merge_attention(
                f32_slice_mut(&mut own_out),
                f32_slice_mut(&mut own_log_sum),
                f32_slice(&other_out),
                f32_slice(&other_log_sum),
            );
        }
        (output, log_sums)
    }

    fn backward(&self, kept: &Kept, d_out: &Tensor) -> [Tensor; 3] {
        let all_log_sums = kept.log_sums.unsqueeze(-1); // [N, H, 1]
        let mut grads: [Vec<Tensor>; 3] = Default::default();
        for batch in &self.causal.batches {
            let qkv = kept.qkv.each_ref().map(|x| batch.pad(x));
            let d_out = batch.masked(d_out, 0.0);
            let log_sums = batch.masked(&all_log_sums, NO_WEIGHT).squeeze_dim(-1); // [S, H, T]
            let parts = flash_backward(&qkv, [&d_out, &batch.pad(&kept.out), &log_sums], true);
            grads.iter_mut().zip(parts).for_each(|(grads, part)| grads.push(batch_rows(&part)));
        }
        let mut index = 0;
        let grads = grads.map(|parts| {
            let whole = self.causal.unpad(parts).view_as(&kept.qkv[index]);
            index += 1;
            whole
        });
        for shared in &self.shared {
            let of_completions = |x: &Tensor| heads_first(&shared.of_completions(x));
            let log_sums = of_completions(&all_log_sums).squeeze_dim(-1); // [1, H, R]
            let parts = flash_backward(
                &shared.views(&kept.qkv),
                [&of_completions(d_out), &of_completions(&kept.out), &log_sums],
                false,
            );
            let mut targets =
                [shared.of_completions(&grads[0]), shared.of_prompt(&grads[1]), shared.of_prompt(&grads[2])];
            for (target, part) in targets.iter_mut().zip(parts) {
                *target += part.squeeze_dim(0).transpose(0, 1);
            }
        }
        grads
    }
}

impl PaddedBatch {
    /// As [`PaddedBatch::pad`], with padding set to `value`.
    fn masked(&self, x: &Tensor, value: f64) -> Tensor {
        let padded = self.pad(x);
        if let Some(padding) = &self.padding {
            // Rows of a padded batch lie one after the other: it was gathered just now.
            let mut rows = batch_rows(&padded);
            drop(rows.index_fill_(0, padding, value));
        }
        padded
    }
}

impl SharedRows {
    fn of_prompt(&self, x: &Tensor) -> Tensor {
        x.narrow(0, self.prompt.start, self.prompt.end - self.prompt.start)
    }

    fn of_completions(&self, x: &Tensor) -> Tensor {
        x.narrow(0, self.completions.start, self.completions.end - self.completions.start)
    }

    /// Queries of the completions, keys and values of the prompt.
    fn views(&self, [q, k, v]: &[Tensor; 3]) -> [Tensor; 3] {
        [self.of_completions(q), self.of_prompt(k), self.of_prompt(v)].map(|x| heads_first(&x))
    }
}

/// `[R, heads, D]` to `[1, heads, R, D]`.
fn heads_first(x: &Tensor) -> Tensor {
    x.transpose(0, 1).unsqueeze(0)
}

/// Output `[S, H, T, D]` and log-sums `[S, H, T]` of `[S, heads, T, D]`.
fn flash([q, k, v]: &[Tensor; 3], is_causal: bool) -> (Tensor, Tensor) {
    Tensor::internal_scaled_dot_product_flash_attention_for_cpu::<Tensor>(q, k, v, 0.0, is_causal, None, None)
}

/// Gradients of q, k and v; `[d_out, out, log_sums]` are over all keys.
fn flash_backward([q, k, v]: &[Tensor; 3], [d_out, out, log_sums]: [&Tensor; 3], is_causal: bool) -> [Tensor; 3] {
    Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward::<Tensor>(
        d_out, q, k, v, out, log_sums, 0.0, is_causal, None, None,
    )
    .into()
}
