//! Large products by cuBLASLt.
//!
//! A thread has, for each of its devices, a handle, a workspace, and the kernels that were chosen. Numbers of tokens are
//! taken in groups, and the kernel of a group is the one that the library recommends for the largest of it, so that few are
//! asked for and a product of one size is always computed by the same. All calls are on candle's one stream, which is why they
//! can share the workspace. They allocate nothing, so they can be recorded.
//!
//! What the library has no kernel for, the caller computes in another way; the log says so once.

use std::cell::RefCell;
use std::collections::hash_map::{Entry, HashMap};
use std::ptr;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t::CUBLAS_OP_T;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys::{
    self, cublasLtEpilogue_t as Epilogue, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulPreferenceAttributes_t as Preferred, cublasStatus_t as Status,
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, sys::CUstreamCaptureStatus};
use candle_core::cuda_backend::{DeviceId, WrapErr};

use super::super::module::address_mut;
use crate::error::Result;
use crate::tiles::token_group;

pub(super) use sys::cudaDataType as Numbers;

/// What NVIDIA recommends for Hopper, whose kernels want the most.
const WORKSPACE: usize = 32 << 20;
/// Kernels that are remembered.
const MOST_CHOSEN: usize = 4096;
/// `CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F`: a scale for each row of either operand. By its number, as headers before
/// CUDA 12.9 have no name for it; a library that does not know it refuses it.
const SCALE_OF_EACH_ROW: i32 = 3;

/// `y [tokens, rows] = alpha x [tokens, cols] w^T + bias` for `w [rows, cols]`. Addresses are the device's, strides are
/// elements from row to row.
///
/// The library counts columns first, so what it sees is `y^T = w x^T`, with `w` as the transpose of a `[cols, rows]` matrix:
/// the one layout that there are kernels of fp8 for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) tokens: usize,
    /// Of `w` and `x`.
    pub(super) operands: Numbers,
    pub(super) w: u64,
    pub(super) w_stride: usize,
    pub(super) x: u64,
    pub(super) x_stride: usize,
    /// Of `y` and the bias.
    pub(super) results: Numbers,
    pub(super) y: u64,
    pub(super) y_stride: usize,
    /// `[rows]`; 0: none.
    pub(super) bias: u64,
    pub(super) alpha: f32,
    /// Where the f32 factors of `w`'s rows and of the tokens are, of operands in fp8. Both, or 0 and 0.
    pub(super) scales: [u64; 2],
}

impl Product {
    fn is_scaled(&self) -> bool {
        self.scales != [0, 0]
    }
}

/// Computes it. `false`: the library has no kernel for it, and nothing was written.
///
/// # Safety
/// The addresses must be those of memory of `device` of the sizes that `product` says.
pub(super) unsafe fn multiply(device: &CudaDevice, product: &Product) -> Result<bool> {
    LIBRARIES.with_borrow_mut(|libraries| {
        let library = match libraries.entry(device.id()) {
            Entry::Occupied(entry) => entry.into_mut(),
            // An allocation in a recording would belong to the recording.
            Entry::Vacant(_) if is_recording(device)? => return Ok(false),
            Entry::Vacant(entry) => entry.insert(Library::open(device)?),
        };
        match library {
            // SAFETY: given by the caller.
            Some(library) => unsafe { library.multiply(device, product) },
            None => Ok(false),
        }
    })
}

/// The first product of each kind that was refused on the device, and why.
pub(super) fn refused(device: &CudaDevice) -> Vec<String> {
    LIBRARIES.with_borrow(|libraries| match libraries.get(&device.id()) {
        Some(Some(library)) => library.refused.iter().map(|(_, what)| what.clone()).collect(),
        Some(None) => vec!["it does not start".into()],
        None => Vec::new(),
    })
}

fn is_recording(device: &CudaDevice) -> Result<bool> {
    let status = device.cuda_stream().capture_status().w()?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

thread_local! {
    /// `None`: the library cannot be used on the device.
    static LIBRARIES: RefCell<HashMap<DeviceId, Option<Library>>> = RefCell::default();
}

/// What decides on a kernel. Alignments, as kernels may want more than a tensor has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Size {
    dims: [usize; 3],
    strides: [usize; 3],
    numbers: [Numbers; 2],
    alignments: [u32; 3],
    /// 0: no bias.
    bias_alignment: u32,
    scaled: bool,
}

impl Size {
    fn of(product: &Product) -> Self {
        let Product { rows, cols, w, x, y, bias, .. } = *product;
        Self {
            dims: [rows, cols, token_group(product.tokens)],
            strides: [product.w_stride, product.x_stride, product.y_stride],
            numbers: [product.operands, product.results],
            alignments: [w, x, y].map(alignment),
            bias_alignment: if bias == 0 { 0 } else { alignment(bias) },
            scaled: product.is_scaled(),
        }
    }
}

/// The largest power of two, up to 256, that divides an address.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// Who computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    /// The kernel recommended for the group.
    Recommended(sys::cublasLtMatmulAlgo_t),
    /// Whatever the library finds in the call, as the recommended one does not do this size.
    Found,
    Nothing,
}

struct Library {
    handle: Handle,
    workspace: CudaSlice<u8>,
    chosen: HashMap<Size, Choice>,
    /// Operands, and whether they are scaled, with the first refusal of each, of which the log was told.
    refused: Vec<((Numbers, bool), String)>,
}

impl Library {
    fn open(device: &CudaDevice) -> Result<Option<Self>> {
        // The handle is for the context that is current.
        device.cuda_stream().context().bind_to_thread().w()?;
        let handle = match result::create_handle() {
            Ok(handle) => Handle(handle),
            Err(error) => {
                tracing::warn!(%error, "cuBLASLt does not start: large products are computed in other ways");
                return Ok(None);
            }
        };
        // SAFETY: the library writes what it reads of its workspace.
        let workspace = unsafe { device.alloc::<u8>(WORKSPACE)? };
        Ok(Some(Self { handle, workspace, chosen: HashMap::new(), refused: Vec::new() }))
    }

    /// # Safety
    /// See [`multiply`].
    unsafe fn multiply(&mut self, device: &CudaDevice, product: &Product) -> Result<bool> {
        device.cuda_stream().context().bind_to_thread().w()?;
        let size = Size::of(product);
        let known = self.chosen.get(&size).copied();
        let mut choice = known.unwrap_or_else(|| self.recommended(product));
        loop {
            let kernel = match &choice {
                Choice::Recommended(kernel) => ptr::from_ref(kernel),
                Choice::Found => ptr::null(),
                Choice::Nothing => break,
            };
            // SAFETY: given by the caller; `kernel` is null or one that the library chose.
            let refused = match unsafe { self.call(device, product, kernel) } {
                Ok(()) => break,
                Err(error) if is_refusal(error) => error,
                Err(error) => return Err(candle_core::Error::wrap(error).into()),
            };
            choice = match choice {
                Choice::Recommended(_) => Choice::Found,
                _ => self.nothing(product, refused),
            };
        }
        if known != Some(choice) {
            if self.chosen.len() >= MOST_CHOSEN {
                self.chosen.clear();
            }
            self.chosen.insert(size, choice);
        }
        Ok(choice != Choice::Nothing)
    }

    fn recommended(&mut self, product: &Product) -> Choice {
        match Call::new(product, token_group(product.tokens)).and_then(|call| call.recommended(&self.handle))
        {
            Ok(kernel) => Choice::Recommended(kernel),
            Err(error) => self.nothing(product, error),
        }
    }

    fn nothing(&mut self, product: &Product, error: CublasError) -> Choice {
        let kind = (product.operands, product.is_scaled());
        if self.refused.iter().all(|(known, _)| *known != kind) {
            let Product { rows, cols, tokens, operands, .. } = product;
            let how = if product.is_scaled() { ", scaled" } else { "" };
            let what = format!("{tokens} by {rows} x {cols}, {operands:?}{how}: {error}");
            tracing::warn!(
                product = what,
                "cuBLASLt has no kernel: such products are computed in another way"
            );
            self.refused.push((kind, what));
        }
        Choice::Nothing
    }

    /// # Safety
    /// See [`multiply`].
    unsafe fn call(
        &mut self,
        device: &CudaDevice,
        product: &Product,
        kernel: *const sys::cublasLtMatmulAlgo_t,
    ) -> Result<(), CublasError> {
        let call = Call::new(product, product.tokens)?;
        let workspace = address_mut(device, &mut self.workspace);
        let beta = 0.0_f32;
        // SAFETY: the descriptions live till the end of this function; memory is as the caller says; the numbers behind
        // `alpha` and `beta` are read before the call returns.
        unsafe {
            result::matmul(
                self.handle.0,
                call.operation.0,
                ptr::from_ref(&product.alpha).cast(),
                ptr::from_ref(&beta).cast(),
                product.w as *const _,
                call.w.0,
                product.x as *const _,
                call.x.0,
                // In the place of what would be added, which is not read.
                product.y as *const _,
                call.y.0,
                product.y as *mut _,
                call.y.0,
                kernel,
                workspace as *mut _,
                WORKSPACE,
                device.cuda_stream().cu_stream().cast(),
            )
        }
    }
}

/// Whether the library says that it cannot, as opposed to that something broke. It has launched nothing then.
fn is_refusal(error: CublasError) -> bool {
    use Status::{
        CUBLAS_STATUS_ARCH_MISMATCH as GENERATION, CUBLAS_STATUS_INVALID_VALUE as VALUE,
        CUBLAS_STATUS_NOT_SUPPORTED as SUPPORT,
    };
    matches!(error.0, GENERATION | VALUE | SUPPORT)
}

/// A product as the library wants it described.
struct Call {
    operation: Operation,
    w: Layout,
    x: Layout,
    y: Layout,
    alignments: [u32; 3],
}

impl Call {
    fn new(product: &Product, tokens: usize) -> Result<Self, CublasError> {
        let Product { rows, cols, operands, results, scales, bias, .. } = *product;
        let operation = Operation::new()?;
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T as i32)?;
        if bias != 0 {
            let epilogue = Epilogue::CUBLASLT_EPILOGUE_BIAS as u32;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        let [of_rows, of_tokens] = scales;
        if product.is_scaled() {
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, SCALE_OF_EACH_ROW)?;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, SCALE_OF_EACH_ROW)?;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, of_rows)?;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, of_tokens)?;
        }
        Ok(Self {
            operation,
            w: Layout::new(operands, (cols, rows), product.w_stride)?,
            x: Layout::new(operands, (cols, tokens), product.x_stride)?,
            y: Layout::new(results, (rows, tokens), product.y_stride)?,
            alignments: [product.w, product.x, product.y].map(alignment),
        })
    }

    /// The library's first recommendation.
    fn recommended(&self, handle: &Handle) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        let preference = Preference::new()?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE as u64)?;
        // Parts of a sum are added as f32, not as numbers of the result.
        let reduction = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction)?;
        let [w, x, y] = self.alignments;
        for (attribute, alignment) in [
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, w),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, y),
            (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, y),
        ] {
            preference.set(attribute, alignment)?;
        }
        let (w, x, y) = (self.w.0, self.x.0, self.y.0);
        // SAFETY: handle and descriptions are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(handle.0, self.operation.0, w, x, y, y, preference.0)?
        };
        Ok(found.algo)
    }
}

struct Handle(sys::cublasLtHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made in `Library::open` and destroyed nowhere else. What it says at the end interests nobody.
        unsafe { result::destroy_handle(self.0) }.ok();
    }
}

struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    /// Sums in f32.
    fn new() -> Result<Self, CublasError> {
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        result::create_matmul_desc(compute, Numbers::CUDA_R_32F).map(Self)
    }

    fn set<T: Copy>(&self, attribute: Attribute, value: T) -> Result<(), CublasError> {
        // SAFETY: the value is copied; the library refuses one of another size than the attribute's.
        unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, ptr::from_ref(&value).cast(), size_of::<T>())
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made in `new` and destroyed nowhere else.
        unsafe { result::destroy_matmul_desc(self.0) }.ok();
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// Columns of `rows` numbers, `stride` apart.
    fn new(numbers: Numbers, (rows, cols): (usize, usize), stride: usize) -> Result<Self, CublasError> {
        result::create_matrix_layout(numbers, rows as u64, cols as u64, stride as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made in `new` and destroyed nowhere else.
        unsafe { result::destroy_matrix_layout(self.0) }.ok();
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CublasError> {
        result::create_matmul_pref().map(Self)
    }

    fn set<T: Copy>(&self, attribute: Preferred, value: T) -> Result<(), CublasError> {
        // SAFETY: as for `Operation::set`.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, ptr::from_ref(&value).cast(), size_of::<T>())
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made in `new` and destroyed nowhere else.
        unsafe { result::destroy_matmul_pref(self.0) }.ok();
    }
}
