//! Whether a result may depend on what is computed beside it.

use std::sync::atomic::{AtomicBool, Ordering};

static DETERMINISTIC: AtomicBool = AtomicBool::new(false);

/// Has all products of bf16 and f16 activations on CUDA devices summed in an order that depends on the weights alone, for the
/// whole process.
///
/// By default the kernel is chosen by the number of rows: one for up to sixteen, another or a library beyond. Each of our
/// kernels gives a row the same bits in any company, but the two differ in the last bit, and a library promises nothing. Beside
/// fp8 weights the activations of more than sixteen rows may be rounded to fp8 as well. With this set one kernel computes all and
/// rounds no activations; few rows and long prompts then take longer. On the CPU results never depend on company.
pub fn set_deterministic(deterministic: bool) {
    DETERMINISTIC.store(deterministic, Ordering::Relaxed);
}

/// See [`set_deterministic`].
#[must_use]
pub fn is_deterministic() -> bool {
    DETERMINISTIC.load(Ordering::Relaxed)
}
