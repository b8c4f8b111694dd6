//! Sums of products of bytes in 32-bit registers, one type per instruction set.

use super::{Isa, Kind, Tile};

/// Neighbouring bytes that are multiplied and added into one 32-bit lane.
pub(in super::super) const DEPTH: usize = 4;

/// A register of `i32` sums. Only [`Isa::run_bytes`] may choose the type, after it saw that the CPU supports it.
pub(in super::super) trait ByteDot: Tile {
    const LANES: usize;
    /// What quantised numbers are combined with before they are stored: 128 for instructions that take one side
    /// unsigned.
    const FLIP: u8;

    fn zero() -> Self;

    /// Adds to every lane the product of `left`, [`DEPTH`] bytes, with its own [`DEPTH`] bytes of `right`.
    ///
    /// # Safety
    /// `right` is readable for `LANES * DEPTH` bytes.
    unsafe fn dot(self, left: [u8; DEPTH], right: *const i8) -> Self;

    /// # Safety
    /// `dst` is writable for `LANES` elements.
    unsafe fn store_ptr(self, dst: *mut i32);
}

/// A computation that is compiled once per instruction set. `run` must be `#[inline(always)]`.
pub(in super::super) trait ByteKernel {
    type Output;
    fn run<B: ByteDot>(self) -> Self::Output;
}

impl Isa {
    #[inline]
    pub(in super::super) fn run_bytes<K: ByteKernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: the features have been detected.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 if is_x86_feature_detected!("avx512vnni") => unsafe { x86::run_vnni(kernel) },
            // SAFETY: an Isa of this kind is only made after detection, and avx512f implies avx2.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Avx2 => unsafe { x86::run_avx2(kernel) },
            Kind::Portable => kernel.run::<Portable>(),
        }
    }
}

#[derive(Clone, Copy)]
struct Portable([i32; 8]);

impl Tile for Portable {
    const TILE_ROWS: usize = 4;
}

impl ByteDot for Portable {
    const LANES: usize = 8;
    const FLIP: u8 = 0;

    #[inline(always)]
    fn zero() -> Self {
        Self([0; 8])
    }

    #[inline(always)]
    unsafe fn dot(mut self, left: [u8; DEPTH], right: *const i8) -> Self {
        // SAFETY: the caller vouches for LANES * DEPTH bytes, which have no alignment.
        let right = unsafe { &*right.cast::<[[i8; DEPTH]; 8]>() };
        for (sum, right) in self.0.iter_mut().zip(right) {
            for (left, right) in left.iter().zip(right) {
                *sum += i32::from(left.cast_signed()) * i32::from(*right);
            }
        }
        self
    }

    #[inline(always)]
    unsafe fn store_ptr(self, dst: *mut i32) {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { dst.cast::<[i32; 8]>().write_unaligned(self.0) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{ByteDot, ByteKernel, DEPTH, Tile};

    /// # Safety
    /// The CPU supports avx512f and avx512vnni.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn run_vnni<K: ByteKernel>(kernel: K) -> K::Output {
        kernel.run::<Vnni>()
    }

    /// # Safety
    /// The CPU supports avx2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn run_avx2<K: ByteKernel>(kernel: K) -> K::Output {
        kernel.run::<Avx2>()
    }

    /// AVX-512 with VNNI: unsigned times signed bytes, without overflow.
    #[derive(Clone, Copy)]
    pub(super) struct Vnni(__m512i);

    impl Tile for Vnni {
        const TILE_ROWS: usize = 12;
    }

    impl ByteDot for Vnni {
        const LANES: usize = 16;
        const FLIP: u8 = 128;

        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: values of this type exist only inside `run_vnni`, whose caller detected its features.
            Self(unsafe { _mm512_setzero_si512() })
        }

        #[inline(always)]
        unsafe fn dot(self, left: [u8; DEPTH], right: *const i8) -> Self {
            // SAFETY: as above; the caller vouches for `right`.
            unsafe {
                let left = _mm512_set1_epi32(i32::from_ne_bytes(left));
                Self(_mm512_dpbusd_epi32(self.0, left, _mm512_loadu_si512(right.cast())))
            }
        }

        #[inline(always)]
        unsafe fn store_ptr(self, dst: *mut i32) {
            // SAFETY: as above; the caller vouches for `dst`.
            unsafe { _mm512_storeu_si512(dst.cast(), self.0) }
        }
    }

    /// AVX2: magnitudes of the left side times the right side with the left one's signs. Two such products are below
    /// 2 * 127 * 127, which 16 bits hold.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2(__m256i);

    impl Tile for Avx2 {
        const TILE_ROWS: usize = 4;
    }

    impl ByteDot for Avx2 {
        const LANES: usize = 8;
        const FLIP: u8 = 0;

        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: values of this type exist only inside `run_avx2`, whose caller detected avx2.
            Self(unsafe { _mm256_setzero_si256() })
        }

        #[inline(always)]
        unsafe fn dot(self, left: [u8; DEPTH], right: *const i8) -> Self {
            // SAFETY: as above; the caller vouches for `right`.
            unsafe {
                let left = _mm256_set1_epi32(i32::from_ne_bytes(left));
                let right = _mm256_sign_epi8(_mm256_loadu_si256(right.cast()), left);
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(left), right);
                Self(_mm256_add_epi32(self.0, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))
            }
        }

        #[inline(always)]
        unsafe fn store_ptr(self, dst: *mut i32) {
            // SAFETY: as above; the caller vouches for `dst`.
            unsafe { _mm256_storeu_si256(dst.cast(), self.0) }
        }
    }
}
