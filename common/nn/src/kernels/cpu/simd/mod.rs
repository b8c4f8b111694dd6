//! One register type per instruction set behind one trait, and the choice of instruction set at run time.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bytes;
mod portable;

pub(super) use bytes::{ByteDot, ByteKernel, DEPTH};
use portable::Portable8;

/// Most lanes that any [`Simd`] type has.
pub(super) const MAX_LANES: usize = 16;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// A register type of which a tile of sums is made.
pub(super) trait Tile: Copy {
    /// Rows of two-register accumulators that fit the register file beside the operands.
    const TILE_ROWS: usize;
}

/// A register of consecutive `f32`. Only [`Isa::run`] may choose the type, after it saw that the CPU supports it.
pub(super) trait Simd: Tile {
    const LANES: usize;

    fn splat(value: f32) -> Self;

    /// # Safety
    /// `src` is readable for `LANES` elements.
    unsafe fn load_ptr(src: *const f32) -> Self;

    /// Floats of which `src` has the upper 16 bits, and whose others are 0.
    ///
    /// # Safety
    /// `src` is readable for `LANES` elements.
    unsafe fn load_upper_halves(src: *const u16) -> Self;

    /// # Safety
    /// `dst` is writable for `LANES` elements.
    unsafe fn store_ptr(self, dst: *mut f32);

    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;

    /// `self * factor + addend`, rounded once where the instruction set can.
    fn mul_add(self, factor: Self, addend: Self) -> Self;

    /// The larger, lane by lane; `other` where either is NaN.
    fn max(self, other: Self) -> Self;

    /// The smaller, lane by lane; `other` where either is NaN.
    fn min(self, other: Self) -> Self;

    /// To the nearest integer, ties to even; for magnitudes below 2^22.
    fn round(self) -> Self;

    /// `2^self` for integral lanes in -126..=127.
    fn pow2(self) -> Self;

    /// `below` in the lanes where `self < bound`, `otherwise` in the others and where `self` is NaN.
    fn select_less(self, bound: Self, below: Self, otherwise: Self) -> Self;

    /// The first `LANES` elements of `src`, or all of them followed by `fill`.
    #[inline(always)]
    fn load(src: &[f32], fill: f32) -> Self {
        if src.len() >= Self::LANES {
            // SAFETY: the slice holds at least LANES elements.
            unsafe { Self::load_ptr(src.as_ptr()) }
        } else {
            let mut padded = [fill; MAX_LANES];
            padded[..src.len()].copy_from_slice(src);
            // SAFETY: MAX_LANES >= LANES elements are readable.
            unsafe { Self::load_ptr(padded.as_ptr()) }
        }
    }

    /// Writes the first `dst.len()` lanes, at most `LANES`.
    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        if dst.len() >= Self::LANES {
            // SAFETY: the slice holds at least LANES elements.
            unsafe { self.store_ptr(dst.as_mut_ptr()) }
        } else {
            dst.copy_from_slice(&self.to_array()[..dst.len()]);
        }
    }

    /// The lanes, followed by zeros.
    #[inline(always)]
    fn to_array(self) -> [f32; MAX_LANES] {
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: MAX_LANES >= LANES elements are writable.
        unsafe { self.store_ptr(lanes.as_mut_ptr()) };
        lanes
    }

    /// The sum of all lanes: halves are added until one lane is left.
    fn sum(self) -> f32;

    /// The largest lane, of lanes that are not NaN.
    fn largest(self) -> f32;

    /// `e^self` within 2 units in the last place, 0 below -87.3, NaN for NaN; finite for every finite argument.
    ///
    /// The polynomial is the one of Cephes `expf`.
    #[inline(always)]
    fn exp(self) -> Self {
        let x = Self::splat(88.37).min(self);
        let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
        let r = n.mul_add(Self::splat(-0.693_359_4), x);
        let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
        let mut p = Self::splat(1.987_569_1e-4);
        for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
            p = p.mul_add(r, Self::splat(coefficient));
        }
        let p = p.mul_add(r.mul(r), r.add(Self::splat(1.0)));
        // Below the bound the exponent leaves the range of `pow2`; the product is discarded.
        x.select_less(Self::splat(-87.3), Self::splat(0.0), p.mul(n.pow2()))
    }
}

/// A computation that is compiled once per instruction set. `run` must be `#[inline(always)]`.
pub(super) trait Kernel {
    type Output;
    fn run<S: Simd>(self) -> Self::Output;
}

/// Asks for a line of memory that will be read soon. Any address will do.
#[inline(always)]
pub(super) fn prefetch<T>(line: *const T) {
    // SAFETY: it is a hint, which no address makes fault; every x86-64 has it.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

impl Isa {
    /// The best instruction set of this CPU.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// Every instruction set that this CPU can run, best first.
    pub fn available() -> Vec<Self> {
        let mut kinds = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                kinds.push(Self(Kind::Avx512));
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                kinds.push(Self(Kind::Avx2));
            }
        }
        kinds.push(Self(Kind::Portable));
        kinds
    }

    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: an Isa of this kind is only made by `available`, after detection.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { avx512::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { avx2::run(kernel) },
            Kind::Portable => kernel.run::<Portable8>(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self) {
            for chunk in self.0.chunks_mut(S::LANES) {
                S::load(chunk, 0.0).exp().store(chunk);
            }
        }
    }

    fn exp(isa: Isa, values: &[f32]) -> Vec<f32> {
        let mut out = values.to_vec();
        isa.run(Exp(&mut out));
        out
    }

    #[test]
    fn exp_agrees_with_f64_over_its_range() {
        let values: Vec<f32> = (-870_000..880_000).step_by(37).map(|i| i as f32 * 1e-4).collect();
        for isa in Isa::available() {
            for (x, y) in values.iter().zip(exp(isa, &values)) {
                let expect = f64::from(*x).exp();
                assert!((f64::from(y) - expect).abs() <= 2.5e-7 * expect, "{isa:?} exp({x}) = {y}, not {expect}");
            }
        }
    }

    #[test]
    fn exp_handles_the_ends() {
        for isa in Isa::available() {
            let out = exp(isa, &[f32::NEG_INFINITY, -200.0, 0.0, -0.0, f32::NAN, 1e30]);
            assert_eq!(out[..4], [0.0, 0.0, 1.0, 1.0], "{isa:?}");
            assert!(out[4].is_nan() && out[5] > 1e38, "{isa:?} {out:?}");
        }
    }

    struct Reduce<'a>(&'a [f32]);

    impl Kernel for Reduce<'_> {
        type Output = (f32, f32);
        #[inline(always)]
        fn run<S: Simd>(self) -> (f32, f32) {
            let lanes = S::load(self.0, 0.0);
            (lanes.sum(), lanes.largest())
        }
    }

    #[test]
    fn reductions_see_every_lane() {
        for isa in Isa::available() {
            for lane in 0..8 {
                let mut lanes = [0.0; 8];
                lanes[lane] = 3.0;
                assert_eq!(isa.run(Reduce(&lanes)), (3.0, 3.0), "{isa:?} lane {lane}");
            }
        }
    }

    #[test]
    fn tails_use_the_same_arithmetic_as_full_registers() {
        let values: Vec<f32> = (0..53).map(|i| (i as f32 * 0.37).sin() * 20.0).collect();
        for isa in Isa::available() {
            let whole = exp(isa, &values);
            for len in 1..values.len() {
                assert_eq!(exp(isa, &values[..len]), whole[..len], "{isa:?} {len}");
            }
        }
    }
}
