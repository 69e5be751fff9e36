//! Which part of each tensor a rank holds.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Tensor};
use ingle_kernels::{BlockType, Fp8Matrix, QuantizedBlocks};

use crate::config::DecoderConfig;
use crate::error::Result;
use crate::json::ConfigJson;
use crate::layout::{ExpertsSpec, LinearSpec, MlpSpec, ModelSpec, TensorSpec};
use crate::source::{BlockFormat, TensorSource};

/// A rank's number among all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
}

impl Place {
    /// This rank's share of `size` that all ranks divide evenly.
    fn share(self, size: usize) -> Range<usize> {
        let width = size / self.world_size;
        self.rank * width..(self.rank + 1) * width
    }
}

/// What a rank holds of a model.
#[derive(Debug)]
pub(crate) struct Shards {
    slices: BTreeMap<String, (Slice, Vec<usize>)>,
    /// Rows of embedding and head.
    pub(crate) vocab: Range<usize>,
    /// Ranks that hold the same key/value heads.
    pub(crate) kv_replicas: usize,
}

/// A part of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Slice {
    /// These ranges of one dimension, one after another.
    Ranges { dim: usize, ranges: Vec<Range<usize>> },
    /// Zeros: the bias of a projection whose outputs are summed over the ranks is added by the first alone.
    Zeros,
}

impl Shards {
    /// Divides the tensors of `spec`, the whole model that `config` describes, and makes `config` that of the rank.
    ///
    /// # Errors
    /// If heads, the MLP's width or the vocabulary cannot be divided.
    pub(crate) fn new(
        config: &mut DecoderConfig,
        spec: &ModelSpec,
        place: Place,
        json: &ConfigJson<'_>,
    ) -> Result<Self> {
        let Place { rank, world_size } = place;
        let refuse =
            |what: String| Err(json.invalid(format!("{what} cannot be divided over {world_size} ranks")));
        let divides = |size: usize| size.is_multiple_of(world_size);
        if !divides(config.num_heads) {
            return refuse(format!("{} attention heads", config.num_heads));
        }
        let kv_heads = config.num_kv_heads;
        let (kv, kv_replicas) = if divides(kv_heads) {
            (place.share(kv_heads), 1)
        } else if world_size.is_multiple_of(kv_heads) {
            let replicas = world_size / kv_heads;
            (rank / replicas..rank / replicas + 1, replicas)
        } else {
            return refuse(format!("{kv_heads} key/value heads"));
        };
        let dense = spec.layers.iter().any(|layer| matches!(layer.mlp, MlpSpec::Dense { .. }));
        if dense && !divides(config.intermediate_size) {
            return refuse(format!("an MLP of width {}", config.intermediate_size));
        }
        if let Some(moe) = config.moe.filter(|moe| !divides(moe.intermediate_size)) {
            return refuse(format!("experts of width {}", moe.intermediate_size));
        }
        let width = config.vocab_size.div_ceil(world_size);
        let vocab = (rank * width).min(config.vocab_size)..((rank + 1) * width).min(config.vocab_size);
        if (world_size - 1) * width >= config.vocab_size {
            return refuse(format!("a vocabulary of {}", config.vocab_size));
        }

        let mut shards = Self { slices: BTreeMap::new(), vocab: vocab.clone(), kv_replicas };
        shards.cut(&spec.embedding, 0, std::slice::from_ref(&vocab));
        if let Some(head) = &spec.head {
            shards.cut(head, 0, std::slice::from_ref(&vocab));
        }
        let head_dim = config.head_dim;
        let features = |heads: Range<usize>| heads.start * head_dim..heads.end * head_dim;
        let q = features(place.share(config.num_heads));
        let qkv = [
            (config.num_heads * head_dim, q.clone()),
            (kv_heads * head_dim, features(kv.clone())),
            (kv_heads * head_dim, features(kv.clone())),
        ];
        for layer in &spec.layers {
            shards.cut_outputs(&layer.qkv, &qkv);
            shards.cut_inputs(&layer.o, &q, rank);
            match &layer.mlp {
                MlpSpec::Dense { gate_up, down } => {
                    shards.cut_mlp(gate_up, down, config.intermediate_size, place);
                }
                MlpSpec::Moe { experts, .. } => {
                    let width = config.moe.map_or(0, |moe| moe.intermediate_size);
                    match experts {
                        ExpertsSpec::Separate(experts) => {
                            for (gate_up, down) in experts {
                                shards.cut_mlp(gate_up, down, width, place);
                            }
                        }
                        ExpertsSpec::Fused { gate_up, down } => {
                            let own = place.share(width);
                            shards.cut(gate_up, 1, &[own.clone(), own.start + width..own.end + width]);
                            shards.cut(down, 2, &[own]);
                        }
                    }
                }
            }
        }
        config.num_heads /= world_size;
        config.num_kv_heads = kv.len();
        config.intermediate_size /= world_size;
        if let Some(moe) = &mut config.moe {
            moe.intermediate_size /= world_size;
        }
        Ok(shards)
    }

    fn cut(&mut self, spec: &TensorSpec, dim: usize, ranges: &[Range<usize>]) {
        let mut shape = spec.shape.clone();
        shape[dim] = ranges.iter().map(Range::len).sum();
        self.slices.insert(spec.name.clone(), (Slice::Ranges { dim, ranges: ranges.to_vec() }, shape));
    }

    /// Rows of matrices and biases: `parts` are their rows in all and those of the rank, stacked in one tensor or each in
    /// its own.
    fn cut_outputs(&mut self, linear: &LinearSpec, parts: &[(usize, Range<usize>)]) {
        for specs in [&linear.weights, &linear.biases] {
            if let [fused] = specs.as_slice() {
                let mut begin = 0;
                let mut ranges = Vec::with_capacity(parts.len());
                for (rows, own) in parts {
                    ranges.push(begin + own.start..begin + own.end);
                    begin += rows;
                }
                self.cut(fused, 0, &ranges);
            } else {
                for (spec, (_, own)) in specs.iter().zip(parts) {
                    self.cut(spec, 0, std::slice::from_ref(own));
                }
            }
        }
    }

    /// Columns of a matrix; its bias belongs to the first rank.
    fn cut_inputs(&mut self, linear: &LinearSpec, own: &Range<usize>, rank: usize) {
        for spec in &linear.weights {
            self.cut(spec, 1, std::slice::from_ref(own));
        }
        for spec in linear.biases.iter().filter(|_| rank > 0) {
            self.slices.insert(spec.name.clone(), (Slice::Zeros, spec.shape.clone()));
        }
    }

    fn cut_mlp(&mut self, gate_up: &LinearSpec, down: &LinearSpec, width: usize, place: Place) {
        let own = place.share(width);
        self.cut_outputs(gate_up, &[(width, own.clone()), (width, own.clone())]);
        self.cut_inputs(down, &own, place.rank);
    }
}

/// A checkpoint of which only a rank's share is seen.
pub(crate) struct ShardedSource {
    source: Box<dyn TensorSource>,
    shards: Shards,
}

impl ShardedSource {
    pub(crate) fn new(source: Box<dyn TensorSource>, shards: Shards) -> Self {
        Self { source, shards }
    }

    fn slice(&self, name: &str) -> Option<&Slice> {
        self.shards.slices.get(name).map(|(slice, _)| slice)
    }
}

impl TensorSource for ShardedSource {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn names(&self) -> Vec<&str> {
        self.source.names()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        match self.shards.slices.get(name) {
            Some((_, shape)) => Some(shape),
            None => self.source.shape(name),
        }
    }

    fn file_of(&self, name: &str) -> &Path {
        self.source.file_of(name)
    }

    fn dtype(&self, name: &str) -> Result<Option<DType>> {
        self.source.dtype(name)
    }

    fn stored_as(&self, name: &str) -> Option<&str> {
        self.source.stored_as(name)
    }

    fn block_format(&self, name: &str) -> Option<BlockFormat> {
        let format = self.source.block_format(name)?;
        let whole_blocks = |ranges: &[Range<usize>]| {
            let aligned = |end: &usize| end.is_multiple_of(BlockType::BLOCK_SIZE);
            ranges.iter().all(|range| aligned(&range.start) && aligned(&range.end))
        };
        match self.slice(name) {
            Some(Slice::Ranges { dim: 1, ranges }) if !whole_blocks(ranges) => {
                Some(BlockFormat::Other(self.stored_as(name).unwrap_or(format.name()).to_owned()))
            }
            _ => Some(format),
        }
    }

    fn load_blocks(&self, name: &str) -> Result<QuantizedBlocks> {
        let blocks = self.source.load_blocks(name)?;
        let Some(Slice::Ranges { dim, ranges }) = self.slice(name) else { return Ok(blocks) };
        let row_bytes = blocks.cols / BlockType::BLOCK_SIZE * blocks.block_type.block_bytes();
        let mut bytes = Vec::new();
        let (mut rows, mut cols) = (blocks.rows, blocks.cols);
        if *dim == 0 {
            rows = ranges.iter().map(Range::len).sum();
            for range in ranges {
                bytes.extend_from_slice(&blocks.bytes[range.start * row_bytes..range.end * row_bytes]);
            }
        } else {
            cols = ranges.iter().map(Range::len).sum();
            let at = |col: usize| col / BlockType::BLOCK_SIZE * blocks.block_type.block_bytes();
            for row in blocks.bytes.chunks_exact(row_bytes) {
                for range in ranges {
                    bytes.extend_from_slice(&row[at(range.start)..at(range.end)]);
                }
            }
        }
        Ok(QuantizedBlocks { block_type: blocks.block_type, rows, cols, bytes })
    }

    fn fp8_step(&self, name: &str) -> Option<usize> {
        let step = self.source.fp8_step(name)?;
        let whole = |range: &Range<usize>| range.start.is_multiple_of(step) && range.end.is_multiple_of(step);
        match self.slice(name) {
            Some(Slice::Ranges { dim: 1, ranges }) if !ranges.iter().all(whole) => None,
            Some(Slice::Zeros) => None,
            _ => Some(step),
        }
    }

    fn load_fp8(&self, name: &str) -> Result<Fp8Matrix> {
        let whole = self.source.load_fp8(name)?;
        let Some(Slice::Ranges { dim, ranges }) = self.slice(name) else { return Ok(whole) };
        let groups = whole.cols.div_ceil(Fp8Matrix::GROUP);
        let width: usize = ranges.iter().map(Range::len).sum();
        if *dim == 0 {
            return Ok(Fp8Matrix {
                bytes: rows_of(&whole.bytes, whole.cols, ranges),
                rows: width,
                cols: whole.cols,
                row_scales: rows_of(&whole.row_scales, 1, ranges),
                factors: if whole.factors.is_empty() {
                    Vec::new()
                } else {
                    rows_of(&whole.factors, groups, ranges)
                },
            });
        }
        // Of whole groups, which `fp8_step` saw to, or of a matrix that has no factors.
        let of_groups: Vec<_> = ranges
            .iter()
            .map(|range| range.start / Fp8Matrix::GROUP..range.end.div_ceil(Fp8Matrix::GROUP))
            .collect();
        let factors = if whole.factors.is_empty() {
            Vec::new()
        } else {
            columns_of(&whole.factors, groups, &of_groups)
        };
        Ok(Fp8Matrix { bytes: columns_of(&whole.bytes, whole.cols, ranges), cols: width, factors, ..whole })
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        match self.slice(name) {
            None => self.source.load(name),
            Some(Slice::Zeros) => Ok(self.source.load(name)?.zeros_like()?),
            Some(Slice::Ranges { dim, ranges }) => self.source.load_part(name, *dim, ranges),
        }
    }
}

/// Ranges of the rows of a matrix of `width` columns.
fn rows_of<T: Copy>(values: &[T], width: usize, ranges: &[Range<usize>]) -> Vec<T> {
    ranges.iter().flat_map(|range| &values[range.start * width..range.end * width]).copied().collect()
}

/// Ranges of the columns of a matrix of `width` columns.
fn columns_of<T: Copy>(values: &[T], width: usize, ranges: &[Range<usize>]) -> Vec<T> {
    let of_row =
        |row: &[T]| -> Vec<T> { ranges.iter().flat_map(|range| &row[range.clone()]).copied().collect() };
    values.chunks_exact(width).flat_map(of_row).collect()
}
