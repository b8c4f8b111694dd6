//! Causal self-attention over packed sequences, some of which share a prompt, with libtorch's fused kernels.
//!
//! libtorch has no variable-length kernel on CPU, so sequences of similar length are padded into a batch for the
//! attention alone; padding stands at the end, where a causal mask hides it from every real token.
//!
//! Completions of one prompt are packed behind a single copy of it. Either their attention is computed over whole
//! sequences, for which the prompt's rows are copied; or, in fp32 on the CPU, in two parts ([`crate::merged_attention`]).

use std::ops::Range;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use crate::kernels::cpu::training;
use crate::merged_attention;
use crate::tensor_data::{f32_slice, f32_slice_mut, i64_slice};

/// How many tokens a prompt has and each completion that follows it in the pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupLengths {
    pub prompt: usize,
    pub completions: Vec<usize>,
}

/// How the packed rows of one micro-batch become padded batches and come back.
#[derive(Debug)]
pub struct PackedAttention {
    /// Whole sequences, or where attention is merged, prompts and completions each for itself.
    pub(crate) causal: PaddedBatches,
    /// What completions also see; empty unless attention is merged.
    pub(crate) shared: Vec<SharedRows>,
    is_merged: bool,
}

/// Packed rows of a prompt and of all completions that see it.
#[derive(Debug)]
pub(crate) struct SharedRows {
    pub(crate) prompt: Range<i64>,
    pub(crate) completions: Range<i64>,
}

/// Sequences of packed rows, in batches.
#[derive(Debug)]
pub(crate) struct PaddedBatches {
    pub(crate) batches: Vec<PaddedBatch>,
    /// `[N]`, row of each packed token among the rows of all padded batches; None where they are equal.
    inverse: Option<Tensor>,
}

#[derive(Debug)]
pub(crate) struct PaddedBatch {
    num_sequences: i64,
    padded_length: i64,
    /// `[num_sequences * padded_length]`, packed row of each padded one; padding repeats the first row.
    rows: Tensor,
    /// Which of them are padding, where any are.
    pub(crate) padding: Option<Tensor>,
    /// The rows are those of the whole pack in their order.
    is_identity: bool,
}

impl PackedAttention {
    /// Plans for groups packed one after the other. `is_merged` chooses attention in two parts, in fp32 on the CPU.
    #[must_use]
    pub fn new(groups: &[GroupLengths], device: Device, is_merged: bool) -> Self {
        let (mut sequences, mut shared) = (Vec::new(), Vec::new());
        let mut start = 0_i64;
        for group in groups {
            let prompt = start..start + group.prompt as i64;
            start = prompt.end;
            if is_merged || group.completions.is_empty() {
                sequences.push(prompt.clone().collect::<Vec<i64>>());
            }
            for &length in &group.completions {
                let completion = start..start + length as i64;
                start = completion.end;
                let seen = if is_merged { 0..0 } else { prompt.clone() };
                sequences.push(seen.chain(completion).collect());
            }
            if is_merged && start > prompt.end && !prompt.is_empty() {
                shared.push(SharedRows { completions: prompt.end..start, prompt });
            }
        }
        Self { causal: PaddedBatches::new(&sequences, start as usize, device), shared, is_merged }
    }

    /// # Shapes
    /// - q: `[N, H, D]`, k and v: `[N, K, D]`; returns `[N, H * D]`.
    pub fn forward(self: &Rc<Self>, qkv: [Tensor; 3]) -> Tensor {
        if self.is_merged {
            return merged_attention::forward(self, qkv);
        }
        let outputs: Vec<Tensor> = self
            .causal
            .batches
            .iter()
            .map(|batch| {
                let [q, k, v] = qkv.each_ref().map(|x| batch.pad(x));
                let attended = Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, None, true);
                batch_rows(&attended) // [S * T, H * D]
            })
            .collect();
        self.causal.unpad(outputs) // [N, H * D]
    }
}

impl PaddedBatches {
    /// Sequences of packed rows, which may have rows in common; `num_rows` rows are packed.
    fn new(sequences: &[Vec<i64>], num_rows: usize, device: Device) -> Self {
        let mut inverse = vec![-1_i64; num_rows];
        let mut num_padded_rows = 0;
        let mut batches = Vec::new();
        for indices in similar_lengths(sequences) {
            let padded_length = sequences[indices[0]].len();
            let (mut rows, mut padding) = (Vec::with_capacity(indices.len() * padded_length), Vec::new());
            for &index in &indices {
                for offset in 0..padded_length {
                    if let Some(&row) = sequences[index].get(offset) {
                        // A row of several sequences has the same neighbours in each: any of its results will do.
                        if inverse[row as usize] < 0 {
                            inverse[row as usize] = (num_padded_rows + rows.len()) as i64;
                        }
                        rows.push(row);
                    } else {
                        padding.push(rows.len() as i64);
                        rows.push(sequences[index][0]);
                    }
                }
            }
            num_padded_rows += rows.len();
            batches.push(PaddedBatch {
                num_sequences: indices.len() as i64,
                padded_length: padded_length as i64,
                is_identity: is_identity(&rows, num_rows),
                rows: Tensor::from_slice(&rows).to_device(device),
                padding: (!padding.is_empty()).then(|| Tensor::from_slice(&padding).to_device(device)),
            });
        }
        let inverse = (!is_identity(&inverse, num_padded_rows)).then(|| Tensor::from_slice(&inverse).to_device(device));
        Self { batches, inverse }
    }

    /// `[S * T, width]` of every batch to `[N, width]`.
    pub(crate) fn unpad(&self, mut rows: Vec<Tensor>) -> Tensor {
        let rows = if rows.len() == 1 { rows.remove(0) } else { Tensor::cat(&rows, 0) };
        match &self.inverse {
            Some(inverse) => gather_rows(&rows, inverse),
            None => rows,
        }
    }
}

impl PaddedBatch {
    /// `[N, heads, D]` to `[S, heads, T, D]`.
    pub(crate) fn pad(&self, x: &Tensor) -> Tensor {
        let (n, heads, d) = x.size3().expect("heads are [N, heads, D]");
        let rows = x.reshape([n, heads * d]);
        let rows = if self.is_identity { rows } else { gather_rows(&rows, &self.rows) };
        rows.view([self.num_sequences, self.padded_length, heads, d]).transpose(1, 2)
    }
}

/// `[S, heads, T, D]` to `[S * T, heads * D]`.
pub(crate) fn batch_rows(x: &Tensor) -> Tensor {
    let (s, heads, t, d) = x.size4().expect("a padded batch is [S, heads, T, D]");
    x.transpose(1, 2).reshape([s * t, heads * d])
}

fn is_identity(rows: &[i64], num_rows: usize) -> bool {
    rows.len() == num_rows && rows.iter().zip(0..).all(|(&row, index)| row == index)
}

/// Rows of `[R, C]`.
fn gather_rows(x: &Tensor, rows: &Tensor) -> Tensor {
    if x.kind() == Kind::Float && x.device() == Device::Cpu && !x.requires_grad() {
        let mut out = Tensor::empty([rows.size()[0], x.size()[1]], (Kind::Float, Device::Cpu));
        training::gather_rows(f32_slice(&x.contiguous()), i64_slice(rows), f32_slice_mut(&mut out));
        return out;
    }
    // An embedding's backward pass on the CPU is far faster than that of `index_select`.
    Tensor::embedding(x, rows, -1, false, false)
}

/// Sequences in batches, longest first, in which padding at most doubles the shortest.
fn similar_lengths(sequences: &[Vec<i64>]) -> Vec<Vec<usize>> {
    let length = |index: usize| sequences[index].len();
    let mut longest_first: Vec<usize> = (0..sequences.len()).filter(|&index| length(index) > 0).collect();
    longest_first.sort_by_key(|&index| (std::cmp::Reverse(length(index)), index));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for index in longest_first {
        match batches.last_mut() {
            Some(batch) if 2 * length(index) >= length(batch[0]) => batch.push(index),
            _ => batches.push(vec![index]),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(prompt: usize, completions: &[usize]) -> GroupLengths {
        GroupLengths { prompt, completions: completions.to_vec() }
    }

    /// Uneven groups, one without completions, one without a prompt, completions of equal and of no length.
    fn groups() -> Vec<GroupLengths> {
        let groups = [(3, vec![17, 1, 9]), (40, vec![]), (9, vec![9, 9]), (0, vec![5]), (2, vec![0, 30])];
        groups.map(|(prompt, completions)| group(prompt, &completions)).into()
    }

    /// softmax(q k^T / sqrt(D) + mask) v by the formula; a completion sees its prompt and itself, causally.
    fn reference(groups: &[GroupLengths], qkv: &[Tensor; 3]) -> Tensor {
        let (n, h, d) = qkv[0].size3().unwrap();
        let repeat = h / qkv[1].size()[1];
        let mask = Tensor::ones([n, n], (Kind::Bool, Device::Cpu));
        let mut start = 0;
        for group in groups {
            let prompt = start;
            start += group.prompt as i64;
            let causal = |len: i64| Tensor::ones([len, len], (Kind::Bool, Device::Cpu)).triu(1);
            let block =
                |row: i64, rows: i64, column: i64, columns: i64| mask.narrow(0, row, rows).narrow(1, column, columns);
            let length = group.prompt as i64;
            block(prompt, length, prompt, length).copy_(&causal(length));
            for &own in &group.completions {
                let own = own as i64;
                drop(block(start, own, prompt, length).fill_(0));
                block(start, own, start, own).copy_(&causal(own));
                start += own;
            }
        }
        let heads = |x: &Tensor| x.transpose(0, 1); // [heads, N, D]
        let [k, v] = [&qkv[1], &qkv[2]].map(|x| heads(x).repeat_interleave_self_int(repeat, 0, None));
        let scores = heads(&qkv[0]).matmul(&k.transpose(1, 2)) / (d as f64).sqrt();
        let weights = scores.masked_fill(&mask, f64::NEG_INFINITY).softmax(-1, None);
        weights.matmul(&v).transpose(0, 1).reshape([n, h * d])
    }

    #[track_caller]
    fn check(groups: &[GroupLengths], kind: Kind, is_merged: bool, tolerance: f64) {
        tch::manual_seed(1);
        let n: usize = groups.iter().map(|group| group.prompt + group.completions.iter().sum::<usize>()).sum();
        let random = |heads: i64| Tensor::randn([n as i64, heads, 8], (kind, Device::Cpu));
        let inputs = [random(4), random(2), random(2)];
        let direction = Tensor::randn([n as i64, 32], (kind, Device::Cpu));
        let run = |kind: Kind, f: &dyn Fn(&[Tensor; 3]) -> Tensor| {
            let leaves = inputs.each_ref().map(|x| x.to_kind(kind).copy().set_requires_grad(true));
            let output = f(&leaves);
            let loss = (&output * direction.to_kind(kind)).sum(kind);
            let grads = crate::autograd::grad(&[loss], &leaves, &[None], false).unwrap();
            let mut results = vec![output];
            results.extend(grads.into_iter().map(Option::unwrap));
            results
        };
        let plan = Rc::new(PackedAttention::new(groups, Device::Cpu, is_merged));
        let ours = run(kind, &|leaves| plan.forward(leaves.each_ref().map(Tensor::shallow_clone)));
        let theirs = run(Kind::Double, &|leaves| reference(groups, leaves));
        for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            let difference = f64::try_from((ours.to_kind(Kind::Double) - theirs).abs().max()).unwrap();
            assert!(difference < tolerance, "{groups:?}: result {index} differs by {difference}");
        }
    }

    #[test]
    fn forward_and_gradients_equal_the_formula() {
        check(&groups(), Kind::Double, false, 1e-10);
        check(&[3, 17, 1, 9, 9, 40].map(|length| group(length, &[])), Kind::Double, false, 1e-10);
    }

    #[test]
    fn merged_attention_equals_the_formula() {
        check(&groups(), Kind::Float, true, 1e-5);
        check(&[3, 17, 1, 9, 9, 40].map(|length| group(length, &[])), Kind::Float, true, 1e-5);
        check(&[group(700, &[600, 3, 520])], Kind::Float, true, 2e-5);
        check(&[group(12, &[])], Kind::Float, true, 1e-5);
    }
}
