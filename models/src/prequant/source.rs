//! The tensors of a quantised checkpoint, each projection under the one name it would have had.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use ingle_kernels::{BlockType, Fp8Matrix, MatrixRows, QuantizedBlocks};

use super::fp8::{self, ScaleOf};
use super::grouped::{Grouped, Packing, codes_per_word};
use super::scheme::{GROUP_STEP, Scheme};
use crate::error::{Result, invalid};
use crate::source::{BlockFormat, TensorSource};
use crate::weights::FolderSource;

/// Tensors of a folder; those of quantised projections are put together.
#[derive(Debug)]
pub(crate) struct QuantisedSource {
    folder: FolderSource,
    /// By the name of the matrix.
    matrices: BTreeMap<String, Matrix>,
}

/// One quantised projection.
#[derive(Debug)]
struct Matrix {
    /// `[out_features, in_features]`
    shape: [usize; 2],
    /// What people call its format.
    label: String,
    codes: Codes,
}

#[derive(Debug)]
enum Codes {
    Grouped {
        bits: u32,
        packing: Packing,
        minus_one: bool,
        symmetric: bool,
        /// Group of each input feature.
        group_of: Vec<u32>,
        /// Groups follow each other, in blocks that there are kernels for.
        kernel: Option<BlockType>,
    },
    Fp8 {
        scale: String,
        scale_of: ScaleOf,
    },
}

impl QuantisedSource {
    /// Opens all files of `folder` and checks the tensors of every quantised projection against each other.
    pub(crate) fn open(folder: &Path, scheme: &Scheme) -> Result<Self> {
        let folder = FolderSource::open(folder)?;
        let mut matrices = BTreeMap::new();
        let mut activation_scales = matches!(scheme, Scheme::Fp8(fp8) if fp8.activation_scales);
        for name in folder.names() {
            activation_scales |= name.ends_with(".input_scale");
            match scheme {
                Scheme::Gptq(_) | Scheme::Awq(_) => {
                    if let Some(module) = name.strip_suffix(".qweight") {
                        matrices.insert(format!("{module}.weight"), grouped(&folder, module, scheme)?);
                    }
                }
                Scheme::Fp8(scheme) => {
                    if name.ends_with(".weight") && folder.stored_type(name) == Some("F8_E4M3") {
                        matrices.insert(name.to_owned(), fp8(&folder, name, scheme.block)?);
                    }
                }
            }
        }
        if activation_scales {
            tracing::info!("the checkpoint's scales for activations are not used");
        }
        Ok(Self { folder, matrices })
    }

    /// The tensors of a grouped matrix, in memory.
    fn read_grouped(&self, name: &str, matrix: &Matrix) -> Result<Grouped> {
        let Codes::Grouped { bits, packing, minus_one, symmetric, group_of, .. } = &matrix.codes else {
            return Err(invalid(self.path(), format!("tensor {name:?} has no groups")));
        };
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let words = |part: &str| self.folder.read_words(&format!("{module}.{part}"));
        let zeros = Grouped::unpack_zeros(&words("qzeros")?, *bits, *packing, *minus_one);
        let scales = self.folder.load(&format!("{module}.scales"))?;
        let scales = scales.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let [rows, cols] = matrix.shape;
        let grouped = Grouped {
            rows,
            cols,
            bits: *bits,
            packing: *packing,
            qweight: words("qweight")?,
            zeros,
            scales,
            group_of: group_of.clone(),
        };
        if *symmetric && !grouped.is_symmetric() {
            let file = self.folder.file_of(&format!("{module}.qzeros"));
            return Err(invalid(
                file,
                format!(
                    "tensor \"{module}.qzeros\" has zeros beside the middle, although config.json says sym"
                ),
            ));
        }
        Ok(grouped)
    }

    /// The codes of an FP8 matrix and what is in the tensor `scale`.
    fn read_fp8(&self, name: &str, scale: &str) -> Result<(Vec<u8>, Vec<f32>)> {
        let scales = self.folder.load(scale)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok((self.folder.read_bytes(name)?, scales))
    }
}

/// Checks the shapes of GPTQ's or AWQ's tensors of `module`.
fn grouped(folder: &FolderSource, module: &str, scheme: &Scheme) -> Result<Matrix> {
    let (method, bits, group_size, packing, minus_one, symmetric) = match scheme {
        Scheme::Awq(awq) => ("AWQ", 4, awq.group_size, Packing::Outputs, false, false),
        Scheme::Gptq(gptq) => {
            ("GPTQ", gptq.bits, gptq.group_size, Packing::Inputs, gptq.zeros_minus_one, gptq.symmetric)
        }
        Scheme::Fp8(_) => return Err(invalid(folder.path(), "FP8 weights have no groups")),
    };
    let tensor = |part: &str, types: &[&str]| {
        let name = format!("{module}.{part}");
        let Some(shape) = folder.shape(&name) else {
            return Err(invalid(folder.path(), format!("tensor {name:?} is missing")));
        };
        let stored = folder.stored_type(&name).unwrap_or_default();
        if !types.contains(&stored) {
            let message = format!("tensor {name:?} is stored as {stored}; {} can be read", types.join(", "));
            return Err(invalid(folder.file_of(&name), message));
        }
        Ok((name, shape.to_vec()))
    };
    let wrong = |name: &str, shape: &[usize], want: &str| {
        Err(invalid(folder.file_of(name), format!("tensor {name:?} has shape {shape:?}; {want}")))
    };
    let per_word = codes_per_word(bits);
    let (name, words) = tensor("qweight", &["I32"])?;
    let sizes = match (packing, words.as_slice()) {
        (Packing::Inputs, [packed, rows]) => packed.checked_mul(per_word).map(|cols| (*rows, cols)),
        (Packing::Outputs, [cols, packed]) => packed.checked_mul(per_word).map(|rows| (rows, *cols)),
        _ => None,
    };
    let sizes = sizes.filter(|(rows, cols)| *rows > 0 && *cols > 0 && rows.checked_mul(*cols).is_some());
    let Some((rows, cols)) = sizes else {
        return wrong(&name, &words, "it must be a matrix of packed codes");
    };
    if !rows.is_multiple_of(per_word) {
        return wrong(&name, &words, &format!("its outputs do not fill words of {per_word} zeros"));
    }
    let group = group_size.unwrap_or(cols);
    let groups = cols.div_ceil(group);
    let (name, shape) = tensor("scales", &["F16", "BF16", "F32"])?;
    if shape != [groups, rows] {
        return wrong(
            &name,
            &shape,
            &format!("{cols} inputs in groups of {group} to {rows} outputs want [{groups}, {rows}]"),
        );
    }
    let (name, shape) = tensor("qzeros", &["I32"])?;
    if shape != [groups, rows / per_word] {
        return wrong(&name, &shape, &format!("the codes want [{groups}, {}]", rows / per_word));
    }
    let in_order: Vec<u32> = (0..cols).map(|col| (col / group) as u32).collect();
    let mut group_of = in_order.clone();
    if packing == Packing::Inputs && folder.shape(&format!("{module}.g_idx")).is_some() {
        let (name, shape) = tensor("g_idx", &["I32"])?;
        if shape != [cols] {
            return wrong(&name, &shape, &format!("the codes want [{cols}]"));
        }
        group_of = folder.read_words(&name)?;
        if let Some((at, group)) = group_of.iter().enumerate().find(|(_, group)| **group as usize >= groups) {
            let group = *group as i32;
            let message = format!("tensor {name:?} puts input {at} into group {group} of {groups}");
            return Err(invalid(folder.file_of(&name), message));
        }
    }
    let permuted = group_of != in_order;
    let kernel = match (bits, symmetric) {
        _ if permuted || !cols.is_multiple_of(GROUP_STEP) => None,
        (8, true) => Some(BlockType::Q8_0),
        (4, true) => Some(BlockType::Q4_0),
        (4, false) => Some(BlockType::Q4_1),
        _ => None,
    };
    let group = group_size.map_or("-1".to_owned(), |size| size.to_string());
    let order = if permuted { " act-order" } else { "" };
    Ok(Matrix {
        shape: [rows, cols],
        label: format!("{method} int{bits} g{group}{order}"),
        codes: Codes::Grouped { bits, packing, minus_one, symmetric, group_of, kernel },
    })
}

/// Checks the scales of the FP8 matrix `name`.
fn fp8(folder: &FolderSource, name: &str, block: Option<(usize, usize)>) -> Result<Matrix> {
    let shape = folder.shape(name).unwrap_or_default();
    let Ok(shape @ [rows, cols]) = <[usize; 2]>::try_from(shape) else {
        let message = format!("tensor {name:?} of FP8 weights has shape {shape:?}; matrices can be read");
        return Err(invalid(folder.file_of(name), message));
    };
    let names = [format!("{name}_scale"), format!("{name}_scale_inv")];
    let Some(scale) = names.iter().find(|name| folder.shape(name).is_some()) else {
        let message =
            format!("tensor {name:?} of FP8 weights has no scale ({:?} or {:?})", names[0], names[1]);
        return Err(invalid(folder.path(), message));
    };
    folder.dtype(scale)?;
    let scales = folder.shape(scale).unwrap_or_default();
    let Some(scale_of) = ScaleOf::of(scales, (rows, cols), block) else {
        let blocks = block.map_or(String::new(), |(rows, cols)| format!(" in blocks of {rows} x {cols}"));
        return Err(invalid(
            folder.file_of(scale),
            format!("tensor {scale:?} has shape {scales:?}, which does not scale [{rows}, {cols}]{blocks}"),
        ));
    };
    Ok(Matrix { shape, label: "FP8".to_owned(), codes: Codes::Fp8 { scale: scale.clone(), scale_of } })
}

impl TensorSource for QuantisedSource {
    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn names(&self) -> Vec<&str> {
        let mut names = self.folder.names();
        names.extend(self.matrices.keys().map(String::as_str));
        names.sort_unstable();
        names.dedup();
        names
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        match self.matrices.get(name) {
            Some(matrix) => Some(&matrix.shape),
            None => self.folder.shape(name),
        }
    }

    fn file_of(&self, name: &str) -> &Path {
        match name.strip_suffix(".weight").filter(|_| self.folder.shape(name).is_none()) {
            Some(module) => self.folder.file_of(&format!("{module}.qweight")),
            None => self.folder.file_of(name),
        }
    }

    fn dtype(&self, name: &str) -> Result<Option<DType>> {
        if self.matrices.contains_key(name) { Ok(Some(DType::F32)) } else { self.folder.dtype(name) }
    }

    fn rows(&self, name: &str) -> Result<Option<Box<dyn MatrixRows + '_>>> {
        if self.matrices.contains_key(name) { Ok(None) } else { self.folder.rows(name) }
    }

    fn stored_as(&self, name: &str) -> Option<&str> {
        self.matrices.get(name).map(|matrix| matrix.label.as_str())
    }

    fn block_format(&self, name: &str) -> Option<BlockFormat> {
        let matrix = self.matrices.get(name)?;
        match &matrix.codes {
            Codes::Grouped { kernel: Some(block_type), .. } => Some(BlockFormat::Kernel(*block_type)),
            Codes::Grouped { kernel: None, .. } => Some(BlockFormat::Other(matrix.label.clone())),
            Codes::Fp8 { .. } => None,
        }
    }

    fn load_blocks(&self, name: &str) -> Result<QuantizedBlocks> {
        let matrix = self.matrices.get(name);
        let Some((matrix, Codes::Grouped { kernel: Some(block_type), .. })) = matrix.map(|m| (m, &m.codes))
        else {
            return Err(invalid(self.path(), format!("tensor {name:?} has no blocks that are kept")));
        };
        let blocks = self.read_grouped(name, matrix)?.blocks(*block_type);
        blocks.ok_or_else(|| {
            invalid(self.file_of(name), format!("tensor {name:?} has scales that are no finite f16 numbers"))
        })
    }

    fn fp8_step(&self, name: &str) -> Option<usize> {
        match &self.matrices.get(name)?.codes {
            Codes::Fp8 { scale_of, .. } => scale_of.step(),
            Codes::Grouped { .. } => None,
        }
    }

    fn load_fp8(&self, name: &str) -> Result<Fp8Matrix> {
        let Some(Matrix { shape: [rows, cols], codes: Codes::Fp8 { scale, scale_of }, .. }) =
            self.matrices.get(name).filter(|_| self.fp8_step(name).is_some())
        else {
            return Err(invalid(self.path(), format!("tensor {name:?} has no e4m3 numbers that are kept")));
        };
        let (bytes, scales) = self.read_fp8(name, scale)?;
        let (row_scales, factors) = scale_of.by_rows(&scales, (*rows, *cols));
        Ok(Fp8Matrix { bytes, rows: *rows, cols: *cols, row_scales, factors })
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let Some(matrix) = self.matrices.get(name) else { return self.folder.load(name) };
        let values = match &matrix.codes {
            Codes::Grouped { .. } => self.read_grouped(name, matrix)?.values(),
            Codes::Fp8 { scale, scale_of } => {
                let (codes, scales) = self.read_fp8(name, scale)?;
                fp8::values(&codes, matrix.shape[1], &scales, *scale_of)
            }
        };
        Ok(Tensor::from_vec(values, matrix.shape.as_slice(), &Device::Cpu)?)
    }

    fn load_part(&self, name: &str, dim: usize, ranges: &[Range<usize>]) -> Result<Tensor> {
        if !self.matrices.contains_key(name) {
            return self.folder.load_part(name, dim, ranges);
        }
        let tensor = self.load(name)?;
        let parts = ranges.iter().map(|range| tensor.narrow(dim, range.start, range.len()));
        Ok(Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, dim)?)
    }
}
