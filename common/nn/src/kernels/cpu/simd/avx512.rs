//! Sixteen lanes: AVX-512F.

use super::{Kernel, Simd, Tile, avx2};
use std::arch::x86_64::*;

/// # Safety
/// The CPU supports avx512f.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

macro_rules! avx512 {
    ($operation:expr) => {
        // SAFETY: values of this type exist only inside `run`, whose caller detected avx512f.
        Self(unsafe { $operation })
    };
}

impl Tile for Avx512 {
    const TILE_ROWS: usize = 12;
}

impl Simd for Avx512 {
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        avx512!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    unsafe fn load_ptr(src: *const f32) -> Self {
        avx512!(_mm512_loadu_ps(src))
    }

    #[inline(always)]
    unsafe fn load_upper_halves(src: *const u16) -> Self {
        avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(src.cast())))))
    }

    #[inline(always)]
    unsafe fn store_ptr(self, dst: *mut f32) {
        // SAFETY: as in the macro above; the caller vouches for `dst`.
        unsafe { _mm512_storeu_ps(dst, self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        avx512!(_mm512_add_ps(self.0, other.0))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        avx512!(_mm512_sub_ps(self.0, other.0))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        avx512!(_mm512_mul_ps(self.0, other.0))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        avx512!(_mm512_div_ps(self.0, other.0))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        avx512!(_mm512_fmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        avx512!(_mm512_max_ps(self.0, other.0))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        avx512!(_mm512_min_ps(self.0, other.0))
    }

    #[inline(always)]
    fn round(self) -> Self {
        avx512!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0))
    }

    #[inline(always)]
    fn pow2(self) -> Self {
        avx512!({
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }

    #[inline(always)]
    fn select_less(self, bound: Self, below: Self, otherwise: Self) -> Self {
        avx512!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, bound.0), otherwise.0, below.0))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as in the macro above; avx512f implies avx2.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
            avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(self.0), high))
        }
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        // SAFETY: as in the macro above; avx512f implies avx2.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
            avx2::largest(_mm256_max_ps(_mm512_castps512_ps256(self.0), high))
        }
    }
}
