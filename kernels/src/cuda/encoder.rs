//! What an encoder does between matrix products: sums with their layer norm, bias and activation, pooling.

use candle_core::{DType, Device, Tensor};

use super::module::{Argument, File, launch, multiprocessors};
use super::ragged::Cut;
use super::tensor::{address_of, device_of, narrow, rows, suffix, unwritten};
use crate::error::{Result, argument};
use crate::ops::{Activation, LayerNorm, PoolingMode};

/// Most parts of a sum, as in cuda/encoder.cu.
const MAX_PARTS: usize = 3;

/// As `LayerNorm` in cuda/encoder.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LayerNormArgs {
    parts: [u64; MAX_PARTS],
    ids: [u64; MAX_PARTS],
    strides: [u64; MAX_PARTS],
    added: u64,
    weight: u64,
    bias: u64,
    sum: u64,
    out: u64,
    rows: u32,
    width: u32,
    eps: f32,
}

/// What is added up before a norm: a matrix, and which of its rows; without ids all, in order.
pub(crate) type Part<'a> = (&'a Tensor, Option<&'a [u32]>);

/// The sum of `parts`, each `count` rows of the norm's width, and of `added` on every row: rounded to the parts' type if
/// `keep_sum`, and its norm. Ids were checked. `None`: no kernel for the types.
pub(crate) fn layer_norm(
    parts: &[Part<'_>],
    added: Option<&Tensor>,
    norm: &LayerNorm<'_>,
    keep_sum: bool,
) -> Result<Option<(Option<Tensor>, Tensor)>> {
    let Some((first, ids)) = parts.first().copied().filter(|_| parts.len() <= MAX_PARTS) else {
        return Ok(None);
    };
    let (Some(device), Some(suffix)) = (device_of(first), suffix(first.dtype())) else { return Ok(None) };
    if parts.iter().any(|(part, _)| part.dtype() != first.dtype() || part.rank() != 2) {
        return Ok(None);
    }
    let (all, width) = first.dims2()?;
    let count = ids.map_or(all, <[u32]>::len);
    let out = unwritten(&device, &[count, width], first.dtype())?;
    let sum = keep_sum.then(|| unwritten(&device, &[count, width], first.dtype())).transpose()?;
    if count == 0 || width == 0 {
        return Ok(Some((sum, out)));
    }
    // All ids in one upload, one part's after another's.
    let ids: Vec<u32> = parts.iter().filter_map(|(_, ids)| *ids).flatten().copied().collect();
    let ids = if ids.is_empty() { None } else { Some(Tensor::new(ids, first.device())?) };
    let mut next_ids = ids.as_ref().map_or(Ok(0), |ids| address_of(&device, ids))?;
    let vector = |x: &Tensor, dtype| -> Result<Tensor> { Ok(x.to_dtype(dtype)?.contiguous()?) };
    let weight = vector(norm.weight, DType::F32)?;
    let bias = norm.bias.map(|bias| vector(bias, DType::F32)).transpose()?;
    let added = added.map(|added| vector(added, first.dtype())).transpose()?;
    let address = |x: Option<&Tensor>| x.map_or(Ok(0), |x| address_of(&device, x));
    let mut arguments = LayerNormArgs {
        added: address(added.as_ref())?,
        weight: address_of(&device, &weight)?,
        bias: address(bias.as_ref())?,
        sum: address(sum.as_ref())?,
        out: address_of(&device, &out)?,
        rows: narrow(count)?,
        width: narrow(width)?,
        eps: norm.eps,
        ..LayerNormArgs::default()
    };
    let mut held = Vec::with_capacity(parts.len());
    for (at, (part, ids)) in parts.iter().enumerate() {
        let (matrix, stride) = rows(part)?;
        (arguments.parts[at], arguments.strides[at]) = (address_of(&device, &matrix)?, stride);
        if let Some(ids) = ids {
            arguments.ids[at] = next_ids;
            next_ids += 4 * ids.len() as u64;
        }
        held.push(matrix);
    }
    let warps = 4;
    let size = ([narrow(count)?.div_ceil(warps), 1, 1], 32 * warps, 0);
    let name = format!("layer_norm_{suffix}");
    // SAFETY: the arguments of layer_norm; `ops` has checked shapes and ids, and `held` outlives the launch.
    unsafe { launch(&device, (File::Encoder, &name), size, &[Argument::LayerNorm(arguments)])? };
    Ok(Some((sum, out)))
}

/// `activation(x + bias)` for `x [rows, width]` and `bias [width]`, each if there is one; written over `x`, which must be
/// the caller's alone, if `in_place`. `None`: no kernel for the type.
pub(crate) fn bias_activate(
    x: &Tensor,
    bias: Option<&Tensor>,
    activation: Option<Activation>,
    in_place: bool,
) -> Result<Option<Tensor>> {
    let (Some(device), Some(suffix)) = (device_of(x), suffix(x.dtype())) else { return Ok(None) };
    let (count, width) = x.dims2()?;
    let (x, stride) = rows(x)?;
    let out = match in_place && x.is_contiguous() {
        true => x.clone(),
        false => unwritten(&device, &[count, width], x.dtype())?,
    };
    if count == 0 || width == 0 {
        return Ok(Some(out));
    }
    let bias = bias.map(|bias| Ok::<_, crate::Error>(bias.to_dtype(x.dtype())?.contiguous()?)).transpose()?;
    let arguments = [
        Argument::Address(address_of(&device, &x)?),
        Argument::Address(stride),
        Argument::Address(bias.as_ref().map_or(Ok(0), |bias| address_of(&device, bias))?),
        Argument::Address(address_of(&device, &out)?),
        Argument::U32(narrow(width)?),
        Argument::U32(narrow(count)?),
        Argument::U32(activation.map_or(NO_ACTIVATION, super::elementwise::number)),
    ];
    let threads = 128;
    let columns = width.div_ceil(8 * threads);
    // As many threads as the device holds; each then does several rows.
    let blocks = (BLOCKS_A_PROCESSOR * multiprocessors(&device)?).div_ceil(columns);
    let grid = [narrow(columns)?, narrow(count.min(blocks).min(65_535))?, 1];
    let name = format!("bias_activate_{suffix}");
    // SAFETY: the arguments of bias_activate; `ops` has checked that the bias is as wide as a row.
    unsafe { launch(&device, (File::Encoder, &name), (grid, threads as u32, 0), &arguments)? };
    Ok(Some(out))
}

/// As in cuda/encoder.cu.
const NO_ACTIVATION: u32 = 4;
/// Blocks of 128 threads that a multiprocessor holds.
const BLOCKS_A_PROCESSOR: usize = 16;

/// See [`crate::ops::pool`]. `None`: no kernel for the type.
pub(crate) fn pool(x: &Tensor, cu_seqlens: &[u32], modes: &[PoolingMode]) -> Result<Option<Vec<f32>>> {
    let (Some(device), Some(suffix)) = (device_of(x), suffix(x.dtype())) else { return Ok(None) };
    let (_, width) = x.dims2()?;
    let num_seqs = cu_seqlens.len().saturating_sub(1);
    if num_seqs == 0 || width == 0 || modes.is_empty() {
        return Ok(Some(Vec::new()));
    }
    if num_seqs > 65_535 {
        return Err(argument("pool", format!("{num_seqs} sequences at once; at most 65535 can be")));
    }
    let cut = Cut::of(cu_seqlens, &device)?;
    let (x, stride) = rows(x)?;
    let out = unwritten(&device, &[num_seqs, modes.len() * width], DType::F32)?;
    for (at, mode) in modes.iter().enumerate() {
        let arguments = [
            Argument::Address(address_of(&device, &x)?),
            Argument::Address(stride),
            Argument::Address(cut.cu_seqlens()),
            Argument::Address(address_of(&device, &out)? + (4 * at * width) as u64),
            Argument::Address((modes.len() * width) as u64),
            Argument::U32(narrow(width)?),
            Argument::U32(match mode {
                PoolingMode::Cls => 0,
                PoolingMode::Last => 1,
                PoolingMode::Max => 2,
                PoolingMode::Mean => 3,
                PoolingMode::MeanSqrtLen => 4,
                PoolingMode::WeightedMean => 5,
            }),
        ];
        let grid = [narrow(width.div_ceil(4 * 32))?, narrow(num_seqs)?, 1];
        let name = format!("pool_{suffix}");
        // SAFETY: the arguments of pool; `ops` has checked that the sequences cut the rows and that none is empty.
        unsafe { launch(&device, (File::Encoder, &name), (grid, 256, 0), &arguments)? };
    }
    Ok(Some(out.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?))
}
