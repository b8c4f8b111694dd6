//! Attention in two parts ([`crate::merged_attention`]) by a kernel that takes sequences of any length: packed rows stay as
//! they are, without padding.
//!
//! For the part over prompts, rows of completions and of prompts are gathered: its queries and keys are then sequences that
//! follow one another without gaps, as the kernel wants them.

use std::fmt::Debug;
use std::ops::Range;

use tch::{Device, Tensor};

use crate::merged_attention::{Kept, Parts};
use crate::packed_attention::{Pieces, SharedRows};
use crate::tensor_data::to_device;

/// Attention of sequences that lie one after the other, each over keys of its own.
pub(crate) trait VarlenKernel: Debug {
    /// Output `[Nq, H, D]`, and log-sums of exponentials of the scaled scores, `[H, Nq]`.
    ///
    /// # Shapes
    /// - q: `[Nq, H, D]`, k and v: `[Nk, K, D]`; `K` divides `H`.
    fn forward(&self, qkv: &[Tensor; 3], sequences: &Sequences) -> (Tensor, Tensor);

    /// Gradients of q, k and v in their shapes. `[d_out, out, log_sums]` have the shapes of [`Self::forward`] and may be over
    /// more keys than those of `sequences`.
    fn backward(&self, qkv: &[Tensor; 3], outputs: [&Tensor; 3], sequences: &Sequences) -> [Tensor; 3];
}

/// Where sequences begin among the rows of queries and of keys. At least one, none empty.
#[derive(Debug)]
pub(crate) struct Sequences {
    /// `[S + 1]`, i32, on the device: 0 to `Nq`.
    pub(crate) query_starts: Tensor,
    /// `[S + 1]`, i32, on the device: 0 to `Nk`.
    pub(crate) key_starts: Tensor,
    pub(crate) max_queries: i64,
    pub(crate) max_keys: i64,
    /// Every query sees the keys up to its own; there are as many of both.
    pub(crate) is_causal: bool,
}

/// The two parts of a micro-batch.
#[derive(Debug)]
pub(crate) struct VarlenParts<K> {
    kernel: K,
    /// Every prompt and every completion for itself.
    pieces: Sequences,
    /// None where no completion follows a prompt.
    shared: Option<SharedPart>,
}

/// The completions of every group, as one run of queries, over their prompt.
#[derive(Debug)]
struct SharedPart {
    sequences: Sequences,
    /// `[R]`, their packed rows.
    completion_rows: Tensor,
    /// `[P]`, packed rows of the prompts.
    prompt_rows: Tensor,
}

impl<K: VarlenKernel> VarlenParts<K> {
    pub(crate) fn new(kernel: K, pieces: &Pieces, device: Device) -> Self {
        let own: Vec<i64> = pieces.rows.iter().map(len).filter(|&len| len > 0).collect();
        let shared = (!pieces.shared.is_empty()).then(|| SharedPart::new(&pieces.shared, device));
        Self { kernel, pieces: Sequences::new([&own, &own], true, device), shared }
    }
}

impl<K: VarlenKernel> Parts for VarlenParts<K> {
    fn attend(&self, qkv: &[Tensor; 3]) -> (Tensor, Tensor) {
        let (mut out, mut log_sums) = self.kernel.forward(qkv, &self.pieces);
        if let Some(shared) = &self.shared {
            let other = self.kernel.forward(&shared.heads(qkv), &shared.sequences);
            let own = (shared.of_completions(&out), shared.log_sums(&log_sums));
            let (merged, merged_log_sums) = merge(&own, &other);
            drop(out.index_copy_(0, &shared.completion_rows, &merged.to_kind(out.kind())));
            drop(log_sums.index_copy_(1, &shared.completion_rows, &merged_log_sums));
        }
        (out, log_sums)
    }

    fn backward(&self, kept: &Kept, d_out: &Tensor) -> [Tensor; 3] {
        let Kept { qkv, out, log_sums } = kept;
        let mut grads = self.kernel.backward(qkv, [d_out, out, log_sums], &self.pieces);
        if let Some(shared) = &self.shared {
            let [d_out, out] = [d_out, out].map(|x| shared.of_completions(x));
            let outputs = [&d_out, &out, &shared.log_sums(log_sums)];
            let parts = self.kernel.backward(&shared.heads(qkv), outputs, &shared.sequences);
            let rows = [&shared.completion_rows, &shared.prompt_rows, &shared.prompt_rows];
            for ((grad, part), rows) in grads.iter_mut().zip(parts).zip(rows) {
                // Rows are different ones: no atomic sums are needed, which `index_add_` has.
                let sum = grad.index_select(0, rows) + part;
                drop(grad.index_copy_(0, rows, &sum));
            }
        }
        grads
    }
}

impl SharedPart {
    fn new(shared: &[SharedRows], device: Device) -> Self {
        let rows = |part: fn(&SharedRows) -> &Range<i64>| {
            let rows: Vec<i64> = shared.iter().flat_map(|shared| part(shared).clone()).collect();
            to_device(&rows, device)
        };
        let lengths = |part: fn(&SharedRows) -> &Range<i64>| shared.iter().map(part).map(len).collect::<Vec<_>>();
        let (queries, keys) = (lengths(|shared| &shared.completions), lengths(|shared| &shared.prompt));
        Self {
            sequences: Sequences::new([&queries, &keys], false, device),
            completion_rows: rows(|shared| &shared.completions),
            prompt_rows: rows(|shared| &shared.prompt),
        }
    }

    /// `[N, H, D]` to `[R, H, D]`.
    fn of_completions(&self, x: &Tensor) -> Tensor {
        x.index_select(0, &self.completion_rows)
    }

    /// `[H, N]` to `[H, R]`.
    fn log_sums(&self, x: &Tensor) -> Tensor {
        x.index_select(1, &self.completion_rows)
    }

    /// Queries of the completions, keys and values of the prompts.
    fn heads(&self, [q, k, v]: &[Tensor; 3]) -> [Tensor; 3] {
        let of_prompts = |x: &Tensor| x.index_select(0, &self.prompt_rows);
        [self.of_completions(q), of_prompts(k), of_prompts(v)]
    }
}

impl Sequences {
    fn new([queries, keys]: [&[i64]; 2], is_causal: bool, device: Device) -> Self {
        let starts = |lengths: &[i64]| {
            let mut end = 0;
            let ends = lengths.iter().map(|length| {
                end += length;
                i32::try_from(end).expect("a micro-batch has fewer than 2^31 tokens")
            });
            let starts: Vec<i32> = std::iter::once(0).chain(ends).collect();
            to_device(&starts, device)
        };
        let longest = |lengths: &[i64]| lengths.iter().copied().max().unwrap_or(0);
        Self {
            query_starts: starts(queries),
            key_starts: starts(keys),
            max_queries: longest(queries),
            max_keys: longest(keys),
            is_causal,
        }
    }
}

/// Outputs `[R, H, D]` and log-sums `[H, R]` over the keys of both; computed in the type of the log-sums.
fn merge((own, own_log_sums): &(Tensor, Tensor), (other, other_log_sums): &(Tensor, Tensor)) -> (Tensor, Tensor) {
    let log_sums = own_log_sums.logaddexp(other_log_sums); // [H, R]
    let share = |part: &Tensor| (part - &log_sums).exp().tr().unsqueeze(-1); // [R, H, 1]
    (own * share(own_log_sums) + other * share(other_log_sums), log_sums)
}

fn len(rows: &Range<i64>) -> i64 {
    rows.end - rows.start
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use tch::Kind;

    use super::*;
    use crate::flash_attention::Flash;
    use crate::merged_attention;
    use crate::packed_attention::tests::{Comparison, group, groups};
    use crate::packed_attention::{GroupLengths, PackedAttention};

    /// By the formulas, a sequence at a time.
    #[derive(Debug)]
    struct Formula;

    /// One sequence of both passes, heads first and repeated: `[H, T, D]`.
    struct Sequence {
        queries: (i64, i64),
        keys: (i64, i64),
        qkv: [Tensor; 3],
        /// `[H, Tq, Tk]`, scaled and masked.
        scores: Tensor,
    }

    impl Formula {
        fn sequences(qkv: &[Tensor; 3], sequences: &Sequences) -> Vec<Sequence> {
            let starts = |starts: &Tensor| Vec::<i32>::try_from(starts).unwrap();
            let (query_starts, key_starts) = (starts(&sequences.query_starts), starts(&sequences.key_starts));
            assert_eq!((query_starts.len(), query_starts[0], key_starts[0]), (key_starts.len(), 0, 0));
            assert_eq!(
                query_starts.last().map(|&end| i64::from(end)),
                Some(qkv[0].size()[0]),
                "every query has a place"
            );
            assert_eq!(key_starts.last().map(|&end| i64::from(end)), Some(qkv[1].size()[0]), "every key has a place");
            let (_, h, d) = qkv[0].size3().unwrap();
            let repeat = h / qkv[1].size()[1];
            query_starts
                .windows(2)
                .zip(key_starts.windows(2))
                .map(|(queries, keys)| {
                    let [queries, keys] = [queries, keys].map(|at| (i64::from(at[0]), i64::from(at[1] - at[0])));
                    assert!(
                        (1..=sequences.max_queries).contains(&queries.1) && (1..=sequences.max_keys).contains(&keys.1)
                    );
                    let heads = |x: &Tensor, (start, len): (i64, i64)| x.narrow(0, start, len).transpose(0, 1);
                    let [k, v] = [&qkv[1], &qkv[2]].map(|x| heads(x, keys).repeat_interleave_self_int(repeat, 0, None));
                    let q = heads(&qkv[0], queries);
                    let mut scores = q.matmul(&k.transpose(1, 2)) / (d as f64).sqrt();
                    if sequences.is_causal {
                        assert_eq!(queries, keys);
                        let later = Tensor::ones([queries.1, keys.1], (Kind::Bool, q.device())).triu(1);
                        scores = scores.masked_fill(&later, f64::NEG_INFINITY);
                    }
                    Sequence { queries, keys, qkv: [q, k, v], scores }
                })
                .collect()
        }
    }

    impl VarlenKernel for Formula {
        fn forward(&self, qkv: &[Tensor; 3], sequences: &Sequences) -> (Tensor, Tensor) {
            let parts =
                Self::sequences(qkv, sequences).into_iter().map(|Sequence { qkv: [_, _, v], scores, .. }| {
                    (scores.softmax(-1, None).matmul(&v).transpose(0, 1), scores.logsumexp([-1], false))
                });
            let (outputs, log_sums): (Vec<Tensor>, Vec<Tensor>) = parts.unzip();
            (Tensor::cat(&outputs, 0), Tensor::cat(&log_sums, 1))
        }

        fn backward(
            &self,
            qkv: &[Tensor; 3],
            [d_out, out, log_sums]: [&Tensor; 3],
            sequences: &Sequences,
        ) -> [Tensor; 3] {
            let grads = qkv.each_ref().map(Tensor::zeros_like);
            let scale = 1.0 / (qkv[0].size()[2] as f64).sqrt();
            for Sequence { queries, keys, qkv: [q, k, v], scores } in Self::sequences(qkv, sequences) {
                let rows = |x: &Tensor| x.narrow(0, queries.0, queries.1).transpose(0, 1); // [H, Tq, D]
                let weights = (scores - log_sums.narrow(1, queries.0, queries.1).unsqueeze(-1)).exp();
                let (d_out, out) = (rows(d_out), rows(out));
                let d_weights = d_out.matmul(&v.transpose(1, 2));
                let dot = (&d_out * out).sum_dim_intlist(-1, true, None); // [H, Tq, 1]
                let d_scores = &weights * (d_weights - dot) * scale;
                let parts =
                    [d_scores.matmul(&k), d_scores.transpose(1, 2).matmul(&q), weights.transpose(1, 2).matmul(&d_out)];
                for ((grad, part), (start, len)) in grads.iter().zip(parts).zip([queries, keys, keys]) {
                    let (_, heads, d) = grad.size3().unwrap();
                    // Heads that share keys are neighbours.
                    let sum = part.view([heads, -1, len, d]).sum_dim_intlist(1, false, None);
                    let mut target = grad.narrow(0, start, len);
                    target += sum.transpose(0, 1);
                }
            }
            grads
        }
    }

    fn parts<K: VarlenKernel + 'static>(kernel: K, groups: &[GroupLengths], device: Device) -> Rc<dyn Parts> {
        Rc::new(VarlenParts::new(kernel, &Pieces::new(groups), device))
    }

    #[test]
    fn two_parts_over_packed_rows_equal_the_formula() {
        for groups in [
            groups(),
            vec![group(12, &[])],
            vec![group(0, &[3, 0, 1])],
            vec![group(1, &[1, 1, 1]), group(1, &[1])],
            [3, 17, 1, 9].map(|length| group(length, &[])).into(),
        ] {
            let parts = parts(Formula, &groups, Device::Cpu);
            Comparison { kind: Kind::Double, ..Comparison::default() }
                .check(&groups, 1e-10, |qkv| merged_attention::forward(&parts, qkv));
        }
    }

    #[test]
    fn a_pack_without_completions_after_prompts_has_one_part() {
        let of = |groups: &[GroupLengths]| VarlenParts::new(Formula, &Pieces::new(groups), Device::Cpu);
        assert!(of(&[group(12, &[]), group(0, &[4, 2]), group(3, &[0])]).shared.is_none());
        let shared = of(&groups()).shared.expect("three groups have both");
        assert_eq!(Vec::<i32>::try_from(shared.sequences.query_starts).unwrap(), [0, 27, 45, 75]);
        assert_eq!(Vec::<i32>::try_from(shared.sequences.key_starts).unwrap(), [0, 3, 12, 14]);
        assert_eq!((shared.sequences.max_queries, shared.sequences.max_keys), (30, 9));
    }

    #[test]
    fn flash_attention_on_a_gpu_equals_the_formula() {
        if !tch::Cuda::is_available() {
            eprintln!("skipped: no CUDA device");
            return;
        }
        let device = Device::Cuda(0);
        let long = vec![group(700, &[600, 3, 520]), group(130, &[128, 1]), group(1, &[257])];
        for head_dim in [8, 64, 128] {
            for groups in [groups(), vec![group(12, &[])], vec![group(1, &[1, 1])], long.clone()] {
                let comparison = Comparison { kind: Kind::BFloat16, device, heads: [14, 2], head_dim };
                let parts = parts(Flash, &groups, device);
                comparison.check(&groups, 0.03, |qkv| merged_attention::forward(&parts, qkv));
                // What a micro-batch gets is the same.
                let plan = PackedAttention::new(&groups, device, Kind::BFloat16, head_dim);
                comparison.check(&groups, 0.03, |qkv| plan.forward(qkv));
            }
        }
    }
}
