//! Log-probs of tokens from hidden states, without ever holding all logits.

use tch::{Kind, Tensor};

/// Bytes of logits that one chunk may take.
const CHUNK_BYTES: i64 = 64 << 20;

/// Rows of hidden states whose logits fit a chunk.
#[must_use]
pub fn chunk_rows(vocab_size: i64) -> i64 {
    (CHUNK_BYTES / (4 * vocab_size)).max(1)
}

/// Log-softmax of a chunk's logits in fp32.
///
/// # Shapes
/// - hidden: `[M, C]`, head: `[V, C]`; returns `[M, V]`.
pub fn log_softmax(hidden: &Tensor, head: &Tensor, temperature: f64) -> Tensor {
    let logits = hidden.linear::<&Tensor>(head, None); // [M, V]
    let logits = if temperature == 1.0 { logits } else { logits / temperature };
    logits.log_softmax(-1, Kind::Float)
}

/// Log-prob of each row's target token. No gradient flows.
///
/// # Shapes
/// - hidden: `[M, C]` after the final norm, head: `[V, C]`, targets: `[M]` i64; returns `[M]` fp32.
pub fn token_logprobs(hidden: &Tensor, head: &Tensor, targets: &Tensor, temperature: f64) -> Tensor {
    tch::no_grad(|| {
        let rows = chunk_rows(head.size()[0]);
        let num_rows = hidden.size()[0];
        let chunks: Vec<Tensor> = (0..num_rows)
            .step_by(rows as usize)
            .map(|start| {
                let rows = rows.min(num_rows - start);
                let logprobs = log_softmax(&hidden.narrow(0, start, rows), head, temperature);
                logprobs.gather(1, &targets.narrow(0, start, rows).unsqueeze(1), false).squeeze_dim(1)
            })
            .collect();
        if chunks.is_empty() { Tensor::zeros([0], (Kind::Float, hidden.device())) } else { Tensor::cat(&chunks, 0) }
    })
}
