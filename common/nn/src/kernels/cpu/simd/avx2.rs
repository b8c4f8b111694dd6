//! Eight lanes: AVX2 with FMA.

use super::{Kernel, Simd, Tile};
use std::arch::x86_64::*;

/// # Safety
/// The CPU supports avx2 and fma.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256);

macro_rules! avx2 {
    ($operation:expr) => {
        // SAFETY: values of this type exist only inside `run`, whose caller detected avx2 and fma.
        Self(unsafe { $operation })
    };
}

impl Tile for Avx2 {
    const TILE_ROWS: usize = 6;
}

impl Simd for Avx2 {
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        avx2!(_mm256_set1_ps(value))
    }

    #[inline(always)]
    unsafe fn load_ptr(src: *const f32) -> Self {
        avx2!(_mm256_loadu_ps(src))
    }

    #[inline(always)]
    unsafe fn load_upper_halves(src: *const u16) -> Self {
        avx2!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(src.cast())))))
    }

    #[inline(always)]
    unsafe fn store_ptr(self, dst: *mut f32) {
        // SAFETY: as in the macro above; the caller vouches for `dst`.
        unsafe { _mm256_storeu_ps(dst, self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        avx2!(_mm256_add_ps(self.0, other.0))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        avx2!(_mm256_sub_ps(self.0, other.0))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        avx2!(_mm256_mul_ps(self.0, other.0))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        avx2!(_mm256_div_ps(self.0, other.0))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        avx2!(_mm256_fmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        avx2!(_mm256_max_ps(self.0, other.0))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        avx2!(_mm256_min_ps(self.0, other.0))
    }

    #[inline(always)]
    fn round(self) -> Self {
        avx2!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0))
    }

    #[inline(always)]
    fn pow2(self) -> Self {
        avx2!({
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        })
    }

    #[inline(always)]
    fn select_less(self, bound: Self, below: Self, otherwise: Self) -> Self {
        avx2!(_mm256_blendv_ps(otherwise.0, below.0, _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, bound.0)))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as in the macro above.
        unsafe { sum(self.0) }
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        // SAFETY: as in the macro above.
        unsafe { largest(self.0) }
    }
}

/// The sum of all lanes: halves are added until one lane is left.
///
/// # Safety
/// The CPU supports avx2.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn sum(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// The largest lane, of lanes that are not NaN.
///
/// # Safety
/// The CPU supports avx2.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn largest(lanes: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}
