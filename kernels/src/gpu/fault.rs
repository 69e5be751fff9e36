//! What an error of a device means for those who wait: try less, or give up.

/// Kind of a device's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An allocation failed; what is loaded is unharmed.
    OutOfMemory,
    /// The device, or this process's hold on it, is gone: after such an error every further call fails too, and only a
    /// new process can start over.
    Lost,
    /// Anything else: an argument, a shape, a missing kernel.
    Other,
}

/// Codes after which a context is of no use any more, as the driver names them; those after which an exchange between GPUs
/// is not, as NCCL does; and the call that ends one.
const LOST: [&str; 26] = [
    "CUDA_ERROR_DEINITIALIZED",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_INVALID_CONTEXT",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_CONTAINED",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    "CUDA_ERROR_MPS_CLIENT_TERMINATED",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_SYSTEM_NOT_READY",
    "CUDA_ERROR_UNKNOWN",
    "ncclUnhandledCudaError",
    "ncclSystemError",
    "ncclInternalError",
    "ncclRemoteError",
    "ncclCommAbort",
];

/// Allocations that failed, as the driver, its runtime and cuBLAS name them.
const OUT_OF_MEMORY: [&str; 3] =
    ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "kIOGPUCommandBufferCallbackErrorOutOfMemory"];

impl Fault {
    /// Reads it from an error's text.
    ///
    /// Errors arrive through several layers that keep nothing but the text; the codes in it are names that nothing else
    /// is called, and the text is the same in builds that have no CUDA types.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let mut words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        // A lost device may fail to allocate, too: being lost outweighs.
        if words.clone().any(|word| LOST.contains(&word)) {
            Self::Lost
        } else if words.any(|word| OUT_OF_MEMORY.contains(&word)) {
            Self::OutOfMemory
        } else {
            Self::Other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_found_in_the_texts_that_carry_them() {
        for (text, fault) in [
            ("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")", Fault::OutOfMemory),
            ("CublasError(CUBLAS_STATUS_ALLOC_FAILED)", Fault::OutOfMemory),
            (
                "layer 3\nDriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")",
                Fault::Lost,
            ),
            ("DriverError(CUDA_ERROR_LAUNCH_FAILED, \"unspecified launch failure\")", Fault::Lost),
            ("CUDA_ERROR_OUT_OF_MEMORY after CUDA_ERROR_ECC_UNCORRECTABLE", Fault::Lost),
            ("DriverError(CUDA_ERROR_INVALID_VALUE, \"invalid argument\")", Fault::Other),
            // Launching with too many threads harms nothing.
            ("DriverError(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, \"too many resources\")", Fault::Other),
            ("CUDA_ERROR_ASSERTION", Fault::Other),
            ("NcclRank: ncclCommAbort has ended the exchange between the GPUs", Fault::Lost),
            ("NcclRank: NCCL says ncclRemoteError", Fault::Lost),
            ("NcclRank: NCCL says ncclInvalidArgument", Fault::Other),
            ("unexpected rank, expected: 2", Fault::Other),
            ("", Fault::Other),
        ] {
            assert_eq!(Fault::of(text), fault, "{text}");
        }
    }

    /// The names are the driver's: a slip of the pen would make a lost device an ordinary error.
    #[cfg(feature = "cuda")]
    #[test]
    fn names_are_those_of_the_driver() {
        use candle_core::cuda_backend::cudarc::driver::{DriverError, sys::CUresult};
        let sticky = [
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            CUresult::CUDA_ERROR_LAUNCH_FAILED,
            CUresult::CUDA_ERROR_ASSERT,
            CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
            CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
            CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
            CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR,
            CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
            CUresult::CUDA_ERROR_INVALID_PC,
            CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE,
            CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
            CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED,
            CUresult::CUDA_ERROR_UNKNOWN,
        ];
        for code in sticky {
            assert_eq!(Fault::of(&DriverError(code).to_string()), Fault::Lost, "{code:?}");
        }
        let full = DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY).to_string();
        assert_eq!(Fault::of(&full), Fault::OutOfMemory);
    }
}
