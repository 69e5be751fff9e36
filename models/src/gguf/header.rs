//! The header of a GGUF file, read and checked before any byte of a tensor is touched.
//!
//! The layout is: magic, version, tensor count, metadata count, metadata entries, tensor descriptions, padding,
//! tensor data. A file can be anyone's, so every count is held against the bytes that are left, every product is
//! checked, and what [`Header::read`] returns is safe to index with: each tensor's range lies inside the file, no
//! two overlap, and names are unique. Errors name the file and the offset.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use candle_core::quantized::GgmlDType;

use crate::error::{Error, Result, invalid};

/// Everything before the tensor data; vocabularies of 256k tokens with merges need about 20 MiB.
const MAX_HEADER_BYTES: u64 = 64 << 20;
/// The largest mixtures of experts have a few thousand.
const MAX_TENSORS: u64 = 1 << 16;
const MAX_METADATA: u64 = 1 << 16;
/// Longest string value: chat templates and licences stay far below.
const MAX_STRING_BYTES: u64 = 4 << 20;
/// Longest metadata key or tensor name.
const MAX_NAME_BYTES: u64 = 4 << 10;
const MAX_ARRAY_DEPTH: u32 = 4;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 64 << 10;

/// A metadata value. Integers keep their sign but not their width; callers only ask for a number that fits.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    /// An array that no key we read uses (nested ones, and those of one or two bytes per element): checked, not kept,
    /// so that memory stays within a small multiple of the header.
    NotKept,
}

/// One tensor's description, already held against the file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorInfo {
    pub(crate) dtype: GgmlDType,
    /// Outermost first, as in `[out_features, in_features]`; the file stores them the other way round.
    pub(crate) shape: Vec<usize>,
    /// Absolute position of the first byte.
    pub(crate) offset: u64,
    pub(crate) num_bytes: usize,
}

/// A checked header.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: HashMap<String, Value>,
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// Reads and checks the header of `file`, which is at its start; `path` is for messages.
    pub(crate) fn read(file: &File, path: &Path) -> Result<Self> {
        let meta = file.metadata().map_err(|source| Error::Io { path: path.to_owned(), source })?;
        if !meta.is_file() {
            return Err(invalid(path, "not a regular file"));
        }
        let mut reader = Reader { input: BufReader::new(file), position: 0, file_size: meta.len(), path };
        reader.header()
    }
}

/// The f64 with the fewest digits that rounds to `x`: who stored 1e-5 as f32 meant 1e-5, not 9.9999997e-6.
fn shortest_f64(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// The types we read; the number is the one in the file.
fn dtype_from_code(code: u32) -> Option<GgmlDType> {
    Some(match code {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

struct Reader<'a> {
    input: BufReader<&'a File>,
    position: u64,
    file_size: u64,
    path: &'a Path,
}

impl Reader<'_> {
    fn header(&mut self) -> Result<Header> {
        let magic: [u8; 4] = self.bytes("magic")?;
        if &magic != b"GGUF" {
            return Err(self.error(0, "not a GGUF file: the first four bytes are not \"GGUF\""));
        }
        match self.u32("version")? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(self.error(4, "big-endian GGUF files are not supported"));
            }
            version => {
                return Err(self.error(4, &format!("GGUF version {version} is not supported; 2 and 3 are")));
            }
        }
        let num_tensors = self.count("tensor", MAX_TENSORS, 8 + 4 + 8 + 4 + 8)?;
        let num_metadata = self.count("metadata", MAX_METADATA, 8 + 4 + 1)?;
        let metadata = self.metadata(num_metadata)?;
        let alignment = self.alignment(&metadata)?;
        let described = self.tensor_infos(num_tensors, alignment)?;
        let data_start = self.position.next_multiple_of(alignment);
        let tensors = self.place(described, data_start)?;
        Ok(Header { metadata, tensors })
    }

    fn metadata(&mut self, count: u64) -> Result<HashMap<String, Value>> {
        let mut metadata = HashMap::new();
        for _ in 0..count {
            let at = self.position;
            let key = self.name("metadata key")?;
            let kind = self.u32("value type")?;
            let value = self.value(kind, 0)?;
            if metadata.contains_key(&key) {
                return Err(self.error(at, &format!("metadata key {key:?} appears twice")));
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }

    fn alignment(&self, metadata: &HashMap<String, Value>) -> Result<u64> {
        match metadata.get("general.alignment") {
            None => Ok(DEFAULT_ALIGNMENT),
            Some(Value::Unsigned(n)) if *n > 0 && *n <= MAX_ALIGNMENT && n % 8 == 0 => Ok(*n),
            Some(other) => Err(invalid(
                self.path,
                format!("general.alignment must be a multiple of 8 up to {MAX_ALIGNMENT}, got {other:?}"),
            )),
        }
    }

    /// Reads the descriptions; offsets in the result are still relative to the data section.
    fn tensor_infos(&mut self, count: u64, alignment: u64) -> Result<BTreeMap<String, TensorInfo>> {
        let mut tensors = BTreeMap::new();
        for _ in 0..count {
            let at = self.position;
            let name = self.name("tensor name")?;
            let num_dims = self.u32("number of dimensions")?;
            if !(1..=MAX_DIMS).contains(&num_dims) {
                return Err(
                    self.error(at, &format!("tensor {name:?} has {num_dims} dimensions; 1 to 4 are allowed"))
                );
            }
            let mut shape = Vec::new();
            for _ in 0..num_dims {
                let dim = self.u64("dimension")?;
                let dim = usize::try_from(dim).ok().filter(|&d| d > 0);
                shape.push(dim.ok_or_else(|| {
                    self.error(at, &format!("tensor {name:?} has a dimension that is 0 or too large"))
                })?);
            }
            let row = shape[0];
            shape.reverse();
            let code = self.u32("tensor type")?;
            let dtype = dtype_from_code(code).ok_or_else(|| {
                self.error(at, &format!(
                    "tensor {name:?} has type {code}, which is not supported; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K are"
                ))
            })?;
            let offset = self.u64("tensor offset")?;
            if offset % alignment != 0 {
                return Err(self.error(
                    at,
                    &format!("tensor {name:?} starts at {offset}, not a multiple of {alignment}"),
                ));
            }
            let num_bytes = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
            let num_bytes = num_bytes
                .filter(|_| row % dtype.block_size() == 0)
                .map(|elements| elements / dtype.block_size())
                .and_then(|blocks| blocks.checked_mul(dtype.type_size()))
                .filter(|&bytes| i64::try_from(bytes).is_ok())
                .ok_or_else(|| {
                    self.error(
                        at,
                        &format!("tensor {name:?} of shape {shape:?} and type {dtype:?} has no valid size"),
                    )
                })?;
            if tensors.contains_key(&name) {
                return Err(self.error(at, &format!("tensor {name:?} appears twice")));
            }
            tensors.insert(name, TensorInfo { dtype, shape, offset, num_bytes });
        }
        Ok(tensors)
    }

    /// Makes offsets absolute and checks that every range is inside the file and none overlaps another.
    fn place(
        &self,
        mut tensors: BTreeMap<String, TensorInfo>,
        data_start: u64,
    ) -> Result<BTreeMap<String, TensorInfo>> {
        let mut ranges = Vec::with_capacity(tensors.len());
        for (name, info) in &mut tensors {
            let start = data_start.checked_add(info.offset);
            let end = start.and_then(|start| start.checked_add(info.num_bytes as u64));
            let (Some(start), Some(end)) = (start, end.filter(|&end| end <= self.file_size)) else {
                return Err(invalid(
                    self.path,
                    format!(
                        "tensor {name:?} needs {} bytes at offset {} of the data, which starts at {data_start}; the file has {} bytes",
                        info.num_bytes, info.offset, self.file_size
                    ),
                ));
            };
            info.offset = start;
            ranges.push((start, end, name.as_str()));
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if let [(_, end, first), (start, _, second)] = pair
                && start < end
            {
                return Err(self.error(*start, &format!("tensors {first:?} and {second:?} overlap")));
            }
        }
        Ok(tensors)
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.bytes::<1>("value")?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.bytes("value")?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.bytes("value")?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.bytes("value")?))),
            4 => Value::Unsigned(u64::from(self.u32("value")?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.bytes("value")?))),
            6 => Value::Float(shortest_f64(f32::from_le_bytes(self.bytes("value")?))),
            7 => Value::Bool(self.bytes::<1>("value")?[0] != 0),
            8 => Value::Text(self.text("string value", MAX_STRING_BYTES)?),
            9 => self.array(depth)?,
            10 => Value::Unsigned(self.u64("value")?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes("value")?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes("value")?)),
            other => return Err(self.error(self.position, &format!("{other} is not a metadata value type"))),
        })
    }

    fn array(&mut self, depth: u32) -> Result<Value> {
        if depth >= MAX_ARRAY_DEPTH {
            return Err(
                self.error(self.position, &format!("arrays are nested deeper than {MAX_ARRAY_DEPTH}"))
            );
        }
        let kind = self.u32("array element type")?;
        let smallest = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            other => return Err(self.error(self.position, &format!("{other} is not a metadata value type"))),
        };
        let len = self.count("array element", u64::MAX, smallest)?;
        match kind {
            8 => (0..len)
                .map(|_| self.text("string", MAX_STRING_BYTES))
                .collect::<Result<_>>()
                .map(Value::Texts),
            4 | 5 | 10 | 11 => {
                (0..len).map(|_| self.integer(kind)).collect::<Result<_>>().map(Value::Integers)
            }
            6 => (0..len)
                .map(|_| Ok(f32::from_le_bytes(self.bytes("float")?)))
                .collect::<Result<_>>()
                .map(Value::Floats),
            _ => {
                for _ in 0..len {
                    self.value(kind, depth.saturating_add(1))?;
                }
                Ok(Value::NotKept)
            }
        }
    }

    fn integer(&mut self, kind: u32) -> Result<i64> {
        let at = self.position;
        match kind {
            4 => Ok(i64::from(self.u32("integer")?)),
            5 => Ok(i64::from(i32::from_le_bytes(self.bytes("integer")?))),
            10 => i64::try_from(self.u64("integer")?)
                .map_err(|_| self.error(at, "an integer of an array does not fit 63 bits")),
            _ => Ok(i64::from_le_bytes(self.bytes("integer")?)),
        }
    }

    /// Reads a count and checks that as many things of at least `smallest` bytes can still follow.
    fn count(&mut self, what: &str, most: u64, smallest: u64) -> Result<u64> {
        let at = self.position;
        let count = self.u64(what)?;
        let fits = count.checked_mul(smallest).is_some_and(|bytes| bytes <= self.remaining());
        if count > most || !fits {
            return Err(self.error(at, &format!("{what} count {count} is more than the file can hold")));
        }
        Ok(count)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let at = self.position;
        let bytes = self.sized(what, MAX_NAME_BYTES)?;
        String::from_utf8(bytes).map_err(|_| self.error(at, &format!("{what} is not UTF-8")))
    }

    /// A string value. Some writers leave bytes that are not UTF-8 (in licences, say); they become U+FFFD.
    fn text(&mut self, what: &str, most: u64) -> Result<String> {
        let bytes = self.sized(what, most)?;
        Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
    }

    fn sized(&mut self, what: &str, most: u64) -> Result<Vec<u8>> {
        let at = self.position;
        let len = self.u64(what)?;
        if len > most || len > self.remaining() {
            return Err(self.error(
                at,
                &format!(
                    "{what} of {len} bytes is longer than allowed ({most}) or than the rest of the file ({})",
                    self.remaining()
                ),
            ));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Result<()> {
        if bytes.len() as u64 > self.remaining() {
            let place =
                if self.file_size > MAX_HEADER_BYTES { "the header is too large" } else { "the file ends" };
            return Err(self.error(self.position, &format!("{place} within the {what}")));
        }
        self.input.read_exact(bytes).map_err(|source| Error::Io { path: self.path.to_owned(), source })?;
        self.position = self.position.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// Bytes that the header may still take.
    fn remaining(&self) -> u64 {
        self.file_size.min(MAX_HEADER_BYTES).saturating_sub(self.position)
    }

    fn error(&self, offset: u64, message: &str) -> Error {
        invalid(self.path, format!("at offset {offset}: {message}"))
    }
}
