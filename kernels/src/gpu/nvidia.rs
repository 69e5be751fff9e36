//! The NVIDIA driver, opened by name when it is asked for.
//!
//! A program that is linked to the driver does not start where there is none. This one is not, and can say so.

use std::fmt;

/// What the driver says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// Newest CUDA that it can run, e.g. `(13, 0)`.
    pub cuda: (u32, u32),
    /// The GPUs this process may use, in the order of `cuda:N`.
    pub gpus: Vec<Gpu>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Name of the product.
    pub name: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Generation, e.g. `(9, 0)` for Hopper.
    pub compute_capability: (u32, u32),
}

/// Why there is no GPU to be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoGpu {
    /// `libcuda.so.1`, which is part of the driver, cannot be loaded.
    #[error("no NVIDIA driver: {0}")]
    NoDriver(String),
    /// The driver is there and refuses; the last number is its code.
    #[error("the NVIDIA driver gives no GPU: {function} says {text} ({code})")]
    Refused {
        /// The function that failed.
        function: &'static str,
        /// Name of the error.
        text: String,
        /// Its number.
        code: i32,
    },
    /// It knows of none; `CUDA_VISIBLE_DEVICES` may hide them.
    #[error("the NVIDIA driver knows of no GPU")]
    None,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        let gib = self.memory as f64 / f64::from(1 << 30);
        write!(f, "{}, {gib:.0} GiB, compute capability {major}.{minor}", self.name)
    }
}

/// Asks the driver.
///
/// # Errors
/// Why there is none, or no GPU.
pub fn nvidia() -> Result<Driver, NoGpu> {
    #[cfg(target_os = "linux")]
    return library::ask();
    #[cfg(not(target_os = "linux"))]
    Err(NoGpu::NoDriver("it is looked for on Linux only".to_owned()))
}

#[cfg(target_os = "linux")]
mod library {
    #![allow(unsafe_code, reason = "a library opened by name has no types but those written here")]

    use std::ffi::{CStr, c_char, c_int, c_void};

    use super::{Driver, Gpu, NoGpu};

    /// Of `cuDeviceGetAttribute`.
    const CAPABILITY_MAJOR: c_int = 75;
    const CAPABILITY_MINOR: c_int = 76;

    struct Library(*mut c_void);

    impl Library {
        fn open() -> Result<Self, NoGpu> {
            // SAFETY: the name ends with a zero. The library is never closed: drivers start threads.
            let handle =
                unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
            if handle.is_null() {
                // SAFETY: after a failure dlerror gives a string that ends with a zero, or null.
                let why = unsafe { libc::dlerror() };
                return Err(NoGpu::NoDriver(text(why)));
            }
            Ok(Self(handle))
        }

        /// A function of the library.
        ///
        /// # Safety
        /// `F` must be its type.
        unsafe fn function<F: Copy>(&self, name: &'static CStr) -> Result<F, NoGpu> {
            const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
            // SAFETY: the handle is open and the name ends with a zero.
            let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
            if address.is_null() {
                let name = name.to_string_lossy();
                return Err(NoGpu::NoDriver(format!("libcuda.so.1 has no {name}")));
            }
            // SAFETY: a function's address of the type that the caller vouches for; the sizes agree.
            Ok(unsafe { std::mem::transmute_copy(&address) })
        }

        fn check(&self, function: &'static str, code: c_int) -> Result<(), NoGpu> {
            if code == 0 {
                return Ok(());
            }
            type GetErrorName = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;
            let mut name = std::ptr::null();
            // SAFETY: the type is cuda.h's, and the pointer is valid for a write.
            let named =
                unsafe { self.function::<GetErrorName>(c"cuGetErrorName").map(|f| f(code, &mut name)) };
            let text = if named == Ok(0) { text(name) } else { "an error".to_owned() };
            Err(NoGpu::Refused { function, text, code })
        }
    }

    fn text(chars: *const c_char) -> String {
        if chars.is_null() {
            return "no reason given".to_owned();
        }
        // SAFETY: not null, and the callers' functions end their strings with a zero.
        unsafe { CStr::from_ptr(chars) }.to_string_lossy().into_owned()
    }

    type Init = unsafe extern "C" fn(u32) -> c_int;
    type GetInt = unsafe extern "C" fn(*mut c_int) -> c_int;
    type GetDevice = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
    type GetName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
    type TotalMem = unsafe extern "C" fn(*mut usize, c_int) -> c_int;
    type GetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;

    pub(super) fn ask() -> Result<Driver, NoGpu> {
        let cuda = Library::open()?;
        // SAFETY: the types are those of cuda.h.
        let (init, version, count) = unsafe {
            (
                cuda.function::<Init>(c"cuInit")?,
                cuda.function::<GetInt>(c"cuDriverGetVersion")?,
                cuda.function::<GetInt>(c"cuDeviceGetCount")?,
            )
        };
        let (mut number, mut gpus) = (0, 0);
        // SAFETY: the pointers are valid for a write; cuInit comes before all but the version.
        unsafe {
            cuda.check("cuInit", init(0))?;
            cuda.check("cuDriverGetVersion", version(&mut number))?;
            cuda.check("cuDeviceGetCount", count(&mut gpus))?;
        }
        if gpus <= 0 {
            return Err(NoGpu::None);
        }
        let gpus = (0..gpus).map(|ordinal| gpu(&cuda, ordinal)).collect::<Result<_, _>>()?;
        let number = u32::try_from(number).unwrap_or(0);
        Ok(Driver { cuda: (number / 1000, number % 1000 / 10), gpus })
    }

    fn gpu(cuda: &Library, ordinal: c_int) -> Result<Gpu, NoGpu> {
        // SAFETY: the types are those of cuda.h.
        let (get, name, memory, attribute) = unsafe {
            (
                cuda.function::<GetDevice>(c"cuDeviceGet")?,
                cuda.function::<GetName>(c"cuDeviceGetName")?,
                cuda.function::<TotalMem>(c"cuDeviceTotalMem_v2")?,
                cuda.function::<GetAttribute>(c"cuDeviceGetAttribute")?,
            )
        };
        let (mut device, mut bytes, mut major, mut minor) = (0, 0, 0, 0);
        let mut chars: [c_char; 256] = [0; 256];
        // SAFETY: the pointers are valid for a write, the name's for one byte less than the buffer has, so that it ends
        // with a zero whatever is written.
        unsafe {
            cuda.check("cuDeviceGet", get(&mut device, ordinal))?;
            cuda.check("cuDeviceGetName", name(chars.as_mut_ptr(), 255, device))?;
            cuda.check("cuDeviceTotalMem", memory(&mut bytes, device))?;
            cuda.check("cuDeviceGetAttribute", attribute(&mut major, CAPABILITY_MAJOR, device))?;
            cuda.check("cuDeviceGetAttribute", attribute(&mut minor, CAPABILITY_MINOR, device))?;
        }
        let number = |value: c_int| u32::try_from(value).unwrap_or(0);
        Ok(Gpu {
            name: text(chars.as_ptr()),
            memory: bytes as u64,
            compute_capability: (number(major), number(minor)),
        })
    }
}
