//! Scalars, known by what they are at a few fixed points instead of by a formula.
//!
//! Whatever is made of numbers, symbols, `+ - * /` and integer powers is a rational function, and is known by its
//! residues modulo two primes of 61 bits where each symbol is some residue: two of them that are not the same have the
//! same residues about once in 2^120 (Schwartz-Zippel), and no number of digits overflows. pi and e are symbols there,
//! which is exact as nothing but themselves equals them, and `i` is a root of -1. What also has roots, logarithms or
//! sines is known by its values in doubles, where each symbol is some number.

use super::residue::{
    POINTS, RESIDUES, Residues, add, each_prime, imaginary_unit, inverse, multiply, power, prime_of, try_each,
};
use crate::dataset::SplitMix64;

const REALS: usize = 4;

/// How far two values may be apart that differ by rounding alone.
const RELATIVE: f64 = 1e-9;
/// How far a decimal may be from what it approximates: it must be right in 6 places and in 6 digits.
const DECIMAL_ABSOLUTE: f64 = 5e-7;
const DECIMAL_RELATIVE: f64 = 2e-6;

/// A scalar, which may depend on symbols.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quantity {
    /// For rational functions alone.
    exact: Option<Residues>,
    /// Not finite where it has no real value.
    real: [f64; REALS],
    /// It depends on no symbol.
    is_constant: bool,
}

/// What one difference is of another, for equations and inequalities that say the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proportion {
    Positive,
    Negative,
    None,
}

impl Quantity {
    pub(super) fn integer(value: u32) -> Self {
        let exact = Some([u64::from(value); RESIDUES]);
        Self { exact, real: [f64::from(value); REALS], is_constant: true }
    }

    /// The number written `digits` of which the last `places` are behind the point.
    pub(super) fn decimal(digits: &str, exponent: i32) -> Self {
        let residue = |prime: u64| {
            let fold = |sum, digit: u8| add(multiply(sum, 10, prime), u64::from(digit - b'0'), prime);
            let scale = power(10, u64::from(exponent.unsigned_abs()), prime);
            let scale = if exponent < 0 { inverse(scale, prime) } else { scale };
            multiply(digits.bytes().fold(0, fold), scale, prime)
        };
        // The text is a double's, so that the value is the nearest one.
        let real = format!("{digits}e{exponent}").parse().unwrap_or(f64::NAN);
        Self { exact: Some(each_prime(residue)), real: [real; REALS], is_constant: true }
    }

    /// What differs from every other name.
    pub(super) fn symbol(name: &str) -> Self {
        let mut random = SplitMix64::new(hash(name));
        let exact = std::array::from_fn(|point| random.below(prime_of(point)));
        let size: [f64; REALS] =
            std::array::from_fn(|_| 0.6 + 1.7 * random.below(1 << 40) as f64 / (1_u64 << 40) as f64);
        // Logarithms and roots are real where all symbols are positive; signs and absolute values need others.
        let sign = if random.below(2) == 0 { 1.0 } else { -1.0 };
        Self { exact: Some(exact), real: [size[0], size[1], sign * size[2], -sign * size[3]], is_constant: false }
    }

    /// pi or e: a number, yet of a kind with symbols as no rational function has it for a root.
    pub(super) fn transcendental(name: &str, value: f64) -> Self {
        Self { real: [value; REALS], is_constant: true, ..Self::symbol(name) }
    }

    pub(super) fn imaginary_unit() -> Self {
        Self { exact: Some(imaginary_unit()), is_constant: false, ..Self::symbol("i") }
    }

    /// `name` of `argument`, a function of which nothing is known but that equal arguments give equal values.
    pub(super) fn opaque(name: &str, argument: &Self) -> Self {
        let of = Self::symbol(name);
        let sum = of.plus(argument);
        let mixed = sum.times(&sum).times(&of).plus(argument);
        let real = std::array::from_fn(|point| (mixed.real[point] * 1.3).sin() + argument.real[point] * of.real[point]);
        Self { real, is_constant: false, ..mixed }
    }

    pub(super) fn plus(&self, other: &Self) -> Self {
        self.with(other, |a, b, prime| Some(add(a, b, prime)), |a, b| a + b)
    }

    pub(super) fn minus(&self, other: &Self) -> Self {
        self.plus(&other.negated())
    }

    pub(super) fn times(&self, other: &Self) -> Self {
        self.with(other, |a, b, prime| Some(multiply(a, b, prime)), |a, b| a * b)
    }

    pub(super) fn over(&self, other: &Self) -> Self {
        let quotient = |a, b, prime| (b != 0).then(|| multiply(a, inverse(b, prime), prime));
        self.with(other, quotient, |a, b| a / b)
    }

    pub(super) fn negated(&self) -> Self {
        Self::integer(0).with(self, |a, b, prime| Some(add(a, prime - b, prime)), |a, b| a - b)
    }

    pub(super) fn pow(&self, exponent: &Self) -> Self {
        let exact = exponent.as_integer().zip(self.exact).and_then(|(exponent, base)| {
            let base: Residues = try_each(|point| match exponent {
                0.. => Some(base[point]),
                _ => (base[point] != 0).then(|| inverse(base[point], prime_of(point))),
            })?;
            try_each(|point| Some(power(base[point], exponent.unsigned_abs(), prime_of(point))))
        });
        let real = std::array::from_fn(|point| self.real[point].powf(exponent.real[point]));
        Self { exact, real, is_constant: self.is_constant && exponent.is_constant }
    }

    /// The real root where there is one.
    pub(super) fn root(&self, degree: &Self) -> Self {
        let root = self.pow(&Self::integer(1).over(degree));
        let is_odd = degree.as_integer().is_some_and(|degree| degree % 2 != 0);
        if is_odd && self.is_constant && self.real[0] < 0.0 {
            return self.negated().root(degree).negated();
        }
        root
    }

    /// A function that is more than arithmetic.
    pub(super) fn map(&self, function: impl Fn(f64) -> f64) -> Self {
        Self { exact: None, real: self.real.map(function), is_constant: self.is_constant }
    }

    pub(super) fn absolute(&self) -> Self {
        match self.is_constant && self.real[0].is_finite() {
            true if self.real[0] < 0.0 => self.negated(),
            true => *self,
            false => self.map(f64::abs),
        }
    }

    /// A whole number next to it; what depends on symbols is not looked into.
    pub(super) fn rounded(&self, name: &str, round: impl Fn(f64) -> f64) -> Self {
        let rounded = round(self.real[0]);
        if !self.is_constant || rounded.abs() >= f64::from(u32::MAX) || rounded.is_nan() {
            return Self::opaque(name, self);
        }
        let whole = Self::integer(rounded.abs() as u32);
        if rounded < 0.0 { whole.negated() } else { whole }
    }

    /// The value, if it is a whole number that a double holds.
    pub(super) fn as_integer(&self) -> Option<i64> {
        let (value, exact) = (self.real[0], self.exact?);
        if !self.is_constant || value.fract() != 0.0 || value.abs() >= (1_u64 << 53) as f64 {
            return None;
        }
        let value = value as i64;
        // It may be a fraction that a double cannot tell from one.
        let is = |point: usize| exact[point] == value.rem_euclid(prime_of(point) as i64) as u64;
        (0..RESIDUES).all(is).then_some(value)
    }

    pub(super) fn is_constant(&self) -> bool {
        self.is_constant
    }

    /// Whether both are the same function of their symbols.
    pub(super) fn equals(&self, other: &Self) -> bool {
        if let (Some(a), Some(b)) = (self.exact, other.exact) {
            return a == b;
        }
        let mut num_finite = 0;
        for (a, b) in self.real.into_iter().zip(other.real) {
            match (a.is_finite(), b.is_finite()) {
                (true, true) if (a - b).abs() <= RELATIVE * a.abs().max(b.abs()) => num_finite += 1,
                (false, false) => {}
                _ => return false,
            }
        }
        num_finite >= 2
    }

    /// Whether a decimal is the other as far as it is written.
    pub(super) fn approximates(&self, other: &Self) -> bool {
        let (a, b) = (self.real[0], other.real[0]);
        let distance = (a - b).abs();
        let is_constant = self.is_constant && other.is_constant;
        is_constant && distance <= DECIMAL_ABSOLUTE && distance <= DECIMAL_RELATIVE * a.abs().max(b.abs())
    }

    /// Whether one is the other times a constant, where both depend on symbols.
    pub(super) fn proportion(&self, other: &Self) -> Proportion {
        let (a, b) = (self, other);
        if a.is_constant || b.is_constant {
            return Proportion::None;
        }
        let is_proportional = match (a.exact, b.exact) {
            (Some(a), Some(b)) => (0..RESIDUES).step_by(POINTS).all(|at| {
                let prime = prime_of(at);
                let crosswise = multiply(a[at], b[at + 1], prime) == multiply(a[at + 1], b[at], prime);
                crosswise && a[at] != 0 && b[at] != 0
            }),
            _ => {
                let ratios = || a.real.into_iter().zip(b.real).map(|(a, b)| a / b).filter(|ratio| ratio.is_finite());
                let first = ratios().next().filter(|ratio| *ratio != 0.0);
                ratios().count() >= 2
                    && first.is_some_and(|first| ratios().all(|ratio| (ratio - first).abs() <= RELATIVE * first.abs()))
            }
        };
        match a.real[0] / b.real[0] {
            _ if !is_proportional => Proportion::None,
            ratio if ratio > 0.0 => Proportion::Positive,
            ratio if ratio < 0.0 => Proportion::Negative,
            _ => Proportion::None,
        }
    }

    fn with(
        &self,
        other: &Self,
        residues: impl Fn(u64, u64, u64) -> Option<u64>,
        reals: impl Fn(f64, f64) -> f64,
    ) -> Self {
        let exact = self.exact.zip(other.exact);
        Self {
            exact: exact.and_then(|(a, b)| try_each(|point| residues(a[point], b[point], prime_of(point)))),
            real: std::array::from_fn(|point| reals(self.real[point], other.real[point])),
            is_constant: self.is_constant && other.is_constant,
        }
    }
}

/// FNV-1a.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(value: u32) -> Quantity {
        Quantity::integer(value)
    }

    #[test]
    fn rational_functions_are_equal_exactly() {
        let (x, y) = (Quantity::symbol("x"), Quantity::symbol("y"));
        let square = |q: &Quantity| q.times(q);
        let left = square(&x.plus(&y));
        let right = square(&x).plus(&x.times(&y).times(&number(2))).plus(&square(&y));
        assert!(left.equals(&right));
        assert!(!left.equals(&right.plus(&Quantity::decimal("1", -300))));
        assert!(x.over(&x).equals(&number(1)));
        assert!(!number(1).over(&number(0)).equals(&number(1).over(&number(0))));
        let i = Quantity::imaginary_unit();
        assert!(i.times(&i).equals(&number(1).negated()));
    }

    #[test]
    fn numbers_of_any_size_are_exact() {
        let huge = number(9).pow(&number(387_420_489));
        assert!(huge.equals(&number(3).pow(&number(774_840_978))));
        assert!(!huge.equals(&huge.plus(&number(1))));
        assert!(Quantity::decimal(&"9".repeat(4000), 0).plus(&number(1)).equals(&number(10).pow(&number(4000))));
        assert!(Quantity::decimal("125", -2).equals(&number(5).over(&number(4))));
    }

    #[test]
    fn roots_are_equal_in_doubles() {
        let root = number(12).root(&number(2));
        assert!(root.equals(&number(2).times(&number(3).root(&number(2)))));
        assert!(!root.equals(&number(2).times(&number(5).root(&number(2)))));
        assert!(number(8).negated().root(&number(3)).equals(&number(2).negated()));
        let x = Quantity::symbol("x");
        assert!(!x.times(&x).root(&number(2)).equals(&x), "x may be negative");
    }

    #[test]
    fn decimals_are_right_in_six_places_and_digits() {
        let third = number(1).over(&number(3));
        assert!(Quantity::decimal("333333", -6).approximates(&third));
        assert!(!Quantity::decimal("33333", -5).approximates(&third));
        assert!(!Quantity::decimal("123", -6).approximates(&Quantity::decimal("1234", -7)));
    }

    #[test]
    fn equations_are_the_same_up_to_a_factor() {
        let (x, y) = (Quantity::symbol("x"), Quantity::symbol("y"));
        let line = x.plus(&y).minus(&number(3));
        assert_eq!(line.proportion(&line.times(&number(2))), Proportion::Positive);
        assert_eq!(line.proportion(&line.negated()), Proportion::Negative);
        assert_eq!(line.proportion(&x.plus(&y)), Proportion::None);
        assert_eq!(number(1).proportion(&number(2)), Proportion::None);
    }
}
