//! Exact fractions of 128-bit integers; every operation that would not fit gives `None`.

/// A fraction in lowest terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::reward) struct Ratio {
    numerator: i128,
    /// Above 0.
    denominator: i128,
}

impl Ratio {
    /// The number written `whole.fraction` in decimal ASCII digits.
    pub(super) fn from_decimal(whole: &[u8], fraction: &[u8]) -> Option<Self> {
        // Trailing zeros are worth nothing and would overflow first.
        let zeros = fraction.iter().rev().take_while(|&&digit| digit == b'0').count();
        let fraction = &fraction[..fraction.len() - zeros];
        let mut digits = whole.iter().chain(fraction).map(|digit| i128::from(digit - b'0'));
        let numerator = digits.try_fold(0_i128, |number, digit| number.checked_mul(10)?.checked_add(digit))?;
        let denominator = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        Self::reduced(numerator, denominator)
    }

    pub(super) fn checked_neg(self) -> Option<Self> {
        Some(Self { numerator: self.numerator.checked_neg()?, ..self })
    }

    pub(super) fn checked_add(self, other: Self) -> Option<Self> {
        let common = gcd(self.denominator, other.denominator)?;
        let (left, right) = (other.denominator / common, self.denominator / common);
        let numerator = self.numerator.checked_mul(left)?.checked_add(other.numerator.checked_mul(right)?)?;
        Self::reduced(numerator, self.denominator.checked_mul(left)?)
    }

    pub(super) fn checked_sub(self, other: Self) -> Option<Self> {
        self.checked_add(other.checked_neg()?)
    }

    pub(super) fn checked_mul(self, other: Self) -> Option<Self> {
        // Reducing crosswise first keeps every product as small as the result allows.
        let left = Self::reduced(self.numerator, other.denominator)?;
        let right = Self::reduced(other.numerator, self.denominator)?;
        Some(Self {
            numerator: left.numerator.checked_mul(right.numerator)?,
            denominator: left.denominator.checked_mul(right.denominator)?,
        })
    }

    pub(super) fn checked_div(self, other: Self) -> Option<Self> {
        self.checked_mul(other.inverse()?)
    }

    /// Rounds towards minus infinity, as Python's `//`.
    pub(super) fn checked_floor_div(self, other: Self) -> Option<Self> {
        let quotient = self.checked_div(other)?;
        Some(Self { numerator: quotient.numerator.div_euclid(quotient.denominator), denominator: 1 })
    }

    /// `None` for fractional exponents too: such powers are seldom fractions.
    pub(super) fn checked_pow(self, exponent: Self) -> Option<Self> {
        if exponent.denominator != 1 {
            return None;
        }
        let base = if exponent.numerator < 0 { self.inverse()? } else { self };
        let exponent = exponent.numerator.unsigned_abs();
        if base.denominator == 1 && base.numerator.unsigned_abs() <= 1 {
            // Powers of -1, 0 and 1 depend on whether the exponent is zero or odd alone.
            let small = if exponent == 0 { 0 } else { 2 - (exponent % 2) as u32 };
            return Some(Self { numerator: base.numerator.pow(small), denominator: 1 });
        }
        // Anything else overflows long before the exponent does.
        let exponent = u32::try_from(exponent).ok()?;
        Some(Self {
            numerator: base.numerator.checked_pow(exponent)?,
            denominator: base.denominator.checked_pow(exponent)?,
        })
    }

    /// The nearest double, for denominators below 2^72.
    #[must_use]
    pub(in crate::reward) fn to_f64(self) -> f64 {
        let (magnitude, denominator) = (self.numerator.unsigned_abs(), self.denominator.unsigned_abs());
        if denominator >> 72 != 0 {
            return self.numerator as f64 / self.denominator as f64;
        }
        // 56 bits or more of the quotient, the last of which also stands for the rest, are rounded once.
        let shift = magnitude.leading_zeros().min(127);
        let (quotient, rest) = ((magnitude << shift) / denominator, (magnitude << shift) % denominator);
        let nearest = (quotient | u128::from(rest != 0)) as f64 / 2_f64.powi(shift as i32);
        if self.numerator < 0 { -nearest } else { nearest }
    }

    /// `None` for zero.
    fn inverse(self) -> Option<Self> {
        let numerator = self.denominator.checked_mul(self.numerator.signum())?;
        Self { numerator, denominator: self.numerator.checked_abs()? }.non_zero_denominator()
    }

    fn non_zero_denominator(self) -> Option<Self> {
        (self.denominator != 0).then_some(self)
    }

    /// `denominator` is above 0.
    fn reduced(numerator: i128, denominator: i128) -> Option<Self> {
        let common = gcd(numerator, denominator)?;
        Some(Self { numerator: numerator / common, denominator: denominator / common })
    }
}

/// The greatest common divisor, above 0 as `b` is; `None` where it does not fit.
fn gcd(a: i128, b: i128) -> Option<i128> {
    let (mut a, mut b) = (a.unsigned_abs(), b.unsigned_abs());
    while b != 0 {
        (a, b) = match (u64::try_from(a), u64::try_from(b)) {
            // 64-bit division is several times faster.
            (Ok(a), Ok(b)) => (u128::from(b), u128::from(a % b)),
            _ => (b, a % b),
        };
    }
    i128::try_from(a).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratio(numerator: i128, denominator: i128) -> Ratio {
        Ratio::reduced(numerator, denominator).unwrap()
    }

    /// Compares with plain arithmetic on every pair of small fractions.
    #[test]
    fn small_fractions_agree_with_cross_multiplication() {
        let fractions: Vec<_> = (-6..=6).flat_map(|n| (1..=6).map(move |d| (n, d))).collect();
        for &(a, b) in &fractions {
            for &(c, d) in &fractions {
                let (left, right) = (ratio(a, b), ratio(c, d));
                assert_eq!(left.checked_add(right), Some(ratio(a * d + c * b, b * d)));
                assert_eq!(left.checked_sub(right), Some(ratio(a * d - c * b, b * d)));
                assert_eq!(left.checked_mul(right), Some(ratio(a * c, b * d)));
                let quotient = (c != 0).then(|| ratio(a * d * c.signum(), b * c.abs()));
                assert_eq!(left.checked_div(right), quotient);
                let floor = quotient.map(|q| ratio((q.to_f64() + 1e-9).floor() as i128, 1));
                assert_eq!(left.checked_floor_div(right), floor);
            }
        }
    }

    #[test]
    fn the_nearest_double_is_python_s_fraction_s() {
        for (numerator, denominator, expect) in [
            (0, 1, 0.0),
            (-1, 3, -1.0 / 3.0),
            (6_500_001, 100_000, 65.00001),
            ((1 << 53) + 1, 1, 9_007_199_254_740_992.0),
            (2 * ((1 << 53) + 1) + 1, 2, 9_007_199_254_740_994.0),
            (-3 * ((1 << 53) + 1) - 1, 3, -9_007_199_254_740_994.0),
            // So close above the middle of two doubles that no bit of the quotient shows it.
            (((1 << 53) + 1) * ((1 << 71) + 1) + 1, (1 << 71) + 1, 9_007_199_254_740_994.0),
            // float(Fraction(5**18 + 71 + Fraction(98**9, 6)))
            (416_885_325_156_872_032, 3, 138_961_775_052_290_672.0),
            (i128::MAX, 1, 2_f64.powi(127)),
            (1, i128::MAX, 2_f64.powi(-127)),
        ] {
            assert_eq!(ratio(numerator, denominator).to_f64(), expect, "{numerator}/{denominator}");
        }
    }

    #[test]
    fn overflow_is_none_and_never_a_panic() {
        let extremes = [ratio(i128::MAX, 1), ratio(i128::MIN, 1), ratio(1, i128::MAX), ratio(i128::MIN, i128::MAX)];
        for a in extremes {
            for b in extremes {
                for operation in
                    [Ratio::checked_add, Ratio::checked_sub, Ratio::checked_mul, Ratio::checked_div, Ratio::checked_pow]
                {
                    if let Some(result) = operation(a, b) {
                        assert!(result.denominator > 0);
                    }
                }
            }
        }
        assert_eq!(ratio(i128::MAX, 1).checked_add(ratio(1, 1)), None);
        assert_eq!(Ratio::from_decimal(&[b'9'; 39], &[]), None);
        assert_eq!(Ratio::from_decimal(b"1", &[b'0'; 500]), Some(ratio(1, 1)));
    }
}
