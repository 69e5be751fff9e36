//! Attention over the paged cache, and without one: which kernel computes which sequence, and in what grid.

use candle_core::{CudaDevice, DType, Tensor};

use super::module::{Argument, File, launch, multiprocessors};
use super::ragged::Cut;
use super::step::StepMeta;
use super::tensor::{address_of, aligned_rows, device_of, narrow, suffix, unwritten};
use crate::error::Result;
use crate::ops::{AttnParams, PagedMeta, RelativeBias, SelfAttnParams};

/// Shared memory of the largest tiles of prefill: what the smallest device served gives a block.
pub(super) const MAX_SHARED_BYTES: i32 = 99 << 10;
/// Rows of a tile of prefill.
const PREFILL_ROWS: usize = 64;
/// Blocks that keep a multiprocessor busy.
const BLOCKS_A_PROCESSOR: usize = 4;
/// Further than any key is away.
const UNLIMITED: i32 = i32::MAX / 2;

/// As `Attention` in cuda/attention.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AttentionArgs {
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    block_tables: u64,
    cu_blocks: u64,
    seq_lens: u64,
    cu_seqlens_q: u64,
    seqs: u64,
    cu_parts: u64,
    part_out: u64,
    part_stats: u64,
    bias: u64,
    q_stride: u64,
    k_stride: u64,
    v_stride: u64,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    num_seqs: u32,
    left: i32,
    right: i32,
    scale: f32,
    softcap: f32,
    bias_stride: u32,
    bias_reach: u32,
}

/// The instance of a kernel over a cache that computes heads of `head_dim`: its width, and its name without that.
fn instance(q: DType, cache: DType, head_dim: usize) -> Option<(usize, String)> {
    let width = [64, 96, 128, 256].into_iter().find(|width| *width >= head_dim)?;
    if !head_dim.is_multiple_of(8) || q == DType::F32 {
        return None;
    }
    let suffix = suffix(q)?;
    match cache {
        cache if cache == q => Some((width, suffix.to_owned())),
        DType::U8 => Some((width, format!("{suffix}_fp8"))),
        _ => None,
    }
}

/// Of attention without a cache, with a bias or not: the width of its instance, and its name without that.
fn encoder_instance(dtype: DType, head_dim: usize, biased: bool) -> Option<(usize, String)> {
    let widths: &[usize] = if biased { &[32, 64, 96, 128] } else { &[32, 64, 96, 128, 256] };
    let width = widths.iter().copied().find(|width| *width >= head_dim)?;
    let suffix = suffix(dtype).filter(|_| head_dim.is_multiple_of(8) && dtype != DType::F32)?;
    Some((width, format!("attention_{}_{suffix}", if biased { "biased" } else { "prefill" })))
}

fn limit(size: Option<usize>) -> i32 {
    size.and_then(|size| i32::try_from(size).ok()).map_or(UNLIMITED, |size| size.min(UNLIMITED))
}

/// See [`crate::ops::paged_attention`]. `None`: no kernel for the types or the width of heads.
pub(crate) fn paged_attention(
    q: &Tensor,
    (k, v): (&Tensor, &Tensor),
    meta: &PagedMeta,
    params: &AttnParams,
) -> Result<Option<Tensor>> {
    let (tokens, heads, head_dim) = q.dims3()?;
    let (_, kv_heads, _) = k.dims3()?;
    let Some(device) = device_of(q) else { return Ok(None) };
    let Some((width, name)) = instance(q.dtype(), k.dtype(), head_dim) else { return Ok(None) };
    let out = unwritten(&device, q.dims(), q.dtype())?;
    if tokens == 0 {
        return Ok(Some(out));
    }
    let step = StepMeta::of(meta, &device)?;
    let (q, q_stride) = aligned_rows(&device, q)?;
    let stride = (kv_heads * head_dim) as u64;
    let mut arguments = AttentionArgs {
        q: address_of(&device, &q)?,
        k: address_of(&device, k)?,
        v: address_of(&device, v)?,
        out: address_of(&device, &out)?,
        block_tables: step.block_tables(),
        cu_blocks: step.cu_blocks(),
        seq_lens: step.seq_lens(),
        cu_seqlens_q: step.cu_seqlens_q(),
        seqs: step.seqs(),
        cu_parts: step.cu_parts(),
        q_stride,
        k_stride: stride,
        v_stride: stride,
        heads: narrow(heads)?,
        kv_heads: narrow(kv_heads)?,
        head_dim: narrow(head_dim)?,
        block_size: narrow(meta.block_size)?,
        num_seqs: narrow(meta.num_seqs())?,
        left: limit(params.sliding_window),
        right: 0,
        scale: params.scale,
        softcap: params.softcap.unwrap_or(0.0),
        ..AttentionArgs::default()
    };
    let plan = step.plan();
    let num_prefill = meta.num_seqs() - plan.num_decode;
    if plan.num_decode > 0 {
        let numbers = heads * (head_dim + 2) * if plan.most_parts > 1 { plan.num_parts } else { 0 };
        let parts = unwritten(&device, &[numbers.max(1)], DType::F32)?;
        arguments.part_out = address_of(&device, &parts)?;
        arguments.part_stats = arguments.part_out + (4 * heads * head_dim * plan.num_parts) as u64;
        let groups = kv_heads * (heads / kv_heads).div_ceil(16);
        let blocks = BLOCKS_A_PROCESSOR * multiprocessors(&device)?;
        // A block takes several parts where there are more than keep the device busy; results are the same.
        let x = blocks.div_ceil(groups * plan.num_decode).clamp(1, plan.most_parts.max(1));
        let grid = [narrow(x)?, narrow(groups)?, narrow(plan.num_decode)?];
        let kernel = format!("attention_decode_{name}_{width}");
        // SAFETY: the arguments of the kernel; `meta` has been checked against the cache, and there is room for the parts.
        unsafe {
            launch(
                &device,
                (File::AttentionDecode, &kernel),
                (grid, 128, 0),
                &[Argument::Attention(arguments)],
            )?;
        }
        if plan.most_parts > 1 {
            let kernel = format!("attention_join_{}", suffix(q.dtype()).unwrap_or_default());
            let grid = [narrow(heads)?, narrow(plan.num_decode)?, 1];
            // SAFETY: as above.
            unsafe {
                launch(
                    &device,
                    (File::AttentionDecode, &kernel),
                    (grid, 128, 0),
                    &[Argument::Attention(arguments)],
                )?;
            }
        }
    }
    if num_prefill > 0 && plan.most_queries > 0 {
        arguments.seqs += 4 * plan.num_decode as u64;
        let name = format!("attention_prefill_{name}");
        prefill(&device, arguments, (&name, width), (plan.most_queries, num_prefill))?;
    }
    Ok(Some(out))
}

/// Launches the instance `name` of prefill for `num_seqs` sequences of at most `most_queries` queries.
fn prefill(
    device: &CudaDevice,
    arguments: AttentionArgs,
    (name, width): (&str, usize),
    (most_queries, num_seqs): (usize, usize),
) -> Result<()> {
    let group = (arguments.heads / arguments.kv_heads) as usize;
    let keys = if width == 256 { 32 } else { 64 };
    let shared = (PREFILL_ROWS + 4 * keys) * (width + 8) * 2;
    let grid =
        [narrow((most_queries * group).div_ceil(PREFILL_ROWS))?, arguments.kv_heads, narrow(num_seqs)?];
    let kernel = format!("{name}_{width}");
    let size = (grid, 128, narrow(shared)?);
    // SAFETY: the arguments of the kernel, whose shapes the callers have checked.
    unsafe { launch(device, (File::AttentionPrefill, &kernel), size, &[Argument::Attention(arguments)]) }
}

/// See [`crate::ops::self_attention`]. `None`: no kernel for the types or the width of heads.
pub(crate) fn self_attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    cu_seqlens: &[u32],
    bias: Option<&RelativeBias>,
    params: &SelfAttnParams,
) -> Result<Option<Tensor>> {
    let (tokens, heads, head_dim) = q.dims3()?;
    let (_, kv_heads, _) = k.dims3()?;
    let Some(device) = device_of(q) else { return Ok(None) };
    let same = k.dtype() == q.dtype() && v.dtype() == q.dtype();
    let instance = encoder_instance(q.dtype(), head_dim, bias.is_some());
    let Some((width, name)) = instance.filter(|_| same) else { return Ok(None) };
    let out = unwritten(&device, q.dims(), q.dtype())?;
    if tokens == 0 {
        return Ok(Some(out));
    }
    let cut = Cut::of(cu_seqlens, &device)?;
    let table = bias.map(|bias| bias.uploaded(q.device())).transpose()?;
    let (q, q_stride) = aligned_rows(&device, q)?;
    let (k, k_stride) = aligned_rows(&device, k)?;
    let (v, v_stride) = aligned_rows(&device, v)?;
    let arguments = AttentionArgs {
        q: address_of(&device, &q)?,
        k: address_of(&device, &k)?,
        v: address_of(&device, &v)?,
        out: address_of(&device, &out)?,
        cu_seqlens_q: cut.cu_seqlens(),
        seq_lens: cut.seq_lens(),
        seqs: cut.seqs(),
        bias: table.as_ref().map_or(Ok(0), |table| address_of(&device, table))?,
        q_stride,
        k_stride,
        v_stride,
        heads: narrow(heads)?,
        kv_heads: narrow(kv_heads)?,
        head_dim: narrow(head_dim)?,
        block_size: 1,
        num_seqs: narrow(cut.num_seqs())?,
        left: limit(params.left.map(|left| left.saturating_add(1))),
        right: limit(params.right),
        scale: params.scale,
        softcap: params.softcap.unwrap_or(0.0),
        bias_stride: bias.map_or(Ok(0), |bias| narrow(bias.stride()))?,
        bias_reach: bias.map_or(Ok(0), |bias| narrow(bias.reach()))?,
        ..AttentionArgs::default()
    };
    prefill(&device, arguments, (&name, width), (cut.longest(), cut.num_seqs()))?;
    Ok(Some(out))
}
