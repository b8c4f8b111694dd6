//! What the tests of the kernels share.

use super::{Isa, Pool};

/// One and two threads on every instruction set of this machine.
pub(crate) fn pools() -> Vec<Pool> {
    let isas = Isa::available();
    isas.iter().flat_map(|isa| [1, 2].map(|threads| Pool::with_isa(threads, *isa).unwrap())).collect()
}

/// Numbers in -1..1, always the same for a seed.
pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len).map(|_| (uniform(&mut state) * 2.0 - 1.0) as f32).collect()
}

/// The next number in 0..1 of SplitMix64.
pub(crate) fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Equal within `tolerance`, relative to the larger of 1 and the expected value.
#[track_caller]
pub(crate) fn assert_close(actual: &[f32], expect: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expect.len());
    for (i, (a, e)) in actual.iter().zip(expect).enumerate() {
        assert!((f64::from(*a) - e).abs() <= tolerance * e.abs().max(1.0), "element {i} is {a}, not {e}");
    }
}

/// Equal in every bit, signs of zero included.
#[track_caller]
pub(crate) fn assert_same_bits(actual: &[f32], expect: &[f32], what: &str) {
    assert!(actual.iter().map(|x| x.to_bits()).eq(expect.iter().map(|x| x.to_bits())), "{what} differs");
}
