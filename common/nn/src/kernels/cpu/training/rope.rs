//! Rotary positions (<https://arxiv.org/abs/2104.09864>), in the convention of Hugging Face.

use super::super::rope::TurnHeads;
use super::{Isa, Rows, RowsMut, for_each_row};

/// Which way heads are turned: back undoes forth, and is its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Forth,
    Back,
}

/// Turns every head of every row by the row's angles, in place.
///
/// # Shapes
/// - x: `[R, heads * D]`, cos and sin: `[R, D]`, of which the first halves are read.
pub fn rope_in_place(x: &mut [f32], cos: &[f32], sin: &[f32], head_dim: usize, turn: Turn) {
    let num_rows = cos.len() / head_dim;
    assert!(sin.len() == cos.len() && x.len().is_multiple_of(cos.len().max(1)), "every row of heads needs its angles");
    if num_rows == 0 {
        return;
    }
    let (width, isa) = (x.len() / num_rows, Isa::detect());
    let (cos, sin) = (Rows::columns(cos, head_dim, 0..head_dim / 2), Rows::columns(sin, head_dim, 0..head_dim / 2));
    let x = RowsMut::new(x, width).share();
    let sign = if turn == Turn::Forth { 1.0 } else { -1.0 };
    for_each_row(num_rows, width, |i| {
        // SAFETY: each row is written by one thread.
        let heads = unsafe { x.row(i) };
        isa.run(TurnHeads { heads, cos: cos.row(i), sin: sin.row(i), sign });
    });
}
