//! Masks of dropout (<https://jmlr.org/papers/v15/srivastava14a.html>) by counter-based randomness.

use aha_core::random::philox;

use super::{RowsMut, for_each_row};

/// 0 for a share `rate` of a row's elements, `1 / (1 - rate)` for the others. A row is drawn from its key and `stream`
/// alone.
///
/// # Shapes
/// - keys: `[N]`, mask: `[N, width]`.
pub fn dropout_mask(keys: &[u64], stream: [u32; 2], rate: f64, mask: &mut [f32]) {
    let width = mask.len() / keys.len().max(1);
    assert_eq!(mask.len(), keys.len() * width, "a mask has a row for every key");
    if mask.is_empty() {
        return;
    }
    let threshold = (rate * (f64::from(u32::MAX) + 1.0)) as u32;
    let kept = (1.0 / (1.0 - rate)) as f32;
    let mask = RowsMut::new(mask, width).share();
    for_each_row(keys.len(), width, |row| {
        // SAFETY: each row is written by one thread.
        let row_mask = unsafe { mask.part(row, 0, width) };
        let key = [keys[row] as u32, (keys[row] >> 32) as u32];
        for (values, block) in row_mask.chunks_mut(4).zip(0..) {
            let words = philox([block, stream[0], stream[1], 2], key);
            for (value, word) in values.iter_mut().zip(words) {
                *value = if word < threshold { 0.0 } else { kept };
            }
        }
    });
}
