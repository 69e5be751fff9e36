//! How the process's allocator treats memory between steps.

/// Gives back what loading has freed, and from then on keeps what steps free.
///
/// A step allocates its activations and frees them; a layer of a long prompt needs tens of megabytes. By default the C
/// library returns blocks of that size to the system each time, and every page of the next one costs a fault. Only
/// glibc is told; nothing depends on it.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// What glibc allows at most.
        const LARGEST_BLOCK: libc::c_int = 32 << 20;
        const KEPT: libc::c_int = 256 << 20;
        // SAFETY: these calls change settings of the allocator, and give back pages that hold nothing.
        unsafe {
            libc::malloc_trim(0);
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_BLOCK);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        }
    }
}
