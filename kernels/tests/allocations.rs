//! What operations of a decoding step ask the allocator for: their outputs, and a few headers.

#![allow(clippy::unwrap_used, missing_docs, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use ingle_kernels::ops::{self, AttnParams, PagedMeta};
use ingle_kernels::{KvDtype, KvLayer, Quantization, Result, Weight};

struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does everything.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: given by the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: given by the caller.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CPU: Device = Device::Cpu;
/// Shapes, strides, lists of blocks and pieces.
const HEADERS: usize = 4 << 10;

fn random(shape: &[usize]) -> Tensor {
    Tensor::rand(-1.0_f32, 1.0, shape, &CPU).unwrap()
}

/// `op` twice, so that the thread has its working memory; the second time only the output may be allocated.
fn check(name: &str, op: impl Fn() -> Result<Tensor>) {
    op().unwrap();
    let before = BYTES.load(Ordering::Relaxed);
    let output = op().unwrap();
    let allocated = BYTES.load(Ordering::Relaxed) - before;
    let wanted = output.elem_count() * output.dtype().size_in_bytes();
    assert!((wanted..wanted + HEADERS).contains(&allocated), "{name}: {allocated} bytes for {wanted}");
}

/// One test, since all threads count.
#[test]
fn working_memory_is_kept() {
    // With more threads it is left to chance which of them has what pieces, and so memory for them.
    ingle_kernels::set_num_threads(1);
    let matrix = random(&[600, 1056]);
    let weight = |quantization| Weight::quantized(std::slice::from_ref(&matrix), quantization, &CPU).unwrap();
    let weights = [
        ("f32", Weight::new(matrix.clone(), DType::F32, &CPU).unwrap()),
        ("bf16", Weight::new(matrix.clone(), DType::BF16, &CPU).unwrap()),
        ("int8", weight(Quantization::Int8)),
        ("int4", weight(Quantization::Int4)),
    ];
    for tokens in [1, 8, 40] {
        let x = random(&[tokens, 1056]);
        for (name, weight) in &weights {
            check(&format!("{name}, {tokens} tokens"), || ops::linear(&x, weight, None));
        }
    }
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Int8] {
        for (seqs, len) in [(1_u32, 600_u32), (8, 100)] {
            let blocks = len.div_ceil(16);
            let meta = PagedMeta {
                block_size: 16,
                positions: vec![len - 1; seqs as usize],
                cu_seqlens_q: (0..=seqs).collect(),
                seq_lens: vec![len; seqs as usize],
                block_tables: (0..seqs * blocks).collect(),
                cu_blocks: (0..=seqs).map(|seq| seq * blocks).collect(),
                ..PagedMeta::default()
            };
            let slots = (seqs * blocks * 16) as usize;
            let mut layer = KvLayer::new(slots, 3, 64, dtype, &CPU).unwrap();
            let all = PagedMeta { slot_mapping: (0..slots as u32).collect(), ..meta.clone() };
            ops::store_kv(&mut layer, &random(&[slots, 3, 64]), &random(&[slots, 3, 64]), &all).unwrap();
            let q = random(&[seqs as usize, 9, 64]);
            let params = AttnParams { scale: 0.125, sliding_window: None, softcap: None };
            check(&format!("attention, {dtype:?}, {seqs} sequences"), || {
                ops::paged_attention(&q, &layer, &meta, &params)
            });
        }
    }
}
