//! Counter-based randomness: a number is a function of what it is for, never of when it was drawn.
//!
//! Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), the generator that
//! the GPU kernels use as well. Equal keys and counters give equal numbers on every platform.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words for `counter` under `key`.
#[must_use]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [high0, low0] = widening_mul(MULTIPLIERS[0], counter[0]);
        let [high1, low1] = widening_mul(MULTIPLIERS[1], counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The uniform number in [0, 1) that chooses the token at `position` of sample `sample_index`, 24 bits of it.
#[must_use]
pub fn sampling_uniform(seed: u64, sample_index: u32, position: u32) -> f32 {
    let [word, ..] = philox([position, sample_index, 0, 0], [seed as u32, (seed >> 32) as u32]);
    (word >> 8) as f32 / (1 << 24) as f32
}

/// A seed for one purpose out of the run's seed; `parts` names the purpose (step, prompt, ...).
#[must_use]
pub fn derive_seed(seed: u64, parts: &[u64]) -> u64 {
    parts.iter().fold(seed, |state, &part| {
        let [a, b, ..] = philox([part as u32, (part >> 32) as u32, 0x5EED, 0], [state as u32, (state >> 32) as u32]);
        u64::from(a) | u64::from(b) << 32
    })
}

fn widening_mul(a: u32, b: u32) -> [u32; 2] {
    let product = u64::from(a) * u64::from(b);
    [(product >> 32) as u32, product as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn uniforms_lie_in_the_unit_interval_and_are_flat() {
        let mut buckets = [0_u32; 10];
        for position in 0..10_000 {
            let u = sampling_uniform(42, 3, position);
            assert!((0.0..1.0).contains(&u));
            buckets[(u * 10.0) as usize] += 1;
        }
        // Binomial with mean 1000 and standard deviation 30.
        assert!(buckets.iter().all(|&count| (850..1150).contains(&count)), "{buckets:?}");
    }

    #[test]
    fn derived_seeds_differ_by_every_part() {
        let seeds = [derive_seed(1, &[2, 3]), derive_seed(1, &[3, 2]), derive_seed(2, &[2, 3]), derive_seed(1, &[2])];
        for (index, seed) in seeds.iter().enumerate() {
            assert!(!seeds[..index].contains(seed));
        }
    }
}
