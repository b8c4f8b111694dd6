//! Causal self-attention over packed sequences, some of which share a prompt, with libtorch's fused kernels.
//!
//! Completions of one prompt are packed behind a single copy of it. Where there is a kernel for it, their attention is
//! computed in two parts ([`crate::merged_attention`]): in bf16 and fp16 on a GPU over the packed rows themselves
//! ([`crate::varlen_attention`]), in fp32 on the CPU over padded batches. Everything else attends over whole sequences, for
//! which the prompt's rows are copied.
//!
//! In padded batches, sequences of similar length are padded for the attention alone; padding stands at the end, where a
//! causal mask hides it from every real token.

use std::ops::Range;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use crate::flash_attention::Flash;
use crate::kernels::cpu::training;
use crate::merged_attention::{self, PaddedParts, Parts};
use crate::tensor_data::{f32_slice, f32_slice_mut, i64_slice, to_device};
use crate::varlen_attention::VarlenParts;

/// How many tokens a prompt has and each completion that follows it in the pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupLengths {
    pub prompt: usize,
    pub completions: Vec<usize>,
}

/// How the packed rows of one micro-batch attend.
#[derive(Debug)]
pub struct PackedAttention(Method);

#[derive(Debug)]
enum Method {
    /// Over whole sequences, in padded batches.
    Whole(PaddedBatches),
    Merged(Rc<dyn Parts>),
}

/// Groups cut into prompts and completions.
#[derive(Debug)]
pub(crate) struct Pieces {
    /// Packed rows of every prompt and every completion; some may be empty.
    pub(crate) rows: Vec<Range<i64>>,
    /// Of the groups that have both.
    pub(crate) shared: Vec<SharedRows>,
    pub(crate) num_rows: usize,
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
    /// Plans for groups packed one after the other, whose queries have this type and heads this width.
    #[must_use]
    pub fn new(groups: &[GroupLengths], device: Device, kind: Kind, head_dim: i64) -> Self {
        let pieces = Pieces::new(groups);
        Self(if Flash::takes(device, kind, head_dim) {
            Method::Merged(Rc::new(VarlenParts::new(Flash, &pieces, device)))
        } else if device == Device::Cpu && kind == Kind::Float {
            Method::Merged(Rc::new(PaddedParts::new(pieces)))
        } else {
            Method::Whole(PaddedBatches::new(&whole_sequences(groups), pieces.num_rows, device))
        })
    }

    /// # Shapes
    /// - q: `[N, H, D]`, k and v: `[N, K, D]`; returns `[N, H * D]`.
    pub fn forward(&self, qkv: [Tensor; 3]) -> Tensor {
        let whole = match &self.0 {
            Method::Whole(whole) => whole,
            Method::Merged(parts) => return merged_attention::forward(parts, qkv),
        };
        let outputs: Vec<Tensor> = whole
            .batches
            .iter()
            .map(|batch| {
                let [q, k, v] = qkv.each_ref().map(|x| batch.pad(x));
                let attended = Tensor::scaled_dot_product_attention::<Tensor>(&q, &k, &v, None, 0.0, true, None, true);
                batch_rows(&attended) // [S * T, H * D]
            })
            .collect();
        whole.unpad(outputs) // [N, H * D]
    }
}

impl Pieces {
    pub(crate) fn new(groups: &[GroupLengths]) -> Self {
        let (mut rows, mut shared) = (Vec::new(), Vec::new());
        let mut start = 0_i64;
        for group in groups {
            let prompt = start..start + group.prompt as i64;
            start = prompt.end;
            rows.push(prompt.clone());
            for &length in &group.completions {
                rows.push(start..start + length as i64);
                start += length as i64;
            }
            if start > prompt.end && !prompt.is_empty() {
                shared.push(SharedRows { completions: prompt.end..start, prompt });
            }
        }
        Self { rows, shared, num_rows: start as usize }
    }
}

/// Packed rows of every completion behind those of its prompt, and of prompts that have none.
fn whole_sequences(groups: &[GroupLengths]) -> Vec<Vec<i64>> {
    let mut sequences = Vec::new();
    let mut start = 0_i64;
    for group in groups {
        let prompt = start..start + group.prompt as i64;
        start = prompt.end;
        if group.completions.is_empty() {
            sequences.push(prompt.clone().collect());
        }
        for &length in &group.completions {
            let completion = start..start + length as i64;
            start = completion.end;
            sequences.push(prompt.clone().chain(completion).collect());
        }
    }
    sequences
}

impl PaddedBatches {
    /// Sequences of packed rows, which may have rows in common; `num_rows` rows are packed.
    pub(crate) fn new(sequences: &[Vec<i64>], num_rows: usize, device: Device) -> Self {
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
                rows: to_device(&rows, device),
                padding: (!padding.is_empty()).then(|| to_device(&padding, device)),
            });
        }
        let inverse = (!is_identity(&inverse, num_padded_rows)).then(|| to_device(&inverse, device));
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
pub(crate) mod tests {
    use super::*;

    pub(crate) fn group(prompt: usize, completions: &[usize]) -> GroupLengths {
        GroupLengths { prompt, completions: completions.to_vec() }
    }

    /// Uneven groups, one without completions, one without a prompt, completions of equal and of no length.
    pub(crate) fn groups() -> Vec<GroupLengths> {
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

    /// Inputs that attention is compared on with the formula in f64 on the CPU.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Comparison {
        pub(crate) kind: Kind,
        pub(crate) device: Device,
        /// Of queries, and of keys and values.
        pub(crate) heads: [i64; 2],
        pub(crate) head_dim: i64,
    }

    impl Default for Comparison {
        fn default() -> Self {
            Self { kind: Kind::Float, device: Device::Cpu, heads: [4, 2], head_dim: 8 }
        }
    }

    impl Comparison {
        /// Output and gradients differ by less than `tolerance`, of the largest where that is above 1.
        #[track_caller]
        pub(crate) fn check(self, groups: &[GroupLengths], tolerance: f64, attention: impl Fn([Tensor; 3]) -> Tensor) {
            let Self { kind, device, heads: [h, kv], head_dim } = self;
            tch::manual_seed(1);
            let n: usize = groups.iter().map(|group| group.prompt + group.completions.iter().sum::<usize>()).sum();
            let random = |size: &[i64]| Tensor::randn(size, (Kind::Double, Device::Cpu)).to_kind(kind);
            let inputs = [h, kv, kv].map(|heads| random(&[n as i64, heads, head_dim]));
            let direction = random(&[n as i64, h * head_dim]);
            let run = |(kind, device): (Kind, Device), f: &dyn Fn(&[Tensor; 3]) -> Tensor| {
                let place = |x: &Tensor| x.to_kind(kind).to_device(device);
                let leaves = inputs.each_ref().map(|x| place(x).copy().set_requires_grad(true));
                let output = f(&leaves);
                let direction = place(&direction);
                let grads =
                    crate::autograd::grad(&[output.shallow_clone()], &leaves, &[Some(direction)], false).unwrap();
                let mut results = vec![output];
                results.extend(grads.into_iter().map(Option::unwrap));
                results
            };
            let ours = run((kind, device), &|leaves| attention(leaves.each_ref().map(Tensor::shallow_clone)));
            let theirs = run((Kind::Double, Device::Cpu), &|leaves| reference(groups, leaves));
            for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                let ours = ours.to_device(Device::Cpu).to_kind(Kind::Double);
                let largest = |x: &Tensor| x.abs().max().double_value(&[]);
                let difference = largest(&(ours - theirs)) / largest(theirs).max(1.0);
                assert!(difference < tolerance, "{self:?}, {groups:?}: result {index} differs by {difference}");
            }
        }
    }

    #[track_caller]
    fn check(groups: &[GroupLengths], kind: Kind, tolerance: f64) {
        let plan = PackedAttention::new(groups, Device::Cpu, kind, 8);
        assert_eq!(matches!(plan.0, Method::Merged(_)), kind == Kind::Float);
        Comparison { kind, ..Comparison::default() }.check(groups, tolerance, |qkv| plan.forward(qkv));
    }

    #[test]
    fn forward_and_gradients_equal_the_formula() {
        check(&groups(), Kind::Double, 1e-10);
        check(&[3, 17, 1, 9, 9, 40].map(|length| group(length, &[])), Kind::Double, 1e-10);
    }

    #[test]
    fn merged_attention_equals_the_formula() {
        check(&groups(), Kind::Float, 1e-5);
        check(&[3, 17, 1, 9, 9, 40].map(|length| group(length, &[])), Kind::Float, 1e-5);
        check(&[group(700, &[600, 3, 520])], Kind::Float, 2e-5);
        check(&[group(12, &[])], Kind::Float, 1e-5);
    }
}
