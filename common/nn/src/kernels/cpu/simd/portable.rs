//! Eight lanes in plain Rust, for the compiler to map onto whatever the target has.

use super::{Simd, Tile};
use std::array::from_fn;

#[derive(Clone, Copy)]
pub(super) struct Portable8([f32; 8]);

impl Tile for Portable8 {
    const TILE_ROWS: usize = 2;
}

impl Simd for Portable8 {
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 8])
    }

    #[inline(always)]
    unsafe fn load_ptr(src: *const f32) -> Self {
        // SAFETY: the caller vouches for eight readable elements; an array of f32 is aligned like an f32.
        Self(unsafe { src.cast::<[f32; 8]>().read() })
    }

    #[inline(always)]
    unsafe fn load_upper_halves(src: *const u16) -> Self {
        // SAFETY: the caller vouches for eight readable elements; an array of u16 is aligned like a u16.
        let halves = unsafe { src.cast::<[u16; 8]>().read() };
        Self(from_fn(|i| f32::from_bits(u32::from(halves[i]) << 16)))
    }

    #[inline(always)]
    unsafe fn store_ptr(self, dst: *mut f32) {
        // SAFETY: the caller vouches for eight writable elements; an array of f32 is aligned like an f32.
        unsafe { dst.cast::<[f32; 8]>().write(self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(from_fn(|i| self.0[i] - other.0[i]))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(from_fn(|i| self.0[i] * other.0[i]))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(from_fn(|i| self.0[i] / other.0[i]))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Not `f32::mul_add`: without the instruction that is a library call per lane.
        Self(from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(from_fn(|i| if self.0[i] > other.0[i] { self.0[i] } else { other.0[i] }))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(from_fn(|i| if self.0[i] < other.0[i] { self.0[i] } else { other.0[i] }))
    }

    #[inline(always)]
    fn round(self) -> Self {
        // Adding 1.5 * 2^23 leaves no bits for the fraction, so the addition itself rounds.
        const SHIFT: f32 = 12_582_912.0;
        Self(from_fn(|i| (self.0[i] + SHIFT) - SHIFT))
    }

    #[inline(always)]
    fn pow2(self) -> Self {
        Self(from_fn(|i| f32::from_bits(((self.0[i] as i32).wrapping_add(127) as u32) << 23)))
    }

    #[inline(always)]
    fn select_less(self, bound: Self, below: Self, otherwise: Self) -> Self {
        Self(from_fn(|i| if self.0[i] < bound.0[i] { below.0[i] } else { otherwise.0[i] }))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
