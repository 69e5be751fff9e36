//! The ragged batch of a step in device memory, uploaded once for all layers.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::module::address;
use super::transfer;
use crate::error::{Result, argument};
use crate::ops::PagedMeta;

/// Keys of a part of decode attention, as in cuda/attention_decode.cu.
pub(super) const SPLIT: usize = 128;

thread_local! {
    /// The step whose layers are being computed: found again by its contents, so that it can never be a stale one.
    static CURRENT: RefCell<Option<(DeviceId, PagedMeta, Rc<StepMeta>)>> = const { RefCell::new(None) };
    static RECORDING: Cell<bool> = const { Cell::new(false) };
}

/// An error while a step is recorded: for operations that upload numbers of the batch or look at results on the host,
/// which a replay would not do again.
pub(crate) fn refuse_while_recording(op: &'static str) -> Result<()> {
    if RECORDING.get() {
        return Err(argument(
            op,
            "there is no kernel for these types and shapes, and a recorded step needs one",
        ));
    }
    Ok(())
}

/// All numbers of a [`PagedMeta`] and what attention derives from them, in one buffer.
#[derive(Debug)]
pub(crate) struct StepMeta {
    device: CudaDevice,
    numbers: CudaSlice<u32>,
    plan: Plan,
}

/// What a launch must know of the batch on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    num_tokens: usize,
    num_seqs: usize,
    /// Sequences with one query, which come first in the list of sequences.
    pub(super) num_decode: usize,
    /// Parts of all of those together.
    pub(super) num_parts: usize,
    /// Parts of the longest of those.
    pub(super) most_parts: usize,
    /// Most queries of the other sequences.
    pub(super) most_queries: usize,
}

/// Sequences by what computes them: those with one query, then those with several.
fn order(meta: &PagedMeta) -> (Vec<u32>, usize) {
    let queries = |seq: &u32| meta.cu_seqlens_q[*seq as usize + 1] - meta.cu_seqlens_q[*seq as usize];
    let seqs = 0..meta.num_seqs() as u32;
    let (decode, mut others): (Vec<u32>, Vec<u32>) = seqs.partition(|seq| queries(seq) == 1);
    others.retain(|seq| queries(seq) > 1);
    let num_decode = decode.len();
    (decode.into_iter().chain(others).collect(), num_decode)
}

/// The numbers in the order of [`StepMeta`]'s accessors, and the plan.
fn flatten(meta: &PagedMeta) -> (Vec<u32>, Plan) {
    let (seqs, num_decode) = order(meta);
    let mut cu_parts = vec![0];
    let mut plan = Plan {
        num_tokens: meta.num_tokens(),
        num_seqs: meta.num_seqs(),
        num_decode,
        num_parts: 0,
        most_parts: 0,
        most_queries: 0,
    };
    for (i, seq) in seqs.iter().enumerate() {
        let seq = *seq as usize;
        if i < num_decode {
            let parts = (meta.seq_lens[seq] as usize).div_ceil(SPLIT);
            plan.num_parts += parts;
            plan.most_parts = plan.most_parts.max(parts);
        } else {
            let queries = (meta.cu_seqlens_q[seq + 1] - meta.cu_seqlens_q[seq]) as usize;
            plan.most_queries = plan.most_queries.max(queries);
        }
        cu_parts.push(plan.num_parts as u32);
    }
    // Every sequence has a place, whether it brings queries or not.
    let mut list = seqs;
    list.resize(plan.num_seqs, 0);
    cu_parts.resize(plan.num_seqs + 1, plan.num_parts as u32);
    let numbers = [
        meta.positions.as_slice(),
        meta.slot_mapping.as_slice(),
        meta.cu_seqlens_q.as_slice(),
        meta.seq_lens.as_slice(),
        meta.cu_blocks.as_slice(),
        list.as_slice(),
        cu_parts.as_slice(),
        meta.block_tables.as_slice(),
    ];
    (numbers.concat(), plan)
}

impl StepMeta {
    /// The device's copy of `meta`, uploaded if the step before was another.
    pub(crate) fn of(meta: &PagedMeta, device: &CudaDevice) -> Result<Rc<Self>> {
        let known = CURRENT.with_borrow(|current| match current {
            Some((id, known, step)) if *id == device.id() && known == meta => Some(step.clone()),
            _ => None,
        });
        if let Some(step) = known {
            return Ok(step);
        }
        refuse_while_recording("a batch of its own")?;
        let (numbers, plan) = flatten(meta);
        let step =
            Rc::new(Self { device: device.clone(), numbers: transfer::upload(device, &numbers)?, plan });
        CURRENT.set(Some((device.id(), meta.clone(), step.clone())));
        Ok(step)
    }

    /// A copy whose place stays, with room for `num_blocks` blocks of all sequences of `meta` together and for contexts of
    /// `most_parts` parts, `num_parts` in all. Each sequence of `meta` has one query.
    pub(crate) fn fixed(
        meta: &PagedMeta,
        device: &CudaDevice,
        (num_blocks, most_parts, num_parts): (usize, usize, usize),
    ) -> Result<Self> {
        let (mut numbers, mut plan) = flatten(meta);
        if plan.num_decode != plan.num_seqs || plan.num_tokens != plan.num_seqs {
            return Err(argument("StepMeta", "a captured step has one query a sequence"));
        }
        numbers.resize(numbers.len() + num_blocks, 0);
        (plan.most_parts, plan.num_parts) = (most_parts, num_parts);
        Ok(Self { device: device.clone(), numbers: device.clone_htod(&numbers)?, plan })
    }

    /// Writes `meta`, of as many sequences as before, to the fixed place. False: it does not fit.
    pub(crate) fn rewrite(&mut self, meta: &PagedMeta) -> Result<bool> {
        let (numbers, plan) = flatten(meta);
        let fits = plan.num_decode == self.plan.num_decode
            && plan.num_tokens == self.plan.num_tokens
            && plan.num_seqs == self.plan.num_seqs
            && plan.most_parts <= self.plan.most_parts
            && plan.num_parts <= self.plan.num_parts
            && numbers.len() <= self.numbers.len();
        if fits {
            transfer::write(&self.device, &numbers, &mut self.numbers.slice_mut(0..numbers.len()))?;
        }
        Ok(fits)
    }

    /// Runs `f`, which is being recorded, with this copy as that of `meta`.
    pub(crate) fn during<R>(self: &Rc<Self>, meta: &PagedMeta, f: impl FnOnce() -> R) -> R {
        CURRENT.set(Some((self.device.id(), meta.clone(), self.clone())));
        RECORDING.set(true);
        let result = f();
        RECORDING.set(false);
        // Its contents will change.
        CURRENT.set(None);
        result
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Address of a range of the numbers.
    fn at(&self, range: Range<usize>) -> u64 {
        debug_assert!(range.end <= self.numbers.len());
        address(&self.device, &self.numbers) + 4 * range.start as u64
    }

    /// Address of what comes after `tokens` numbers a token, `seqs` a sequence and `others`.
    fn after(&self, tokens: usize, seqs: usize, others: usize) -> u64 {
        let start = tokens * self.plan.num_tokens + seqs * self.plan.num_seqs + others;
        self.at(start..start)
    }

    pub(super) fn positions(&self) -> u64 {
        self.after(0, 0, 0)
    }

    pub(super) fn slots(&self) -> u64 {
        self.after(1, 0, 0)
    }

    pub(super) fn cu_seqlens_q(&self) -> u64 {
        self.after(2, 0, 0)
    }

    pub(super) fn seq_lens(&self) -> u64 {
        self.after(2, 1, 1)
    }

    pub(super) fn cu_blocks(&self) -> u64 {
        self.after(2, 2, 1)
    }

    /// The list of sequences, those that decode first.
    pub(super) fn seqs(&self) -> u64 {
        self.after(2, 3, 2)
    }

    pub(super) fn cu_parts(&self) -> u64 {
        self.after(2, 4, 2)
    }

    pub(super) fn block_tables(&self) -> u64 {
        self.after(2, 5, 3)
    }
}

#[cfg(test)]
mod tests {
    use super::{Plan, flatten};
    use crate::ops::PagedMeta;

    #[test]
    fn numbers_lie_where_kernels_look() {
        let meta = PagedMeta {
            positions: vec![300, 5, 6, 7, 40],
            slot_mapping: vec![50, 51, 52, 53, 54],
            cu_seqlens_q: vec![0, 1, 4, 5],
            seq_lens: vec![301, 8, 41],
            block_tables: vec![90, 91, 92, 93],
            cu_blocks: vec![0, 2, 3, 4],
            block_size: 200,
        };
        let (numbers, plan) = flatten(&meta);
        let wanted =
            Plan { num_tokens: 5, num_seqs: 3, num_decode: 2, num_parts: 4, most_parts: 3, most_queries: 3 };
        assert_eq!(plan, wanted);
        let after = |tokens: usize, seqs: usize, others: usize| &numbers[tokens * 5 + seqs * 3 + others..];
        assert_eq!(after(1, 0, 0)[..5], meta.slot_mapping);
        assert_eq!(after(2, 0, 0)[..4], meta.cu_seqlens_q);
        assert_eq!(after(2, 1, 1)[..3], meta.seq_lens);
        assert_eq!(after(2, 2, 1)[..4], meta.cu_blocks);
        assert_eq!(after(2, 3, 2)[..3], [0, 2, 1]);
        assert_eq!(after(2, 4, 2)[..4], [0, 3, 4, 4]);
        assert_eq!(after(2, 5, 3), meta.block_tables);
    }
}
