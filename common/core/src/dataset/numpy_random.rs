//! The order in which Hugging Face's `datasets` shuffles: that of NumPy's `default_rng(seed).permutation(n)`.
//!
//! Recipes pick their rows by `dataset.shuffle(seed=42).select(range(50000))`; to pick the same ones takes the same
//! generator. It is PCG64 (XSL-RR 128/64 of O'Neill, "PCG: a family of simple fast space-efficient statistically good
//! algorithms for random number generation", 2014), seeded by NumPy's `SeedSequence`, and bounded by rejection.

/// `0..len` in the order of `numpy.random.default_rng(seed).permutation(len)`.
#[must_use]
pub fn permutation(seed: u64, len: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..len).collect();
    let mut random = Pcg64::new(seed);
    for last in (1..len).rev() {
        order.swap(last as usize, random.up_to(last) as usize);
    }
    order
}

/// NumPy's PCG64 as its distributions read it: 32 bits at a time, the lower half of a word first.
struct Pcg64 {
    state: u128,
    increment: u128,
    /// The upper half of a word whose lower half has been taken.
    half: Option<u32>,
}

impl Pcg64 {
    const MULTIPLIER: u128 = 0x2360_ED05_1FC6_5DA4_4385_DF64_9FCC_F645;

    fn new(seed: u64) -> Self {
        let words = seed_words(seed);
        let wide = |high: usize| u128::from(words[high]) << 64 | u128::from(words[high + 1]);
        let (state, stream) = (wide(0), wide(2));
        let mut random = Self { state: 0, increment: stream << 1 | 1, half: None };
        random.step();
        random.state = random.state.wrapping_add(state);
        random.step();
        random
    }

    fn step(&mut self) {
        self.state = self.state.wrapping_mul(Self::MULTIPLIER).wrapping_add(self.increment);
    }

    fn next_u64(&mut self) -> u64 {
        self.step();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    fn next_u32(&mut self) -> u32 {
        if let Some(half) = self.half.take() {
            return half;
        }
        let word = self.next_u64();
        self.half = Some((word >> 32) as u32);
        word as u32
    }

    /// A number of `0..=largest`: as many bits as it has, until they are no larger.
    fn up_to(&mut self, largest: u32) -> u32 {
        let mask = u32::MAX.checked_shr(largest.leading_zeros()).unwrap_or_default();
        loop {
            let number = self.next_u32() & mask;
            if number <= largest {
                return number;
            }
        }
    }
}

const POOL_SIZE: usize = 4;
const MULTIPLIER_A: u32 = 0x931e_8875;
const MULTIPLIER_B: u32 = 0x58f3_8ded;

/// `SeedSequence(seed).generate_state(4, uint64)`.
fn seed_words(seed: u64) -> [u64; 4] {
    let pool = seed_pool(seed);
    let mut constant: u32 = 0x8b51_f9dd;
    let mut halves = [0_u32; 8];
    for (half, &source) in halves.iter_mut().zip(pool.iter().cycle()) {
        let mixed = source ^ constant;
        constant = constant.wrapping_mul(MULTIPLIER_B);
        let mixed = mixed.wrapping_mul(constant);
        *half = mixed ^ (mixed >> 16);
    }
    std::array::from_fn(|word| u64::from(halves[2 * word + 1]) << 32 | u64::from(halves[2 * word]))
}

/// The pool that a seed's entropy is spread over. A seed has two words at most, fewer than the pool.
fn seed_pool(seed: u64) -> [u32; POOL_SIZE] {
    let mut constant: u32 = 0x43b0_d7e5;
    let mut hash = |value: u32| {
        let mixed = value ^ constant;
        constant = constant.wrapping_mul(MULTIPLIER_A);
        let mixed = mixed.wrapping_mul(constant);
        mixed ^ (mixed >> 16)
    };
    let mut pool = [seed as u32, (seed >> 32) as u32, 0, 0].map(&mut hash);
    for source in 0..POOL_SIZE {
        for target in (0..POOL_SIZE).filter(|&target| target != source) {
            let hashed = hash(pool[source]);
            let mixed = pool[target].wrapping_mul(0xca01_f9dd).wrapping_sub(hashed.wrapping_mul(0x4973_f715));
            pool[target] = mixed ^ (mixed >> 16);
        }
    }
    pool
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use xxhash_rust::xxh3::Xxh3;

    use super::*;

    /// What NumPy and `datasets` made, by `tests/golden/make_numpy.py`.
    fn golden() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/numpy.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn hash(order: &[u32]) -> String {
        let mut hash = Xxh3::new();
        order.iter().for_each(|index| hash.update(&index.to_le_bytes()));
        format!("{:016x}", hash.digest())
    }

    #[test]
    fn permutations_are_numpy_s() {
        let golden = golden();
        let cases = golden["permutations"].as_array().unwrap();
        assert!(cases.len() > 20);
        for case in cases {
            let [seed, len] = ["seed", "len"].map(|key| case[key].as_u64().unwrap());
            let order = permutation(seed, u32::try_from(len).unwrap());
            let first: Vec<u32> = serde_json::from_value(case["first"].clone()).unwrap();
            assert_eq!(order[..first.len()], first, "seed {seed}, {len}");
            assert_eq!(hash(&order), case["xxh3"], "seed {seed}, {len}");
        }
    }

    /// `Dataset.shuffle(seed).select(range(take))`, up to the 50,000 of Jiayi-Pan/Countdown-Tasks-3to4's 490,364 rows.
    #[test]
    fn rows_are_those_that_datasets_picks() {
        let golden = golden();
        for case in golden["datasets"].as_array().unwrap() {
            let [seed, len, take] = ["seed", "len", "take"].map(|key| case[key].as_u64().unwrap());
            let order = permutation(seed, u32::try_from(len).unwrap());
            assert_eq!(hash(&order[..take as usize]), case["xxh3"], "seed {seed}, {take} of {len}");
        }
    }
}
