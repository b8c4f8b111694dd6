//! Arithmetic modulo two primes.

/// The two largest primes below 2^61 that have a root of -1.
const PRIMES: [u64; 2] = [2_305_843_009_213_693_921, 2_305_843_009_213_693_693];
/// Roots of -1 modulo [`PRIMES`].
const IMAGINARY_UNITS: [u64; 2] = [583_529_827_753_931_384, 966_685_122_347_009_555];
/// Points a prime; equations need two.
pub(super) const POINTS: usize = 2;
pub(super) const RESIDUES: usize = 2 * POINTS;
pub(super) type Residues = [u64; RESIDUES];

/// A root of -1 everywhere.
pub(super) fn imaginary_unit() -> Residues {
    std::array::from_fn(|point| IMAGINARY_UNITS[point / POINTS])
}

pub(super) fn prime_of(point: usize) -> u64 {
    PRIMES[point / POINTS]
}

pub(super) fn each_prime(residue: impl Fn(u64) -> u64) -> Residues {
    let residues = PRIMES.map(residue);
    std::array::from_fn(|point| residues[point / POINTS])
}

pub(super) fn try_each(residue: impl Fn(usize) -> Option<u64>) -> Option<Residues> {
    let mut residues = [0; RESIDUES];
    for (point, place) in residues.iter_mut().enumerate() {
        *place = residue(point)?;
    }
    Some(residues)
}

/// Both are at most the prime.
pub(super) fn add(a: u64, b: u64, prime: u64) -> u64 {
    (a + b) % prime
}

pub(super) fn multiply(a: u64, b: u64, prime: u64) -> u64 {
    (u128::from(a) * u128::from(b) % u128::from(prime)) as u64
}

pub(super) fn power(mut base: u64, mut exponent: u64, prime: u64) -> u64 {
    let mut result = 1;
    while exponent > 0 {
        if exponent % 2 == 1 {
            result = multiply(result, base, prime);
        }
        base = multiply(base, base, prime);
        exponent /= 2;
    }
    result
}

/// Of what is not 0, by Euclid's algorithm. Its numbers never exceed the prime.
pub(super) fn inverse(value: u64, prime: u64) -> u64 {
    let (mut remainder, mut next) = (prime as i64, value as i64);
    let (mut factor, mut next_factor) = (0_i64, 1_i64);
    while next != 0 {
        let quotient = remainder / next;
        (remainder, next) = (next, remainder - quotient * next);
        (factor, next_factor) = (next_factor, factor - quotient * next_factor);
    }
    factor.rem_euclid(prime as i64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constants_are_what_they_are_said_to_be() {
        for (prime, root) in PRIMES.into_iter().zip(IMAGINARY_UNITS) {
            assert_eq!(multiply(root, root, prime), prime - 1);
            // Fermat's test for a few bases.
            assert!((2..40).all(|base| power(base, prime - 1, prime) == 1));
        }
    }

    #[test]
    fn inverses_are_inverse() {
        for prime in PRIMES {
            for value in [1, 2, 3, 1 << 60, prime - 1, prime / 2] {
                assert_eq!(multiply(value, inverse(value, prime), prime), 1);
            }
        }
    }
}
