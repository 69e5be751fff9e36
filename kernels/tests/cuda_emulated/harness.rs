//! Compiling, loading and launching; buffers with guards; formats of numbers.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

pub(crate) fn random(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// The library of all kernels, compiled once a test run; `None` where there is no C++ compiler.
struct Library {
    handle: *mut c_void,
    symbols: Mutex<HashMap<String, usize>>,
}

// SAFETY: a handle of dlopen may be used from any thread, and the library keeps its state in thread-local variables.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// A C++ compiler whose programs this process can load: tests may run in an emulator of another processor.
fn compiler() -> Option<String> {
    let wanted = std::env::var("CXX").ok().into_iter();
    let mut names = wanted.chain(["c++", "g++", "clang++"].map(str::to_owned));
    names.find(|name| {
        let output = Command::new(name).arg("-dumpmachine").output();
        output.is_ok_and(|output| {
            let machine = String::from_utf8_lossy(&output.stdout).replace("arm64", "aarch64");
            output.status.success() && machine.starts_with(std::env::consts::ARCH)
        })
    })
}

fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    LIBRARY.get_or_init(|| compiler().map(|compiler| build(&compiler))).as_ref()
}

/// Whether kernels can be run; says so if not.
pub(crate) fn available() -> bool {
    if library().is_none() {
        eprintln!("SKIPPED: there is no C++ compiler for this processor, so the CUDA kernels were not run");
    }
    library().is_some()
}

fn build(compiler: &str) -> Library {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda-emulated-{}", std::process::id()));
    std::fs::create_dir_all(&out).expect("a folder for the library");
    let mut files: Vec<_> = std::fs::read_dir(&sources)
        .expect("the kernels")
        .filter_map(|file| Some(file.ok()?.path()))
        .collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    files.sort();
    assert!(!files.is_empty(), "there are kernels");
    // One compiler a file, side by side: a handful of seconds in all.
    let objects: Vec<_> = files
        .iter()
        .map(|file| {
            let object = out.join(file.file_name().expect("a name")).with_extension("o");
            let mut command = Command::new(compiler);
            command.args([
                "-x",
                "c++",
                "-std=c++17",
                "-O1",
                "-fPIC",
                "-U_FORTIFY_SOURCE",
                "-ffp-contract=off",
                "-w",
            ]);
            command.arg("-DINGLE_EMULATE").arg("-I").arg(&sources).arg("-c").arg(file).arg("-o").arg(&object);
            (object, command.spawn().expect("the compiler was there a moment ago"))
        })
        .collect();
    let mut link = Command::new(compiler);
    let path = out.join("libkernels.so");
    link.arg("-shared").arg("-o").arg(&path);
    for (object, mut child) in objects {
        assert!(child.wait().is_ok_and(|status| status.success()), "{} does not compile", object.display());
        link.arg(object);
    }
    assert!(link.status().is_ok_and(|status| status.success()), "the kernels do not link");
    let name = CString::new(path.to_str().expect("a path of text")).expect("a path without zeros");
    // SAFETY: the library has no initialisers but those of its own empty state.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    // It stays mapped; nothing of it is left lying about.
    std::fs::remove_dir_all(&out).ok();
    assert!(!handle.is_null(), "the library of the kernels does not load");
    Library { handle, symbols: Mutex::new(HashMap::new()) }
}

/// As `emulation::Launch`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LaunchArgs {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    seed: u32,
}

type Entry = unsafe extern "C" fn(*const LaunchArgs, *mut *mut c_void) -> *const c_char;

/// The size of a launch.
#[derive(Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    pub(crate) shared_bytes: u32,
}

impl Grid {
    pub(crate) fn new(grid: [u32; 3], block: u32) -> Self {
        Self { grid, block, shared_bytes: 0 }
    }

    pub(crate) fn shared(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }
}

/// Pointers to the arguments of a kernel, in order; each argument must be of exactly the type the kernel declares.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &mut [$(std::ptr::from_ref(&$arg).cast::<std::ffi::c_void>().cast_mut()),*] };
}

/// Runs kernel `name` with the threads of each block in the order of `seed`.
pub(crate) fn try_launch(name: &str, grid: Grid, seed: u32, args: &mut [*mut c_void]) -> Result<(), String> {
    let library = library().expect("asked for before");
    let mut symbols = library.symbols.lock().expect("no panic under this lock");
    let symbol = *symbols.entry(name.to_owned()).or_insert_with(|| {
        let symbol = CString::new(format!("emulated_{name}")).expect("a name");
        // SAFETY: the handle is open, the name ends with a zero.
        (unsafe { libc::dlsym(library.handle, symbol.as_ptr()) }) as usize
    });
    drop(symbols);
    assert!(symbol != 0, "there is no kernel {name}");
    // SAFETY: LAUNCHABLE defines every `emulated_` symbol with this type.
    let entry: Entry = unsafe { std::mem::transmute(symbol) };
    let launch =
        LaunchArgs { grid: grid.grid, block: [grid.block, 1, 1], shared_bytes: grid.shared_bytes, seed };
    // SAFETY: the test gives the arguments that the kernel declares; buffers outlive the call.
    let error = unsafe { entry(&raw const launch, args.as_mut_ptr()) };
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: an error is a text that lives as long as the thread.
    Err(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned())
}

/// Orders of threads that every kernel is run in: forwards, backwards, shuffled.
pub(crate) const SEEDS: [u32; 3] = [0, 1, 7];

pub(crate) fn launch(name: &str, grid: Grid, seed: u32, args: &mut [*mut c_void]) {
    if let Err(error) = try_launch(name, grid, seed, args) {
        panic!("{name}: {error}");
    }
}

/// Memory of a kernel between two guards, aligned to 256 bytes plus an offset.
pub(crate) struct Buffer<T> {
    memory: Vec<u128>,
    start: usize,
    len: usize,
    kind: std::marker::PhantomData<T>,
}

const GUARD: usize = 4096;
const MARK: u8 = 0xff; // NaN in every format of floats here

impl<T: Copy> Buffer<T> {
    /// `values` where a kernel finds them.
    pub(crate) fn new(values: &[T]) -> Self {
        Self::with_offset(values, 0)
    }

    /// `len` elements of bytes 0xff: NaN in the formats of floats.
    pub(crate) fn unwritten(len: usize) -> Self {
        let bytes = len * size_of::<T>();
        let words = (bytes + 2 * GUARD + 256).div_ceil(16);
        let memory = vec![u128::from_ne_bytes([MARK; 16]); words];
        let address = memory.as_ptr() as usize + GUARD;
        let start = address.next_multiple_of(256) - memory.as_ptr() as usize;
        Self { memory, start, len, kind: std::marker::PhantomData }
    }

    /// As [`Buffer::new`], `offset` elements after an aligned address.
    pub(crate) fn with_offset(values: &[T], offset: usize) -> Self {
        let mut buffer = Self::unwritten(values.len() + offset);
        buffer.start += offset * size_of::<T>();
        buffer.len = values.len();
        // SAFETY: the buffer has room for `values`.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), buffer.address() as *mut T, values.len()) };
        buffer
    }

    /// The pointer that a kernel takes.
    pub(crate) fn address(&self) -> usize {
        self.memory.as_ptr() as usize + self.start
    }

    /// What it holds now. Panics if a guard was written to.
    pub(crate) fn read(&self) -> Vec<T> {
        let (end, all) = (self.start + self.len * size_of::<T>(), self.memory.len() * 16);
        // SAFETY: the bytes of the memory; kernels write to it through the address only.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast::<u8>(), all) };
        let guards = bytes[..self.start].iter().chain(&bytes[end..]);
        assert!(guards.into_iter().all(|byte| *byte == MARK), "a kernel wrote past its buffer");
        (0..self.len)
            // SAFETY: within the buffer and aligned; every T here is plain numbers.
            .map(|i| unsafe { std::ptr::read_unaligned((self.address() as *const T).add(i)) })
            .collect()
    }
}

/// The formats activations and caches have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    Bf16,
    F16,
    Fp8,
}

impl Format {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8 => "fp8",
        }
    }

    /// Step between 1 and the next number.
    pub(crate) fn epsilon(self) -> f32 {
        match self {
            Self::F32 => f32::EPSILON,
            Self::Bf16 => 1.0 / 128.0,
            Self::F16 => 1.0 / 1024.0,
            Self::Fp8 => 1.0 / 8.0,
        }
    }

    pub(crate) fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Fp8 => 1,
        }
    }

    /// The nearest number of the format, ties to even.
    pub(crate) fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::Bf16 => half::bf16::from_f32(x).to_f32(),
            Self::F16 => half::f16::from_f32(x).to_f32(),
            Self::Fp8 => fp8_to_f32(fp8_from_f32(x)),
        }
    }

    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        let bytes = values.iter().flat_map(|x| match self {
            Self::F32 => x.to_le_bytes().to_vec(),
            Self::Bf16 => half::bf16::from_f32(*x).to_le_bytes().to_vec(),
            Self::F16 => half::f16::from_f32(*x).to_le_bytes().to_vec(),
            Self::Fp8 => vec![fp8_from_f32(*x)],
        });
        bytes.collect()
    }

    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let values = bytes.chunks_exact(self.size()).map(|b| match self {
            Self::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Self::Bf16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Self::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
            Self::Fp8 => fp8_to_f32(b[0]),
        });
        values.collect()
    }
}

/// All 256 numbers of e4m3, from the definition.
pub(crate) fn fp8_to_f32(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 127) {
        (_, 127) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if bits & 128 == 0 { magnitude } else { -magnitude }
}

/// The nearest by search; ties to the even code; saturates.
pub(crate) fn fp8_from_f32(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 128 } else { 0 };
    if x.is_nan() {
        return 127;
    }
    let distance = |code: u8| (fp8_to_f32(code) - x.abs().min(512.0)).abs();
    let nearest =
        (0..127_u8).min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a % 2).cmp(&(b % 2))));
    sign | nearest.unwrap_or(0)
}

/// A kernel's buffer of numbers in `format`.
pub(crate) fn encoded(format: Format, values: &[f32]) -> Buffer<u8> {
    Buffer::new(&format.encode(values))
}

/// Room for `count` numbers of `format`.
pub(crate) fn room(format: Format, count: usize) -> Buffer<u8> {
    Buffer::unwritten(count * format.size())
}

/// Fails unless every number is as wanted within `relative` of it plus `absolute`.
pub(crate) fn assert_close(found: &[f32], wanted: &[f32], relative: f32, absolute: f32, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let allowed = relative * wanted.abs() + absolute;
        assert!((found - wanted).abs() <= allowed, "{what}: number {i} is {found}, wanted {wanted}");
    }
}
