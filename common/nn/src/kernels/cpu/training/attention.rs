//! Attention over two sets of keys from attention over each.

use super::{Isa, Kernel, Rows, RowsMut, Simd, for_each_row};

/// What attention over some keys gave: outputs, and the logarithms of the sums of exponentials of their scores.
///
/// Makes `out` and `log_sums` those over their keys and `other`'s together.
///
/// # Shapes
/// - out, other_out: `[R, D]`, log_sums, other_log_sums: `[R]`; a row is one head of one token.
pub fn merge_attention(out: &mut [f32], log_sums: &mut [f32], other_out: &[f32], other_log_sums: &[f32]) {
    let num_rows = log_sums.len();
    assert!(other_out.len() == out.len() && other_log_sums.len() == num_rows, "both must have the same shape");
    if num_rows == 0 {
        return;
    }
    let (width, isa) = (out.len() / num_rows, Isa::detect());
    let (out, log_sums) = (RowsMut::new(out, width).share(), RowsMut::new(log_sums, 1).share());
    let other_out = Rows::new(other_out, width);
    for_each_row(num_rows, width, |i| {
        // SAFETY: each row is written by one thread.
        let (out, log_sum) = unsafe { (out.row(i), log_sums.row(i)) };
        let (own, other) = (log_sum[0], other_log_sums[i]);
        let peak = own.max(other);
        let (own, other) = ((own - peak).exp(), (other - peak).exp());
        log_sum[0] = peak + (own + other).ln();
        isa.run(Mix { out, share: own / (own + other), other: other_out.row(i) });
    });
}

/// `out = share * out + (1 - share) * other`.
struct Mix<'a> {
    out: &'a mut [f32],
    share: f32,
    other: &'a [f32],
}

impl Kernel for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let (share, rest) = (S::splat(self.share), S::splat(1.0 - self.share));
        for (out, other) in self.out.chunks_mut(S::LANES).zip(self.other.chunks(S::LANES)) {
            S::load(out, 0.0).mul_add(share, S::load(other, 0.0).mul(rest)).store(out);
        }
    }
}
