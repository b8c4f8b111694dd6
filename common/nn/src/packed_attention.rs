//! Causal self-attention over packed sequences with libtorch's fused kernels.
//!
//! libtorch has no variable-length kernel on CPU, so sequences of similar length are padded into a batch for the
//! attention alone; padding stands at the end, where a causal mask hides it from every real token.

use tch::{Device, Tensor};

/// How the packed rows of one micro-batch become padded batches and come back.
#[derive(Debug)]
pub struct PackedAttention {
    batches: Vec<PaddedBatch>,
    /// `[N]`, row of each packed token among the rows of all padded batches.
    inverse: Tensor,
}

#[derive(Debug)]
struct PaddedBatch {
    num_sequences: i64,
    padded_length: i64,
    /// `[num_sequences * padded_length]`, packed row of each padded one; padding repeats the first row.
    rows: Tensor,
}

impl PackedAttention {
    /// Plans for sequences of the given lengths, packed one after the other.
    #[must_use]
    pub fn new(lengths: &[usize], device: Device) -> Self {
        let starts: Vec<usize> =
            lengths.iter().scan(0, |end, length| Some(std::mem::replace(end, *end + length))).collect();
        let mut inverse = vec![0_i64; lengths.iter().sum()];
        let mut num_padded_rows = 0;
        let mut batches = Vec::new();
        for indices in similar_lengths(lengths) {
            let padded_length = lengths[indices[0]];
            let mut rows = Vec::with_capacity(indices.len() * padded_length);
            for &index in &indices {
                for offset in 0..padded_length {
                    if offset < lengths[index] {
                        inverse[starts[index] + offset] = (num_padded_rows + rows.len()) as i64;
                        rows.push((starts[index] + offset) as i64);
                    } else {
                        rows.push(starts[index] as i64);
                    }
                }
            }
            num_padded_rows += rows.len();
            batches.push(PaddedBatch {
                num_sequences: indices.len() as i64,
                padded_length: padded_length as i64,
                rows: Tensor::from_slice(&rows).to_device(device),
            });
        }
        Self { batches, inverse: Tensor::from_slice(&inverse).to_device(device) }
    }

    /// # Shapes
    /// - q: `[N, H, D]`, k and v: `[N, K, D]`; returns `[N, H * D]`.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (n, h, d) = q.size3().expect("q is [N, H, D]");
        let outputs: Vec<Tensor> = self
            .batches
            .iter()
            .map(|batch| {
                let [q, k, v] = [q, k, v].map(|x| batch.pad(x));
                Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, None, true) // [S, H, T, D]
                    .transpose(1, 2) // [S, T, H, D]
                    .reshape([-1, h * d])
            })
            .collect();
        let rows = Tensor::cat(&outputs, 0);
        gather_rows(&rows, &self.inverse).view([n, h * d])
    }
}

impl PaddedBatch {
    /// `[N, heads, D]` to `[S, heads, T, D]`.
    fn pad(&self, x: &Tensor) -> Tensor {
        let (n, heads, d) = x.size3().expect("heads are [N, heads, D]");
        gather_rows(&x.reshape([n, heads * d]), &self.rows)
            .view([self.num_sequences, self.padded_length, heads, d])
            .transpose(1, 2)
    }
}

/// Rows of `[R, C]`, as an embedding look-up: its backward on CPU is far faster than `index_select`'s.
fn gather_rows(x: &Tensor, rows: &Tensor) -> Tensor {
    Tensor::embedding(x, rows, -1, false, false)
}

/// Sequences in batches, longest first, in which padding at most doubles the shortest.
fn similar_lengths(lengths: &[usize]) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> = (0..lengths.len()).filter(|&index| lengths[index] > 0).collect();
    longest_first.sort_by_key(|&index| (std::cmp::Reverse(lengths[index]), index));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for index in longest_first {
        match batches.last_mut() {
            Some(batch) if 2 * lengths[index] >= lengths[batch[0]] => batch.push(index),
            _ => batches.push(vec![index]),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// softmax(q k^T / sqrt(D) + causal mask) v, sequence by sequence, by the formula.
    fn reference(lengths: &[usize], q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (_, h, d) = q.size3().unwrap();
        let repeat = h / k.size()[1];
        let mut start = 0;
        let mut outputs = Vec::new();
        for &length in lengths {
            let length = length as i64;
            let part = |x: &Tensor| x.narrow(0, start, length).transpose(0, 1); // [heads, T, D]
            let (k, v) = (
                part(k).repeat_interleave_self_int(repeat, 0, None),
                part(v).repeat_interleave_self_int(repeat, 0, None),
            );
            let scores = part(q).matmul(&k.transpose(1, 2)) / (d as f64).sqrt();
            let mask = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).triu(1);
            let weights = scores.masked_fill(&mask, f64::NEG_INFINITY).softmax(-1, Kind::Double);
            outputs.push(weights.matmul(&v).transpose(0, 1).reshape([length, h * d]));
            start += length;
        }
        Tensor::cat(&outputs, 0)
    }

    #[test]
    fn forward_and_gradients_equal_the_formula() {
        tch::manual_seed(1);
        let lengths = [3, 17, 1, 9, 9, 40];
        let n: usize = lengths.iter().sum();
        let leaf =
            |heads: i64| Tensor::randn([n as i64, heads, 8], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let inputs = [leaf(4), leaf(2), leaf(2)];
        let direction = Tensor::randn([n as i64, 32], (Kind::Double, Device::Cpu));
        let run = |f: &dyn Fn(&[Tensor; 3]) -> Tensor| {
            let output = f(&inputs);
            let grads = Tensor::run_backward(&[(&output * &direction).sum(Kind::Double)], &inputs, false, false);
            (output, grads)
        };
        let (ours, our_grads) = run(&|[q, k, v]| PackedAttention::new(&lengths, Device::Cpu).forward(q, k, v));
        let (theirs, their_grads) = run(&|[q, k, v]| reference(&lengths, q, k, v));
        assert!(f64::try_from((ours - theirs).abs().max()).unwrap() < 1e-10);
        for (ours, theirs) in our_grads.iter().zip(&their_grads) {
            assert!(f64::try_from((ours - theirs).abs().max()).unwrap() < 1e-10);
        }
    }
}
