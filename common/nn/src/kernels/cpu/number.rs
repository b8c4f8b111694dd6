//! Types that weights come and are kept in.

use half::bf16;
use half::vec::HalfBitsVecExt;

use super::simd::Simd;

/// What every kernel computes with is fp32; this is fp32 or a part of it.
#[expect(private_bounds, reason = "nothing else is a number that kernels can read")]
pub trait Number: Lanes + Copy + Default + Send + Sync + 'static {
    /// The same number.
    fn widen(self) -> f32;
}

/// Numbers as they go into registers.
pub(super) trait Lanes: Sized {
    /// Memory that is taken as it is written.
    fn zeros(len: usize) -> Vec<Self>;

    /// The next lanes, widened.
    ///
    /// # Safety
    /// `src` is readable for `S::LANES` elements.
    unsafe fn load<S: Simd>(src: *const Self) -> S;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Lanes for f32 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0.0; len]
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(src: *const Self) -> S {
        // SAFETY: forwarded to the caller.
        unsafe { S::load_ptr(src) }
    }
}

impl Number for bf16 {
    /// Without the branch for signalling NaNs of [`bf16::to_f32`].
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Lanes for bf16 {
    fn zeros(len: usize) -> Vec<Self> {
        // The standard library asks the system for zeros where they are those of a type of its own.
        vec![0_u16; len].reinterpret_into()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(src: *const Self) -> S {
        // SAFETY: forwarded to the caller; a bf16 is its bits.
        unsafe { S::load_upper_halves(src.cast()) }
    }
}
