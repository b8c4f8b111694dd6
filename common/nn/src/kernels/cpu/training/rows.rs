//! Rows from one place to another.

use super::{Rows, RowsMut, for_each_row};

/// Row `indices[i]` of `x` as row `i` of `out`.
///
/// # Shapes
/// - x: `[R, C]`, indices: `[N]`, each below R; out: `[N, C]`.
pub fn gather_rows(x: &[f32], indices: &[i64], out: &mut [f32]) {
    if indices.is_empty() {
        return;
    }
    let width = out.len() / indices.len();
    assert!(width > 0 && out.len() == indices.len() * width, "every row needs its index");
    let (x, out) = (Rows::new(x, width), RowsMut::new(out, width).share());
    for_each_row(indices.len(), width, |i| {
        // SAFETY: each row is written by one thread.
        unsafe { out.row(i) }.copy_from_slice(x.row(indices[i] as usize));
    });
}
