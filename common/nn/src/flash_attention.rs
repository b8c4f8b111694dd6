//! libtorch's variable-length flash attention: CUDA, bf16 or fp16.
//!
//! Its backward pass sums gradients of queries in whatever order blocks finish: they differ in the last bits from run to
//! run.

use std::ptr;

use tch::{Device, Kind, Tensor};

use crate::shim::{self, AhaPackedHeads, AhaSequences, aha_flash_attention};
use crate::varlen_attention::{Sequences, VarlenKernel};

/// The widest head that the kernels are compiled for.
const MAX_HEAD_DIM: i64 = 256;
/// Heads are read 16 bytes at a time.
const HEAD_DIM_MULTIPLE: i64 = 8;

#[derive(Debug)]
pub(crate) struct Flash;

impl Flash {
    /// Whether the kernels take heads of this width and type on `device`.
    pub(crate) fn takes(device: Device, kind: Kind, head_dim: i64) -> bool {
        device.is_cuda()
            && matches!(kind, Kind::BFloat16 | Kind::Half)
            && head_dim <= MAX_HEAD_DIM
            && head_dim % HEAD_DIM_MULTIPLE == 0
    }
}

impl VarlenKernel for Flash {
    /// # Panics
    /// Where libtorch refuses: anything but what [`Flash::takes`] says, or a GPU older than sm_80.
    fn forward(&self, [q, k, v]: &[Tensor; 3], sequences: &Sequences) -> (Tensor, Tensor) {
        let heads = AhaPackedHeads { q: q.as_ptr(), k: k.as_ptr(), v: v.as_ptr() };
        let starts = AhaSequences {
            query_starts: sequences.query_starts.as_ptr(),
            key_starts: sequences.key_starts.as_ptr(),
            max_queries: max_queries(sequences),
            max_keys: sequences.max_keys,
            is_causal: sequences.is_causal,
        };
        let (mut out, mut log_sums) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: every pointer is a live tensor; the shim writes `out` and `log_sums` only when it succeeds.
        let message =
            unsafe { aha_flash_attention(&raw const heads, &raw const starts, &raw mut out, &raw mut log_sums) };
        // SAFETY: the shim returned `message` just now.
        if let Err(reason) = unsafe { shim::check(message) } {
            panic!("flash attention of {q:?} over {k:?}: {reason}");
        }
        // SAFETY: the shim allocated both tensors for us to own.
        unsafe { (Tensor::from_ptr(out), Tensor::from_ptr(log_sums)) }
    }

    fn backward(
        &self,
        [q, k, v]: &[Tensor; 3],
        [d_out, out, log_sums]: [&Tensor; 3],
        sequences: &Sequences,
    ) -> [Tensor; 3] {
        // The kernel reads log-sums by their address alone.
        assert!(log_sums.is_contiguous() && log_sums.kind() == Kind::Float, "log-sums are fp32 rows, got {log_sums:?}");
        let Sequences { query_starts, key_starts, max_keys, is_causal, .. } = sequences;
        // The state of dropout's randomness, which nobody reads without dropout, must be a tensor.
        let no_dropout = query_starts;
        Tensor::internal_flash_attention_backward(
            d_out,
            q,
            k,
            v,
            out,
            log_sums,
            query_starts,
            key_starts,
            max_queries(sequences),
            *max_keys,
            0.0,
            *is_causal,
            no_dropout,
            no_dropout,
            None,
            None,
            None,
        )
        .into()
    }
}

/// Where no sequence has more than one query libtorch takes another way, made for decoding; two are as true a bound.
fn max_queries(sequences: &Sequences) -> i64 {
    sequences.max_queries.max(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_types_on_cuda_with_heads_of_whole_vectors_are_taken() {
        let cuda = Device::Cuda(0);
        for kind in [Kind::BFloat16, Kind::Half] {
            assert!([8, 64, 80, 128, 256].iter().all(|&head_dim| Flash::takes(cuda, kind, head_dim)));
            assert!([6, 20, 264].iter().all(|&head_dim| !Flash::takes(cuda, kind, head_dim)));
            assert!(!Flash::takes(Device::Cpu, kind, 64));
        }
        assert!(!Flash::takes(cuda, Kind::Float, 64));
    }
}
