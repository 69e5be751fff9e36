//! A checkpoint folder: `model.safetensors`, or shards named by `model.safetensors.index.json`.
//!
//! Opening reads and checks every header, so that a missing, truncated or contradictory file is found before the first
//! large allocation. Tensors are read, not mapped: a file that shrinks afterwards is an error, not a signal that ends
//! the process.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use ingle_kernels::{MatrixRows, gpu};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::error::{Error, Result, invalid};
use crate::json::read_file;
use crate::safetensors::{Entry, check_lengths, parse_header};
use crate::source::TensorSource;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_SHARDS: usize = 10_000;

/// The tensors of a folder.
#[derive(Debug)]
pub(crate) struct FolderSource {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Located>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    /// Where the data starts, after the header.
    data_start: u64,
}

#[derive(Debug)]
struct Located {
    shard: usize,
    entry: Entry,
}

impl FolderSource {
    /// Opens all files of `folder` and checks their headers.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        Self::open_below(folder, folder)
    }

    /// As [`FolderSource::open`] for `folder` in the model's folder `model`: links must not lead out of that one.
    pub(crate) fn open_below(folder: &Path, model: &Path) -> Result<Self> {
        let root = link_root(model)?;
        let mut source = Self { path: folder.to_owned(), shards: Vec::new(), tensors: BTreeMap::new() };
        let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
        if exists(&single)? {
            let entries = source.add_shard(&single, &root)?;
            for entry in entries {
                source.tensors.insert(entry.name.clone(), Located { shard: 0, entry });
            }
        } else if exists(&index)? {
            source.add_index(&index, &root)?;
        } else {
            return Err(invalid(folder, format!("holds neither {SINGLE} nor {INDEX}")));
        }
        Ok(source)
    }

    /// Opens the shards that `index` names and keeps the tensors it places in them.
    fn add_index(&mut self, index: &Path, root: &Path) -> Result<()> {
        let bytes = read_file(index, MAX_INDEX_BYTES)?;
        let parsed: Index =
            serde_json::from_slice(&bytes).map_err(|e| invalid(index, format!("is not valid: {e}")))?;
        let mut by_file = BTreeMap::<String, Vec<String>>::new();
        for (name, file) in parsed.weight_map.0 {
            if !is_plain_name(&file) {
                return Err(invalid(
                    index,
                    format!("weight_map places {name:?} in {file:?}, not a plain file name"),
                ));
            }
            by_file.entry(file).or_default().push(name);
        }
        if by_file.len() > MAX_SHARDS {
            return Err(invalid(
                index,
                format!("names {} files; at most {MAX_SHARDS} are accepted", by_file.len()),
            ));
        }
        for (file, names) in by_file {
            let path = self.path.join(&file);
            if !exists(&path)? {
                return Err(invalid(
                    &path,
                    format!("is missing; {INDEX} places {} tensors in it", names.len()),
                ));
            }
            let shard = self.shards.len();
            let entries = self.add_shard(&path, root)?;
            let mut entries: BTreeMap<_, _> = entries.into_iter().map(|e| (e.name.clone(), e)).collect();
            for name in names {
                let Some(entry) = entries.remove(&name) else {
                    return Err(invalid(&path, format!("has no tensor {name:?}, or {INDEX} names it twice")));
                };
                if self.tensors.insert(name, Located { shard, entry }).is_some() {
                    return Err(invalid(index, "names a tensor twice"));
                }
            }
        }
        Ok(())
    }

    fn add_shard(&mut self, path: &Path, root: &Path) -> Result<Vec<Entry>> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let real = path.canonicalize().map_err(io)?;
        if !real.starts_with(root) {
            return Err(invalid(path, "is a link that leads out of the model's folder"));
        }
        let file = File::open(&real).map_err(io)?;
        let file_len = file.metadata().map_err(io)?.len();
        if file_len < 8 {
            return Err(invalid(path, format!("has {file_len} bytes: not a safetensors file")));
        }
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(io)?;
        let header_len = u64::from_le_bytes(length);
        let data_len = check_lengths(header_len, file_len).map_err(|m| invalid(path, m))?;
        // At most MAX_HEADER_BYTES, which check_lengths saw to.
        let mut header = vec![0; header_len as usize];
        file.read_exact_at(&mut header, 8).map_err(io)?;
        let entries = parse_header(&header, data_len).map_err(|m| invalid(path, m))?;
        self.shards.push(Shard { path: path.to_owned(), file, data_start: 8 + header_len });
        Ok(entries)
    }

    /// Type of a tensor as the file spells it.
    pub(crate) fn stored_type(&self, name: &str) -> Option<&str> {
        self.tensors.get(name).map(|located| located.entry.dtype.as_str())
    }

    /// The bytes of a tensor whose elements are bytes.
    pub(crate) fn read_bytes(&self, name: &str) -> Result<Vec<u8>> {
        self.read_plain(name, &["U8", "I8", "F8_E4M3"])
    }

    /// The words of a tensor of 32-bit whole numbers.
    pub(crate) fn read_words(&self, name: &str) -> Result<Vec<u32>> {
        self.read_plain(name, &["I32", "U32"])
    }

    fn read_plain<T: bytemuck::Pod>(&self, name: &str, types: &[&str]) -> Result<Vec<T>> {
        let (shard, entry) = self.located(name)?;
        if !types.contains(&entry.dtype.as_str()) {
            let message = format!("tensor {name:?} is stored as {}, not as {}", entry.dtype, types[0]);
            return Err(invalid(&shard.path, message));
        }
        read::<T>(shard, entry, &[(0, entry.shape.iter().product())])
    }

    fn located(&self, name: &str) -> Result<(&Shard, &Entry)> {
        let located = self.tensors.get(name);
        let located = located.ok_or_else(|| invalid(&self.path, format!("has no tensor {name:?}")))?;
        Ok((&self.shards[located.shard], &located.entry))
    }
}

impl TensorSource for FolderSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|located| located.entry.shape.as_slice())
    }

    fn file_of(&self, name: &str) -> &Path {
        self.located(name).map_or(self.path.as_path(), |(shard, _)| shard.path.as_path())
    }

    fn dtype(&self, name: &str) -> Result<Option<DType>> {
        let (shard, entry) = self.located(name)?;
        match entry.dtype.as_str() {
            "F32" => Ok(Some(DType::F32)),
            "F16" => Ok(Some(DType::F16)),
            "BF16" => Ok(Some(DType::BF16)),
            other => Err(invalid(
                &shard.path,
                format!("tensor {name:?} is stored as {other}; F32, F16 and BF16 can be read"),
            )),
        }
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        // Everything of the first dimension, or of a scalar's none.
        self.load_ranges(name, None)
    }

    fn rows(&self, name: &str) -> Result<Option<Box<dyn MatrixRows + '_>>> {
        let dtype = self.dtype(name)?.unwrap_or(DType::F32);
        let (shard, entry) = self.located(name)?;
        let [rows, cols] = entry.shape[..] else { return Ok(None) };
        Ok(Some(Box::new(FileRows { shard, begin: entry.begin, dims: (rows, cols), dtype })))
    }

    fn load_part(&self, name: &str, dim: usize, ranges: &[Range<usize>]) -> Result<Tensor> {
        self.load_ranges(name, Some((dim, ranges)))
    }

    fn load_on(&self, name: &str, device: &Device) -> Result<Tensor> {
        let dtype = self.dtype(name)?.unwrap_or(DType::F32);
        let (shard, entry) = self.located(name)?;
        let start = shard.data_start + entry.begin;
        let read = |offset: u64, part: &mut [u8]| shard.file.read_exact_at(part, start + offset);
        let tensor = gpu::read_tensor(device, dtype, &entry.shape, &read);
        tensor.map_err(|error| match error {
            // The device's own errors keep their text: what they mean is read from it.
            ingle_kernels::Error::Candle(candle_core::Error::Io(source)) => {
                Error::Io { path: shard.path.clone(), source }
            }
            other => other.into(),
        })
    }
}

impl FolderSource {
    /// A tensor, or ranges of one of its dimensions: only their bytes are read.
    fn load_ranges(&self, name: &str, part: Option<(usize, &[Range<usize>])>) -> Result<Tensor> {
        let dtype = self.dtype(name)?;
        let (shard, entry) = self.located(name)?;
        let mut shape = entry.shape.clone();
        let elements: usize = shape.iter().product();
        // Runs of elements that lie side by side in the file: where each begins, and how long it is.
        let mut runs = vec![(0, elements)];
        if let Some((dim, ranges)) = part {
            let Some(size) = shape.get(dim).copied() else {
                return Err(invalid(&shard.path, format!("tensor {name:?} has no dimension {dim}")));
            };
            if let Some(range) = ranges.iter().find(|range| range.start > range.end || range.end > size) {
                return Err(invalid(&shard.path, format!("tensor {name:?} has {size} of {range:?}")));
            }
            let inner: usize = shape[dim + 1..].iter().product();
            let outer: usize = shape[..dim].iter().product();
            let run =
                |idx: usize, range: &Range<usize>| ((idx * size + range.start) * inner, range.len() * inner);
            runs = (0..outer).flat_map(|idx| ranges.iter().map(move |range| run(idx, range))).collect();
            shape[dim] = ranges.iter().map(Range::len).sum();
        }
        Ok(match dtype {
            Some(DType::BF16) => Tensor::from_vec(read::<bf16>(shard, entry, &runs)?, shape, &Device::Cpu)?,
            Some(DType::F16) => Tensor::from_vec(read::<f16>(shard, entry, &runs)?, shape, &Device::Cpu)?,
            _ => Tensor::from_vec(read::<f32>(shard, entry, &runs)?, shape, &Device::Cpu)?,
        })
    }
}

/// A matrix in a file.
struct FileRows<'a> {
    shard: &'a Shard,
    /// Where it begins in the data.
    begin: u64,
    dims: (usize, usize),
    dtype: DType,
}

impl MatrixRows for FileRows<'_> {
    fn dims(&self) -> (usize, usize) {
        self.dims
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn read(&self, first: usize, out: &mut [u8]) -> std::io::Result<()> {
        // Within the matrix, whose bytes the header's check has counted.
        let skipped = (first * self.dims.1 * self.dtype.size_in_bytes()) as u64;
        self.shard.file.read_exact_at(out, self.shard.data_start + self.begin + skipped)
    }
}

/// Reads runs of elements of `entry` (first and number), one after another; the file is little-endian, as are the
/// machines we build for.
fn read<T: bytemuck::Pod>(shard: &Shard, entry: &Entry, runs: &[(usize, usize)]) -> Result<Vec<T>> {
    let mut values = vec![T::zeroed(); runs.iter().map(|(_, len)| len).sum()];
    let mut rest = values.as_mut_slice();
    for (first, len) in runs {
        let (run, later) = rest.split_at_mut(*len);
        rest = later;
        // Within the entry, whose bytes the header's check has counted.
        let offset = shard.data_start + entry.begin + (first * size_of::<T>()) as u64;
        shard
            .file
            .read_exact_at(bytemuck::cast_slice_mut(run), offset)
            .map_err(|source| Error::Io { path: shard.path.clone(), source })?;
    }
    Ok(values)
}

/// The folder that links inside `folder` may lead to. A snapshot of the hub's cache (`REPO/snapshots/REVISION`) links
/// to `REPO/blobs`; any other folder must hold its files itself.
fn link_root(folder: &Path) -> Result<PathBuf> {
    let real = folder.canonicalize().map_err(|source| Error::Io { path: folder.to_owned(), source })?;
    let snapshots = real.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"));
    Ok(snapshots.and_then(Path::parent).map(Path::to_owned).unwrap_or(real))
}

fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|source| Error::Io { path: path.to_owned(), source })
}

fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let one_normal = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    one_normal && !name.contains(['/', '\\', '\0']) && name.ends_with(".safetensors")
}

#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// Tensor name and file, in file order, so that a name given twice is seen.
struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor;
        impl<'de> Visitor<'de> for MapVisitor {
            type Value = WeightMap;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(WeightMap(pairs))
            }
        }
        deserializer.deserialize_map(MapVisitor)
    }
}

#[cfg(test)]
mod tests {
    use ingle_kernels::{Quantization, Weight};

    use super::*;

    /// In pieces through two buffers, as it goes to a GPU, or at once: the same numbers.
    #[test]
    fn both_ways_of_reading_give_the_same() {
        for name in ["llama_sharded", "llama_f16_head_dim"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
            let source = FolderSource::open(&folder).expect("the fixture");
            assert!(source.names().len() > 10);
            for tensor in source.names() {
                let whole = source.load(tensor).expect("read");
                let pieces = source.load_on(tensor, &Device::Cpu).expect("read");
                assert_eq!((whole.dims(), whole.dtype()), (pieces.dims(), pieces.dtype()), "{tensor}");
                let values = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
                assert_eq!(values(&whole).expect("numbers"), values(&pieces).expect("numbers"), "{tensor}");
                let rows = source.rows(tensor).expect("read");
                assert_eq!(rows.is_some(), whole.rank() == 2, "{tensor}");
                let Some(rows) = rows else { continue };
                assert_eq!((rows.dims(), rows.dtype()), (whole.dims2().expect("a matrix"), whole.dtype()));
                let (count, cols) = rows.dims();
                // From the second row on.
                let (whole, mut bytes) = (
                    whole
                        .narrow(0, 1, count - 1)
                        .and_then(|rest| rest.to_dtype(DType::F32))
                        .expect("numbers"),
                    vec![0; (count - 1) * cols * rows.dtype().size_in_bytes()],
                );
                rows.read(1, &mut bytes).expect("read");
                let read = Tensor::from_raw_buffer(&bytes, rows.dtype(), &[count - 1, cols], &Device::Cpu);
                assert_eq!(
                    values(&whole).expect("numbers"),
                    values(&read.expect("numbers")).expect("numbers")
                );
            }
        }
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama");
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("model.safetensors");
        std::fs::copy(fixture.join("model.safetensors"), &path).expect("copied");
        let source = FolderSource::open(dir.path()).expect("whole");
        let file = File::options().write(true).open(&path).expect("opened");
        file.set_len(source.shards[0].data_start + 10).expect("cut");
        for tensor in source.names() {
            let error = source.load_on(tensor, &Device::Cpu).expect_err("too short").to_string();
            assert!(error.contains("model.safetensors"), "{error}");
            let Some(rows) = source.rows(tensor).expect("known") else { continue };
            for quantization in [None, Some(Quantization::Int8), Some(Quantization::Int4)] {
                let error = Weight::read(&[rows.as_ref()], DType::BF16, quantization).expect_err("too short");
                assert!(matches!(error, ingle_kernels::Error::Unreadable { part: 0, .. }), "{error}");
            }
        }
    }
}
