//! The squared norm of a gradient.

use super::parallel_for;

/// Elements whose squares one thread adds up, whatever the number of threads.
const BLOCK: usize = 64 * 1024;
/// Independent sums, enough to hide the latency of the addition.
const LANES: usize = 16;

/// Sum of squares, in f64.
#[must_use]
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let num_blocks = values.len().div_ceil(BLOCK);
    let mut sums = vec![0.0; num_blocks];
    let out = Sums(sums.as_mut_ptr());
    parallel_for(num_blocks, 1, |range| {
        for block in range {
            let sum = of_block(&values[block * BLOCK..values.len().min((block + 1) * BLOCK)]);
            // SAFETY: each block's place is written by one thread, and there are as many places as blocks.
            unsafe { *out.get().add(block) = sum };
        }
    });
    sums.iter().sum()
}

fn of_block(values: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    for line in values.chunks(LANES) {
        for (lane, &value) in lanes.iter_mut().zip(line) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    lanes.iter().sum()
}

struct Sums(*mut f64);

// SAFETY: whoever uses the pointer writes each place from one thread.
unsafe impl Sync for Sums {}

impl Sums {
    fn get(&self) -> *mut f64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::testing::random;

    #[test]
    fn every_element_counts_once() {
        for len in [0, 1, 17, BLOCK, 3 * BLOCK + 5] {
            let values = random(len, 1);
            let expect: f64 = values.iter().map(|&value| f64::from(value).powi(2)).sum();
            assert!((sum_of_squares(&values) - expect).abs() <= 1e-12 * expect, "{len}");
        }
    }
}
