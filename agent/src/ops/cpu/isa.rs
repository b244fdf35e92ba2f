//! Instruction sets: which kernels this processor can run, and the few instructions that Rust does not reach itself.
//!
//! A kernel is written once, over arrays of [`LANES`] numbers and the [`Simd`] trait, and compiled for each set by
//! [`dispatch!`]. All sets give the same bits: integer sums are exact, and sums of floats keep their order and use
//! fused multiply-adds everywhere, where an instruction is missing by computing what it would give.

use half::f16;

/// Numbers in a vector, and outputs in a group of weights.
pub const LANES: usize = 16;

/// A vector. Wide registers hold it whole, narrow ones in parts.
pub type Lanes = [f32; LANES];

/// Inputs that share a scale in quantized weights and activations.
pub const BLOCK: usize = 32;

/// Bytes of a block of int4 weights of a group: nibbles, scales, minima.
pub const INT4_BYTES: usize = LANES * BLOCK / 2 + 2 * LANES * 2;

/// The same without minima, where each is -8 times its scale.
pub const SYMMETRIC_BYTES: usize = LANES * BLOCK / 2 + LANES * 2;

/// Bytes of a block of int8 weights of a group: values, scales.
pub const INT8_BYTES: usize = LANES * BLOCK + LANES * 2;

/// A set of instructions that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with VNNI: one instruction multiplies and adds 64 bytes.
    Avx512,
    Avx2,
    /// Whatever the target has.
    Portable,
}

impl Isa {
    pub const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Portable];

    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Whether this processor has it.
    pub fn available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                    && Self::Avx2.available()
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Portable => true,
        }
    }

    /// The fastest that this processor has.
    pub fn best() -> Self {
        Self::ALL.into_iter().find(|isa| isa.available()).expect("the portable one is always there")
    }
}

/// Runs an expression compiled for an instruction set, which the expression knows as `$simd`.
///
/// What it calls must be `#[inline(always)]`, or it is compiled for the bare target.
macro_rules! dispatch {
    ($isa:expr, $simd:ident => $run:expr) => {{
        let isa: $crate::ops::cpu::isa::Isa = $isa;
        assert!(isa.available(), "the processor has the instructions of its kernels");
        match isa {
            #[cfg(target_arch = "x86_64")]
            $crate::ops::cpu::isa::Isa::Avx512 => {
                let $simd = $crate::ops::cpu::isa::x86::Avx512;
                // SAFETY: the processor has the instructions, as was just checked.
                unsafe {
                    $crate::ops::cpu::isa::x86::with_avx512(
                        #[inline(always)]
                        || $run,
                    )
                }
            }
            #[cfg(target_arch = "x86_64")]
            $crate::ops::cpu::isa::Isa::Avx2 => {
                let $simd = $crate::ops::cpu::isa::x86::Avx2;
                // SAFETY: as above.
                unsafe {
                    $crate::ops::cpu::isa::x86::with_avx2(
                        #[inline(always)]
                        || $run,
                    )
                }
            }
            _ => {
                let $simd = $crate::ops::cpu::isa::Portable;
                $run
            }
        }
    }};
}
pub(crate) use dispatch;

/// Activations that were quantized for a product: `rows` of `blocks` blocks.
#[derive(Debug, Clone, Copy)]
pub struct Acts<'a> {
    /// Values, -127 to 127, `[rows, blocks * BLOCK]`.
    pub values: &'a [i8],
    /// The same, wider; empty where no kernel reads them.
    pub wide: &'a [i16],
    /// `[rows, blocks]`.
    pub scales: &'a [f32],
    /// Scale times the sum of a block's values, `[rows, blocks]`.
    pub sums: &'a [f32],
    pub blocks: usize,
}

/// What differs between instruction sets.
pub trait Simd: Copy {
    /// Rows of activations that a product computes at once.
    const ROWS: usize;
    /// Whether the int8 product reads [`Acts::wide`].
    const WIDE: bool;
    /// Vectors that sums can be held in while others come and go.
    const SUMS: usize;

    /// Numbers in registers, as many as [`LANES`].
    type Vector: Copy;

    fn load(self, x: &Lanes) -> Self::Vector;
    fn store(self, x: Self::Vector, to: &mut Lanes);
    fn splat(self, x: f32) -> Self::Vector;
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, rounded once.
    fn fused(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    fn widen(self, x: &[f16; LANES]) -> Self::Vector;
    /// Says that the line of memory at `x` will be read soon.
    fn soon<T>(self, x: &T);
    /// Rounds to nearest, ties to even.
    fn narrow(self, x: &Lanes) -> [f16; LANES];

    /// Multiplies `M` rows of activations, from `row` on, with a group of int4 weights in blocks of `BYTES`.
    ///
    /// For each block, in order: `y += integer * (scale of weights * scale of activations)`, then
    /// `y += minimum * sum`, each fused.
    fn int4<const M: usize, const BYTES: usize>(self, weights: &[u8], acts: &Acts<'_>, row: usize) -> [Lanes; M];

    /// The same for int8 weights, which have no minimum.
    fn int8<const M: usize>(self, weights: &[u8], acts: &Acts<'_>, row: usize) -> [Lanes; M];
}

/// Kernels in plain Rust.
#[derive(Debug, Clone, Copy)]
pub struct Portable;

/// The scales (or minima) of a block, which begin at byte `at`.
#[inline(always)]
fn scales(block: &[u8], at: usize) -> Lanes {
    std::array::from_fn(|lane| f16::from_le_bytes([block[at + 2 * lane], block[at + 2 * lane + 1]]).to_f32_const())
}

impl Simd for Portable {
    const ROWS: usize = 4;
    const WIDE: bool = false;
    const SUMS: usize = 4;

    type Vector = Lanes;

    #[inline(always)]
    fn load(self, x: &Lanes) -> Lanes {
        *x
    }
    #[inline(always)]
    fn store(self, x: Lanes, to: &mut Lanes) {
        *to = x;
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn fused(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn widen(self, x: &[f16; LANES]) -> Lanes {
        x.map(f16::to_f32_const)
    }
    #[inline(always)]
    fn soon<T>(self, _x: &T) {}
    #[inline(always)]
    fn narrow(self, x: &Lanes) -> [f16; LANES] {
        x.map(f16::from_f32_const)
    }

    #[inline(always)]
    fn int4<const M: usize, const BYTES: usize>(self, weights: &[u8], acts: &Acts<'_>, row: usize) -> [Lanes; M] {
        let mut out = [[0.0; LANES]; M];
        for (index, block) in weights.chunks_exact(BYTES).enumerate() {
            let scale = scales(block, LANES * BLOCK / 2);
            let minimum = match BYTES {
                SYMMETRIC_BYTES => scale.map(|scale| -8.0 * scale),
                _ => scales(block, LANES * BLOCK / 2 + 2 * LANES),
            };
            for (m, out) in out.iter_mut().enumerate() {
                let at = (row + m) * acts.blocks + index;
                let values = &acts.values[at * BLOCK..][..BLOCK];
                let (act_scale, act_sum) = (acts.scales[at], acts.sums[at]);
                for lane in 0..LANES {
                    let mut sum = 0_i32;
                    for k in 0..BLOCK / 2 {
                        let byte = block[k / 4 * 4 * LANES + lane * 4 + k % 4];
                        sum += i32::from(byte & 15) * i32::from(values[k]);
                        sum += i32::from(byte >> 4) * i32::from(values[k + BLOCK / 2]);
                    }
                    out[lane] = (sum as f32).mul_add(scale[lane] * act_scale, out[lane]);
                    out[lane] = minimum[lane].mul_add(act_sum, out[lane]);
                }
            }
        }
        out
    }

    #[inline(always)]
    fn int8<const M: usize>(self, weights: &[u8], acts: &Acts<'_>, row: usize) -> [Lanes; M] {
        let mut out = [[0.0; LANES]; M];
        for (index, block) in weights.chunks_exact(INT8_BYTES).enumerate() {
            let scale = scales(block, LANES * BLOCK);
            for (m, out) in out.iter_mut().enumerate() {
                let at = (row + m) * acts.blocks + index;
                let values = &acts.values[at * BLOCK..][..BLOCK];
                for lane in 0..LANES {
                    let weight = |k: usize| i32::from(block[k / 4 * 4 * LANES + lane * 4 + k % 4].cast_signed());
                    let sum: i32 = values.iter().enumerate().map(|(k, value)| weight(k) * i32::from(*value)).sum();
                    out[lane] = (sum as f32).mul_add(scale[lane] * acts.scales[at], out[lane]);
                }
            }
        }
        out
    }
}

#[cfg(target_arch = "x86_64")]
pub mod x86 {
    //! Kernels with the instructions of x86-64 processors.

    use std::arch::x86_64::*;

    use super::*;

    /// Runs what is inlined into it with AVX-512 instructions.
    ///
    /// # Safety
    /// The processor has them.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub fn with_avx512<R>(run: impl FnOnce() -> R) -> R {
        run()
    }

    /// Runs what is inlined into it with AVX2 instructions.
    ///
    /// # Safety
    /// The processor has them.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn with_avx2<R>(run: impl FnOnce() -> R) -> R {
        run()
    }

    /// Only made inside [`with_avx2`].
    #[derive(Debug, Clone, Copy)]
    pub struct Avx2;

    /// Only made inside [`with_avx512`].
    #[derive(Debug, Clone, Copy)]
    pub struct Avx512;

    /// Checks once what the loops below rely on: `M` rows of activations from `row` on, and weights for their blocks.
    #[inline(always)]
    fn check<const M: usize>(weights: &[u8], block_bytes: usize, acts: &Acts<'_>, row: usize) {
        let blocks = (row + M) * acts.blocks;
        assert!(weights.len() >= acts.blocks * block_bytes, "weights hold the blocks");
        assert!(acts.values.len() >= blocks * BLOCK, "activations hold the rows");
        assert!(acts.scales.len() >= blocks && acts.sums.len() >= blocks, "activations have scales");
    }

    /// # Safety
    /// The processor has F16C.
    #[inline(always)]
    unsafe fn narrow(x: &Lanes) -> [f16; LANES] {
        // SAFETY: reads 64 bytes of `x`, writes 32 bytes of `out`.
        unsafe {
            let mut out = [f16::ZERO; LANES];
            let half = |at| _mm256_cvtps_ph(_mm256_loadu_ps(x.as_ptr().add(at)), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128(out.as_mut_ptr().cast(), half(0));
            _mm_storeu_si128(out.as_mut_ptr().add(8).cast(), half(8));
            out
        }
    }

    #[inline(always)]
    fn soon<T>(x: &T) {
        // SAFETY: a hint, which cannot fault.
        unsafe { _mm_prefetch(std::ptr::from_ref(x).cast(), _MM_HINT_T0) }
    }

    /// Says that what lies a few blocks of weights ahead will be read soon. With the work of several rows between two
    /// blocks the processor does not look that far by itself; with one row it does, and is only held up by being told.
    #[inline(always)]
    fn ahead<const M: usize, const BYTES: usize>(block: *const u8) {
        if M < 4 {
            return;
        }
        for line in (0..BYTES).step_by(64) {
            // SAFETY: a hint, which cannot fault, wherever it points.
            unsafe { _mm_prefetch(block.wrapping_add(2048 + line).cast(), _MM_HINT_T0) }
        }
    }

    impl Simd for Avx2 {
        const ROWS: usize = 4;
        const WIDE: bool = true;
        const SUMS: usize = 4;

        type Vector = [__m256; 2];

        #[inline(always)]
        fn load(self, x: &Lanes) -> [__m256; 2] {
            // SAFETY: the processor has the instructions where there is an `Avx2`; reads 64 bytes of `x`.
            unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
        }
        #[inline(always)]
        fn store(self, x: [__m256; 2], to: &mut Lanes) {
            // SAFETY: as above; writes 64 bytes of `to`.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), x[1]);
            }
        }
        #[inline(always)]
        fn splat(self, x: f32) -> [__m256; 2] {
            // SAFETY: as above.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: as above.
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }
        #[inline(always)]
        fn fused(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: as above.
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }
        #[inline(always)]
        fn widen(self, x: &[f16; LANES]) -> [__m256; 2] {
            // SAFETY: as above; reads 32 bytes of `x`.
            unsafe {
                let half = |at| _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(at).cast()));
                [half(0), half(8)]
            }
        }
        #[inline(always)]
        fn soon<T>(self, x: &T) {
            soon(x);
        }
        #[inline(always)]
        fn narrow(self, x: &Lanes) -> [f16; LANES] {
            // SAFETY: as above.
            unsafe { narrow(x) }
        }

        #[inline(always)]
        fn int4<const M: usize, const BYTES: usize>(self, weights: &[u8], acts: &Acts<'_>, row: usize) -> [Lanes; M] {
            check::<M>(weights, BYTES, acts, row);
            let mut out = [[0.0; LANES]; M];
            // A register holds half a group.
            for half in 0..2 {
                // SAFETY: the processor has the instructions where there is an `Avx2`; by the check, every load lies in
                // a block of
                // `weights`, every store in a row of `out`.
                unsafe {
                    let (low, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
                    let mut sums = [_mm256_setzero_ps(); M];
                    for index in 0..acts.blocks {
                        let block = weights.as_ptr().add(index * BYTES);
                        if half == 0 {
                            ahead::<M, BYTES>(block);
                        }
                        let mut w = [_mm256_setzero_si256(); 8];
                        for j in 0..4 {
                            let both = _mm256_loadu_si256(block.add(j * 64 + half * 32).cast());
                            w[j] = _mm256_and_si256(both, low);
                            w[j + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                        }
                        let scales = block.add(LANES * BLOCK / 2 + half * LANES);
                        let scale = _mm256_cvtph_ps(_mm_loadu_si128(scales.cast()));
                        let minimum = match BYTES {
                            SYMMETRIC_BYTES => _mm256_mul_ps(scale, _mm256_set1_ps(-8.0)),
                            _ => _mm256_cvtph_ps(_mm_loadu_si128(scales.add(2 * LANES).cast())),
                        };
                        for (m, sum) in sums.iter_mut().enumerate() {
                            let at = (row + m) * acts.blocks + index;
                            let values = acts.values.as_ptr().add(at * BLOCK).cast::<i32>();
                            // A pair is at most 2 * 15 * 127, so eight of them fit 16 bits.
                            let mut pairs = _mm256_setzero_si256();
                            for (j, w) in w.iter().enumerate() {
                                let act = _mm256_set1_epi32(values.add(j).read_unaligned());
                                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(*w, act));
                            }
                            let exact = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
                            let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*acts.scales.as_ptr().add(at)));
                            *sum = _mm256_fmadd_ps(exact, scale, *sum);
                            *sum = _mm256_fmadd_ps(minimum, _mm256_set1_ps(*acts.sums.as_ptr().add(at)), *sum);
                        }
                    }
                    for (out, sum) in out.iter_mut().zip(sums) {
                        _mm256_storeu_ps(out.as_mut_ptr().add(half * 8), sum);
                    }
                }
            }
            out
        }

        #[inline(always)]
        fn int8<const M: usize>(self, weights: &[u8], acts: &Acts<'_>, row: usize) -> [Lanes; M] {
            check::<M>(weights, INT8_BYTES, acts, row);
            assert!(acts.wide.len() >= (row + M) * acts.blocks * BLOCK, "wide activations hold the rows");
            let mut out = [[0.0; LANES]; M];
            for half in 0..2 {
                // SAFETY: as in `int4`.
                unsafe {
                    let mut sums = [_mm256_setzero_ps(); M];
                    for index in 0..acts.blocks {
                        let block = weights.as_ptr().add(index * INT8_BYTES);
                        if half == 0 {
                            ahead::<M, INT8_BYTES>(block);
                        }
                        // Of each of eight outputs two partial sums: outputs 0 to 3, and 4 to 7.
                        let mut partial = [[_mm256_setzero_si256(); 2]; M];
                        for j in 0..BLOCK / 4 {
                            let w = _mm256_loadu_si256(block.add(j * 64 + half * 32).cast());
                            let w = [
                                _mm256_cvtepi8_epi16(_mm256_castsi256_si128(w)),
                                _mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1)),
                            ];
                            for (m, partial) in partial.iter_mut().enumerate() {
                                let at = ((row + m) * acts.blocks + index) * BLOCK;
                                let four = acts.wide.as_ptr().add(at).cast::<i64>().add(j);
                                let act = _mm256_set1_epi64x(four.read_unaligned());
                                partial[0] = _mm256_add_epi32(partial[0], _mm256_madd_epi16(w[0], act));
                                partial[1] = _mm256_add_epi32(partial[1], _mm256_madd_epi16(w[1], act));
                            }
                        }
                        let scale = _mm_loadu_si128(block.add(LANES * BLOCK + half * LANES).cast());
                        let scale = _mm256_cvtph_ps(scale);
                        for (m, sum) in sums.iter_mut().enumerate() {
                            // Adding neighbours leaves the halves of the register interleaved.
                            let both = _mm256_hadd_epi32(partial[m][0], partial[m][1]);
                            let exact = _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(both, 0b11_01_10_00));
                            let act_scale = _mm256_set1_ps(*acts.scales.as_ptr().add((row + m) * acts.blocks + index));
                            *sum = _mm256_fmadd_ps(exact, _mm256_mul_ps(scale, act_scale), *sum);
                        }
                    }
                    for (out, sum) in out.iter_mut().zip(sums) {
                        _mm256_storeu_ps(out.as_mut_ptr().add(half * 8), sum);
                    }
                }
            }
            out
        }
    }

    impl Simd for Avx512 {
        const ROWS: usize = 8;
        const WIDE: bool = false;
        const SUMS: usize = 16;

        type Vector = __m512;

        #[inline(always)]
        fn load(self, x: &Lanes) -> __m512 {
            // SAFETY: the processor has the instructions where there is an `Avx512`; reads 64 bytes of `x`.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, x: __m512, to: &mut Lanes) {
            // SAFETY: as above; writes 64 bytes of `to`.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
        }
        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn fused(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn widen(self, x: &[f16; LANES]) -> __m512 {
            // SAFETY: as above; reads 32 bytes of `x`.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
        }
        #[inline(always)]
        fn soon<T>(self, x: &T) {
            soon(x);
        }
        #[inline(always)]
        fn narrow(self, x: &Lanes) -> [f16; LANES] {
            // SAFETY: as above.
            unsafe { narrow(x) }
        }

        #[inline(always)]
        fn int4<const M: usize, const BYTES: usize>(self, weights: &[u8], acts: &Acts<'_>, row: usize) -> [Lanes; M] {
            check::<M>(weights, BYTES, acts, row);
            let mut out = [[0.0; LANES]; M];
            // SAFETY: the processor has the instructions where there is an `Avx512`; by the check, every load lies in a block of
            // `weights`, every store in a row of `out`.
            unsafe {
                let low = _mm512_set1_epi8(15);
                let mut sums = [_mm512_setzero_ps(); M];
                for index in 0..acts.blocks {
                    let block = weights.as_ptr().add(index * BYTES);
                    ahead::<M, BYTES>(block);
                    let mut w = [_mm512_setzero_si512(); 8];
                    for j in 0..4 {
                        let both = _mm512_loadu_si512(block.add(j * 64).cast());
                        w[j] = _mm512_and_si512(both, low);
                        w[j + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
                    }
                    let scales = block.add(LANES * BLOCK / 2);
                    let scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales.cast()));
                    let minimum = match BYTES {
                        SYMMETRIC_BYTES => _mm512_mul_ps(scale, _mm512_set1_ps(-8.0)),
                        _ => _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(2 * LANES).cast())),
                    };
                    for (m, sum) in sums.iter_mut().enumerate() {
                        let at = (row + m) * acts.blocks + index;
                        let values = acts.values.as_ptr().add(at * BLOCK).cast::<i32>();
                        let (mut a, mut b) = (_mm512_setzero_si512(), _mm512_setzero_si512());
                        for j in 0..4 {
                            let act = _mm512_set1_epi32(values.add(j).read_unaligned());
                            a = _mm512_dpbusd_epi32(a, w[j], act);
                            let act = _mm512_set1_epi32(values.add(j + 4).read_unaligned());
                            b = _mm512_dpbusd_epi32(b, w[j + 4], act);
                        }
                        let exact = _mm512_cvtepi32_ps(_mm512_add_epi32(a, b));
                        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*acts.scales.as_ptr().add(at)));
                        *sum = _mm512_fmadd_ps(exact, scale, *sum);
                        *sum = _mm512_fmadd_ps(minimum, _mm512_set1_ps(*acts.sums.as_ptr().add(at)), *sum);
                    }
                }
                for (out, sum) in out.iter_mut().zip(sums) {
                    _mm512_storeu_ps(out.as_mut_ptr(), sum);
                }
            }
            out
        }

        #[inline(always)]
        fn int8<const M: usize>(self, weights: &[u8], acts: &Acts<'_>, row: usize) -> [Lanes; M] {
            check::<M>(weights, INT8_BYTES, acts, row);
            let mut out = [[0.0; LANES]; M];
            // SAFETY: as in `int4`.
            unsafe {
                // The instruction wants one side without sign: activations plus 128, whose share is taken off again.
                let flip = _mm512_set1_epi8(-128);
                let ones = _mm512_set1_epi8(1);
                let mut sums = [_mm512_setzero_ps(); M];
                for index in 0..acts.blocks {
                    let block = weights.as_ptr().add(index * INT8_BYTES);
                    ahead::<M, INT8_BYTES>(block);
                    let mut w = [_mm512_setzero_si512(); 8];
                    let mut total = _mm512_setzero_si512();
                    for (j, w) in w.iter_mut().enumerate() {
                        *w = _mm512_loadu_si512(block.add(j * 64).cast());
                        total = _mm512_dpbusd_epi32(total, ones, *w);
                    }
                    let excess = _mm512_slli_epi32(total, 7);
                    let scale = _mm256_loadu_si256(block.add(LANES * BLOCK).cast());
                    let scale = _mm512_cvtph_ps(scale);
                    for (m, sum) in sums.iter_mut().enumerate() {
                        let at = (row + m) * acts.blocks + index;
                        let values = acts.values.as_ptr().add(at * BLOCK).cast::<i32>();
                        let (mut a, mut b) = (_mm512_setzero_si512(), _mm512_setzero_si512());
                        for j in 0..4 {
                            let act = _mm512_set1_epi32(values.add(j).read_unaligned());
                            a = _mm512_dpbusd_epi32(a, _mm512_xor_si512(act, flip), w[j]);
                            let act = _mm512_set1_epi32(values.add(j + 4).read_unaligned());
                            b = _mm512_dpbusd_epi32(b, _mm512_xor_si512(act, flip), w[j + 4]);
                        }
                        let exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(a, b), excess));
                        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*acts.scales.as_ptr().add(at)));
                        *sum = _mm512_fmadd_ps(exact, scale, *sum);
                    }
                }
                for (out, sum) in out.iter_mut().zip(sums) {
                    _mm512_storeu_ps(out.as_mut_ptr(), sum);
                }
            }
            out
        }
    }
}
