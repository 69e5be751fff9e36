//! Which instruction set the kernels use.

use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// The matrix unit of AMX: for bf16 weights (activations are then rounded to bf16, too), for whole-number weights with
    /// many rows, for attention over caches of bf16 and bytes (queries are then rounded). All else as `Avx512Vnni`.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// Multiply-adds of 16-bit floats for bf16 and f16 weights and for attention over caches of bf16 and f16, which are f16
    /// with a scale for each token and head here (sums of at most 128 products, then f32). All else as `Avx512Vnni`.
    #[cfg(target_arch = "x86_64")]
    Avx512Fp16,
    /// Dot products of bf16 pairs for bf16 weights (activations are then rounded to bf16, too), for attention over caches
    /// of bf16 and bytes (queries are then rounded), and for attention without a cache that may be rounded. All else as
    /// `Avx512Vnni`.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// AVX-512 F/BW/VL/DQ and the byte dot products of VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// AVX-512 F/BW/VL/DQ.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// NEON and the byte dot products of ARMv8.2.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
    /// NEON, which every 64-bit ARM processor has.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// What the compiler makes of plain loops.
    Portable,
}

impl Isa {
    /// All sets that this processor has, best first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq");
            if avx2 && avx512 && is_x86_feature_detected!("avx512vnni") {
                if super::amx::is_available() {
                    sets.push(Self::Amx);
                }
                if is_x86_feature_detected!("avx512fp16") {
                    sets.push(Self::Avx512Fp16);
                }
                let (bf16, fast) = (is_x86_feature_detected!("avx512bf16"), super::bf16_gemm::is_fast());
                if bf16 && fast {
                    sets.push(Self::Avx512Bf16);
                }
                sets.push(Self::Avx512Vnni);
                if bf16 && !fast {
                    sets.push(Self::Avx512Bf16);
                }
            }
            if avx2 && avx512 {
                sets.push(Self::Avx512);
            }
            if avx2 {
                sets.push(Self::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                sets.push(Self::NeonDot);
            }
            sets.push(Self::Neon);
        }
        sets.push(Self::Portable);
        sets
    }

    /// What this set means for the models that are run, in a sentence.
    #[must_use]
    pub fn explanation(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => {
                "bf16 weights, attention over bf16 and int8 caches, and int8 and int4 weights with many rows on the \
                 matrix unit; few rows with byte dot products, the rest in vectors"
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Fp16 => {
                "bf16 and f16 weights and caches by 16-bit floats, their sums in f32; int8 and int4 weights with byte dot \
                 products"
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                "bf16 weights, and attention over bf16 and int8 caches, by dot products of bf16; int8 and int4 weights \
                 with byte dot products; the rest in vectors"
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                "f32 sums of bf16, f16 and f32 weights; int8 and int4 weights with byte dot products"
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "vectors of 512 bits; int8 and int4 weights save memory rather than time",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "vectors of 256 bits; int8 and int4 weights save memory rather than time",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => {
                "vectors of 128 bits, f32 sums of bf16, f16 and f32 weights; int8 and int4 weights with byte dot products"
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "vectors of 128 bits; int8 and int4 weights save memory rather than time",
            Self::Portable => "what the compiler makes of plain loops: everything works, slowly on x86-64",
        }
    }

    /// Name as the environment switch spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Fp16 => "avx512-fp16",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => "neon-dot",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            Self::Portable => "portable",
        }
    }
}

/// The set in use: the best available, or the one that the environment variable `INGLE_ISA` names, if this processor
/// has it.
#[must_use]
pub fn isa() -> Isa {
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let available = Isa::available();
        let wanted = std::env::var("INGLE_ISA").ok();
        let named = wanted.and_then(|name| available.iter().copied().find(|isa| isa.name() == name));
        named.unwrap_or(available[0])
    })
}
