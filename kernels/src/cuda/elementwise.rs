//! What lies between matrix products: norms, gates, rows of embeddings, rotation and the cache store.

use candle_core::{DType, Tensor};

use super::ids::Ids;
use super::module::{Argument, File, launch};
use super::step::StepMeta;
use super::tensor::{address_of, device_of, narrow, rows, suffix, unwritten};
use crate::error::Result;
use crate::ops::{Activation, LateIds, PagedMeta, RopeTables, RotateParams};

/// Threads of a block that norms a row of `width`.
fn threads(width: usize) -> u32 {
    (width.div_ceil(8).next_multiple_of(32) as u32).clamp(32, 512)
}

/// `(a + scale * b, its norm)`, or the norm of `a` where there is no `b`. `None`: no kernel for the type.
pub(crate) fn rms_norm(
    a: &Tensor,
    b: Option<(&Tensor, f32)>,
    weight: &Tensor,
    eps: f32,
) -> Result<Option<(Option<Tensor>, Tensor)>> {
    let (Some(device), Some(suffix)) = (device_of(a), suffix(a.dtype())) else { return Ok(None) };
    if weight.dtype() != DType::F32 || !weight.is_contiguous() || a.rank() == 0 {
        return Ok(None);
    }
    let width = a.dims()[a.rank() - 1];
    let count = a.elem_count() / width.max(1);
    let flat = |x: &Tensor| -> Result<(Tensor, u64)> {
        if x.rank() == 2 { rows(x) } else { Ok((x.contiguous()?, width as u64)) }
    };
    let (x, x_stride) = flat(a)?;
    let out = unwritten(&device, a.dims(), a.dtype())?;
    let b = b.map(|(b, scale)| Ok::<_, crate::Error>((flat(b)?, scale))).transpose()?;
    let sum = b.is_some().then(|| unwritten(&device, a.dims(), a.dtype())).transpose()?;
    if count > 0 {
        let address = |x: Option<&Tensor>| x.map_or(Ok(0), |x| address_of(&device, x));
        let (y, y_stride, scale) = match &b {
            Some(((y, stride), scale)) => (Some(y), *stride, *scale),
            None => (None, 0, 1.0),
        };
        let arguments = [
            Argument::Address(address_of(&device, &x)?),
            Argument::Address(x_stride),
            Argument::Address(address(y)?),
            Argument::Address(y_stride),
            Argument::Address(address(sum.as_ref())?),
            Argument::Address(address_of(&device, weight)?),
            Argument::Address(address_of(&device, &out)?),
            Argument::U32(narrow(width)?),
            Argument::F32(eps),
            Argument::F32(scale),
        ];
        let name = format!("rms_norm_{suffix}");
        let size = ([narrow(count)?, 1, 1], threads(width), 0);
        // SAFETY: the arguments of rms_norm; shapes were checked by `ops`, tensors outlive the launch.
        unsafe { launch(&device, (File::Elementwise, &name), size, &arguments)? };
    }
    Ok(Some((sum, out)))
}

/// The number of `activation` in cuda/activation.cuh.
pub(super) fn number(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
        Activation::Relu => 3,
    }
}

/// See [`crate::ops::gated_activation`]; `bias`, as wide as `gate_up`, is added before. `None`: no kernel for the type.
pub(crate) fn gated_activation(
    gate_up: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Option<Tensor>> {
    let (Some(device), Some(suffix)) = (device_of(gate_up), suffix(gate_up.dtype())) else {
        return Ok(None);
    };
    let (tokens, both) = gate_up.dims2()?;
    let width = both / 2;
    let out = unwritten(&device, &[tokens, width], gate_up.dtype())?;
    if tokens > 0 && width > 0 {
        let (x, stride) = rows(gate_up)?;
        let bias =
            bias.map(|bias| Ok::<_, crate::Error>(bias.to_dtype(x.dtype())?.contiguous()?)).transpose()?;
        let arguments = [
            Argument::Address(address_of(&device, &x)?),
            Argument::Address(stride),
            Argument::Address(bias.as_ref().map_or(Ok(0), |bias| address_of(&device, bias))?),
            Argument::Address(address_of(&device, &out)?),
            Argument::U32(narrow(width)?),
            Argument::U32(narrow(tokens)?),
            Argument::U32(number(activation)),
        ];
        let grid = [narrow(width.div_ceil(8 * 256))?, narrow(tokens)?.min(65_535), 1];
        let name = format!("gated_{suffix}");
        // SAFETY: the arguments of gated; a row and the bias hold gate and up.
        unsafe { launch(&device, (File::Elementwise, &name), (grid, 256, 0), &arguments)? };
    }
    Ok(Some(out))
}

/// Rows `ids` of `table [rows, width]`, all of which are rows; those of `late` where it names them. `None`: no kernel for the
/// type.
pub(crate) fn embedding(ids: &[u32], late: Option<&LateIds>, table: &Tensor) -> Result<Option<Tensor>> {
    let (Some(device), Some(suffix)) = (device_of(table), suffix(table.dtype())) else { return Ok(None) };
    let (num_rows, width) = table.dims2()?;
    let out = unwritten(&device, &[ids.len(), width], table.dtype())?;
    if !ids.is_empty() && width > 0 {
        let (table, stride) = rows(table)?;
        let ids = Ids::upload(&device, ids, late, num_rows)?;
        let arguments = [
            Argument::Address(address_of(&device, &table)?),
            Argument::Address(stride),
            Argument::Address(ids.address(&device)),
            Argument::Address(address_of(&device, &out)?),
            Argument::U32(narrow(width)?),
            Argument::U32(narrow(num_rows)?),
            Argument::F32(1.0),
        ];
        let size = ([narrow(out.dims()[0])?, 1, 1], threads(width), 0);
        let name = format!("gather_{suffix}");
        // SAFETY: the arguments of gather, which reads no row that is none.
        unsafe { launch(&device, (File::Elementwise, &name), size, &arguments)? };
    }
    Ok(Some(out))
}

/// As `RotateStore` in cuda/elementwise.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RotateStoreArgs {
    inputs: [u64; 3],
    strides: [u64; 3],
    norms: [u64; 2],
    cos: u64,
    sin: u64,
    positions: u64,
    slots: u64,
    outputs: [u64; 3],
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    half: u32,
    num_slots: u32,
    eps: f32,
}

/// See [`crate::ops::rotate_store`]; `k`, `v` and the cache are absent where only queries are rotated. `None`: no
/// kernel for the types.
pub(crate) fn rotate_store(
    q: &Tensor,
    kv: Option<(&Tensor, &Tensor)>,
    cache: Option<(&Tensor, &Tensor)>,
    params: &RotateParams<'_>,
    meta: Option<&PagedMeta>,
) -> Result<Option<Tensor>> {
    let (Some(device), Some(suffix)) = (device_of(q), suffix(q.dtype())) else { return Ok(None) };
    let name = match cache.map_or(q.dtype(), |(k, _)| k.dtype()) {
        same if same == q.dtype() => format!("rotate_store_{suffix}"),
        DType::U8 if q.dtype() != DType::F32 => format!("rotate_store_{suffix}_fp8"),
        _ => return Ok(None),
    };
    let (tokens, heads, head_dim) = q.dims3()?;
    let out = unwritten(&device, q.dims(), q.dtype())?;
    if tokens == 0 || head_dim == 0 {
        return Ok(Some(out));
    }
    let mut arguments = RotateStoreArgs {
        tokens: narrow(tokens)?,
        heads: narrow(heads)?,
        head_dim: narrow(head_dim)?,
        eps: params.eps,
        ..RotateStoreArgs::default()
    };
    let step = meta.map(|meta| StepMeta::of(meta, &device)).transpose()?;
    let mut held = vec![rows(q)?];
    if let (Some((k, v)), Some((k_cache, v_cache))) = (kv, cache) {
        held.extend([rows(k)?, rows(v)?]);
        arguments.kv_heads = narrow(k.dims3()?.1)?;
        arguments.num_slots = narrow(k_cache.dims3()?.0)?;
        arguments.outputs[1] = address_of(&device, k_cache)?;
        arguments.outputs[2] = address_of(&device, v_cache)?;
        arguments.slots = step.as_ref().map_or(0, |step| step.slots());
    }
    for (i, (x, stride)) in held.iter().enumerate() {
        (arguments.inputs[i], arguments.strides[i]) = (address_of(&device, x)?, *stride);
    }
    arguments.outputs[0] = address_of(&device, &out)?;
    if let Some((q_norm, k_norm)) = params.norms {
        arguments.norms = [address_of(&device, q_norm)?, address_of(&device, k_norm)?];
    }
    if let Some(RopeTables { cos, sin, by_position }) = params.tables {
        arguments.half = narrow(cos.dims2()?.1)?;
        (arguments.cos, arguments.sin) = (address_of(&device, cos)?, address_of(&device, sin)?);
        if *by_position {
            arguments.positions = step.as_ref().map_or(0, |step| step.positions());
        }
    }
    let warps = 4;
    let all_heads = arguments.heads + 2 * arguments.kv_heads;
    let size = ([arguments.tokens, all_heads.div_ceil(warps), 1], 32 * warps, 0);
    // SAFETY: the arguments of rotate_store; shapes, slots and positions were checked by `ops`, and the caches belong to
    // this thread, whose stream orders their writes and reads.
    unsafe { launch(&device, (File::Elementwise, &name), size, &[Argument::RotateStore(arguments)])? };
    Ok(Some(out))
}
