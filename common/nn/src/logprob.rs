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

/// Entropy of each row's distribution, in nats.
///
/// # Shapes
/// - logprobs: `[M, V]`; returns `[M]`.
pub fn token_entropies(logprobs: &Tensor) -> Tensor {
    -(logprobs.exp() * logprobs).sum_dim_intlist(-1, false, Kind::Float)
}

/// Log-prob of each row's target token. No gradient flows.
///
/// # Shapes
/// - hidden: `[M, C]` after the final norm, head: `[V, C]`, targets: `[M]` i64; returns `[M]` fp32.
pub fn token_logprobs(hidden: &Tensor, head: &Tensor, targets: &Tensor, temperature: f64) -> Tensor {
    let [logprobs] =
        by_chunks(hidden, head, temperature, |all, start, len| [choose(all, &targets.narrow(0, start, len))]);
    logprobs
}

/// Log-prob of each row's target token, and the entropy of the row. No gradient flows.
///
/// # Shapes
/// - as [`token_logprobs`]; returns `[M]` fp32 twice.
pub fn token_statistics(hidden: &Tensor, head: &Tensor, targets: &Tensor, temperature: f64) -> (Tensor, Tensor) {
    let [logprobs, entropies] = by_chunks(hidden, head, temperature, |all, start, len| {
        [choose(all, &targets.narrow(0, start, len)), token_entropies(all)]
    });
    (logprobs, entropies)
}

fn choose(all: &Tensor, targets: &Tensor) -> Tensor {
    all.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1)
}

/// Applies `what` to the log-softmax of every chunk, given the chunk's first row and length, and joins the results.
fn by_chunks<const N: usize>(
    hidden: &Tensor,
    head: &Tensor,
    temperature: f64,
    what: impl Fn(&Tensor, i64, i64) -> [Tensor; N],
) -> [Tensor; N] {
    tch::no_grad(|| {
        let rows = chunk_rows(head.size()[0]);
        let num_rows = hidden.size()[0];
        let mut parts: [Vec<Tensor>; N] = std::array::from_fn(|_| Vec::new());
        for start in (0..num_rows).step_by(rows as usize) {
            let rows = rows.min(num_rows - start);
            let all = log_softmax(&hidden.narrow(0, start, rows), head, temperature);
            for (parts, part) in parts.iter_mut().zip(what(&all, start, rows)) {
                parts.push(part);
            }
        }
        parts.map(|parts| match parts.as_slice() {
            [] => Tensor::zeros([0], (Kind::Float, hidden.device())),
            parts => Tensor::cat(parts, 0),
        })
    })
}
