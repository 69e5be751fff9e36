//! Cache blocks: who holds them, which are free, and what full ones contain.
//!
//! 1. [`BlockPool::allocate`] hands out the least recently freed block; [`BlockPool::release`] gives it back.
//! 2. A full, computed block is [registered](BlockPool::register) under its hash. It keeps the hash when it is freed
//!    and can be found again by [`BlockPool::lookup`], which takes a reference in the same call, until it is
//!    allocated for something else. The free list is thus the cache's eviction order; there is no other policy.
//! 3. A block is in the free list exactly when nobody holds it.
//!
//! Only ids live here; keys and values are the backend's.

use std::collections::{HashMap, VecDeque};

use crate::block_hash::BlockHash;
use crate::fault::{Fault, Faults};

/// Index of a block in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    /// As an index.
    #[must_use]
    pub fn idx(self) -> usize {
        self.0 as usize
    }
}

/// What a registered block holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheEntry {
    /// Its name.
    pub hash: BlockHash,
    /// The name of the block before it.
    pub parent: BlockHash,
    /// Its tokens; compared on a hit.
    pub tokens: Box<[u32]>,
}

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Block {
    /// Tables, fences and pins that hold it.
    refs: u32,
    entry: Option<CacheEntry>,
    /// Neighbours in the free list, `NONE` at its ends or if the block is held.
    prev: u32,
    next: u32,
}

/// All blocks of one cache.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Registered blocks by hash. Never iterated, so its order does not matter.
    by_hash: HashMap<BlockHash, BlockId>,
    head: u32,
    tail: u32,
    num_free: usize,
    num_cached_free: usize,
    caching: bool,
    pub(crate) faults: Faults,
}

impl BlockPool {
    /// `num_blocks` free blocks. Without `caching` no block is ever registered.
    #[must_use]
    pub fn new(num_blocks: usize, caching: bool) -> Self {
        assert!(num_blocks < NONE as usize, "block ids are 32 bit");
        let blocks =
            (0..num_blocks).map(|_| Block { refs: 0, entry: None, prev: NONE, next: NONE }).collect();
        let mut pool = Self {
            blocks,
            by_hash: HashMap::new(),
            head: NONE,
            tail: NONE,
            num_free: 0,
            num_cached_free: 0,
            caching,
            faults: Faults::default(),
        };
        for idx in 0..num_blocks as u32 {
            pool.push_back(idx);
        }
        pool
    }

    /// All blocks.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds, cached ones included.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.num_free
    }

    /// Free blocks whose content can still be found.
    #[must_use]
    pub fn num_cached_free(&self) -> usize {
        self.num_cached_free
    }

    /// How many hold `block`.
    #[must_use]
    pub fn refs(&self, block: BlockId) -> u32 {
        self.blocks[block.idx()].refs
    }

    /// What `block` is registered as.
    #[must_use]
    pub fn entry(&self, block: BlockId) -> Option<&CacheEntry> {
        self.blocks[block.idx()].entry.as_ref()
    }

    /// Takes the least recently freed block and forgets what it held. `None` if all are held.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let idx = self.head;
        if idx == NONE {
            return None;
        }
        self.unlink(idx);
        if let Some(entry) = self.blocks[idx as usize].entry.take()
            && !self.faults.has(Fault::KeepHash)
        {
            self.by_hash.remove(&entry.hash);
        }
        self.blocks[idx as usize].refs = 1;
        Some(BlockId(idx))
    }

    /// Takes one more reference to a held block.
    pub fn share(&mut self, block: BlockId) {
        let refs = &mut self.blocks[block.idx()].refs;
        assert!(*refs > 0, "only a held block can be shared");
        *refs += 1;
    }

    /// Gives one reference back; with the last one the block becomes free but keeps its content and hash.
    pub fn release(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block.idx()];
        assert!(entry.refs > 0, "block {} is released more often than taken", block.0);
        entry.refs -= 1;
        if entry.refs > 0 {
            return;
        }
        if entry.entry.is_some() {
            self.push_back(block.0);
        } else {
            // Nothing to find in it: use it before any cached block.
            self.push_front(block.0);
        }
    }

    /// The block named `hash` if its tokens and its parent are indeed these, with a reference taken.
    pub fn lookup(&mut self, hash: &BlockHash, parent: &BlockHash, tokens: &[u32]) -> Option<BlockId> {
        let block = *self.by_hash.get(hash)?;
        if !self.faults.has(Fault::KeepHash) {
            let entry = self.entry(block)?;
            if entry.parent != *parent || *entry.tokens != *tokens {
                return None;
            }
        }
        if self.faults.has(Fault::UnpinnedLookup) {
            return Some(block);
        }
        if self.blocks[block.idx()].refs == 0 {
            self.unlink(block.0);
        }
        self.blocks[block.idx()].refs += 1;
        Some(block)
    }

    /// Names a held, full, computed block. Keeps the older block if the name is taken: both hold the same.
    pub fn register(&mut self, block: BlockId, hash: BlockHash, parent: BlockHash, tokens: &[u32]) {
        if !self.caching || self.by_hash.contains_key(&hash) || self.entry(block).is_some() {
            return;
        }
        debug_assert!(self.refs(block) > 0, "only a held block can be registered");
        self.by_hash.insert(hash, block);
        self.blocks[block.idx()].entry = Some(CacheEntry { hash, parent, tokens: tokens.into() });
    }

    /// The free list, next victim first.
    #[must_use]
    pub fn free_list(&self) -> Vec<BlockId> {
        let mut list = Vec::with_capacity(self.num_free);
        let mut idx = self.head;
        while idx != NONE && list.len() <= self.blocks.len() {
            list.push(BlockId(idx));
            idx = self.blocks[idx as usize].next;
        }
        list
    }

    /// Checks everything that must hold between calls. `holders[b]` is how many tables and fences hold block `b`.
    ///
    /// # Errors
    /// The first thing found wrong.
    pub fn check_integrity(&self, holders: &[u32]) -> Result<(), String> {
        let free = self.free_list();
        if free.len() != self.num_free {
            return Err(format!("free list has {} blocks, counted {}", free.len(), self.num_free));
        }
        let mut is_free = vec![false; self.blocks.len()];
        for block in &free {
            if std::mem::replace(&mut is_free[block.idx()], true) {
                return Err(format!("block {} is in the free list twice", block.0));
            }
        }
        let mut named = 0;
        let mut cached_free = 0;
        for (idx, block) in self.blocks.iter().enumerate() {
            if block.refs != holders[idx] {
                return Err(format!("block {idx}: {} references, {} holders", block.refs, holders[idx]));
            }
            if is_free[idx] != (block.refs == 0) {
                return Err(format!(
                    "block {idx}: {} references, in free list: {}",
                    block.refs, is_free[idx]
                ));
            }
            if let Some(entry) = &block.entry {
                named += 1;
                cached_free += usize::from(is_free[idx]);
                if self.by_hash.get(&entry.hash) != Some(&BlockId(idx as u32)) {
                    return Err(format!("block {idx} is registered under a hash that names another"));
                }
            }
        }
        if named != self.by_hash.len() {
            return Err(format!("{named} blocks registered, {} names", self.by_hash.len()));
        }
        if cached_free != self.num_cached_free {
            return Err(format!("{cached_free} cached free blocks, counted {}", self.num_cached_free));
        }
        Ok(())
    }

    fn count_free(&mut self, idx: u32) {
        self.num_free += 1;
        self.num_cached_free += usize::from(self.blocks[idx as usize].entry.is_some());
    }

    fn push_back(&mut self, idx: u32) {
        let old = std::mem::replace(&mut self.tail, idx);
        self.blocks[idx as usize].prev = old;
        self.blocks[idx as usize].next = NONE;
        match old {
            NONE => self.head = idx,
            old => self.blocks[old as usize].next = idx,
        }
        self.count_free(idx);
    }

    fn push_front(&mut self, idx: u32) {
        let old = std::mem::replace(&mut self.head, idx);
        self.blocks[idx as usize].next = old;
        self.blocks[idx as usize].prev = NONE;
        match old {
            NONE => self.tail = idx,
            old => self.blocks[old as usize].prev = idx,
        }
        self.count_free(idx);
    }

    fn unlink(&mut self, idx: u32) {
        let Block { prev, next, .. } = self.blocks[idx as usize];
        match prev {
            NONE => self.head = next,
            prev => self.blocks[prev as usize].next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => self.blocks[next as usize].prev = prev,
        }
        let block = &mut self.blocks[idx as usize];
        block.prev = NONE;
        block.next = NONE;
        self.num_free -= 1;
        self.num_cached_free -= usize::from(block.entry.is_some());
    }
}

/// Blocks whose release waits for a step in flight, in order of that step.
#[derive(Debug, Default)]
pub(crate) struct Fences {
    waiting: VecDeque<(u64, Vec<BlockId>)>,
}

impl Fences {
    /// Holds `blocks` until step `fence` is complete.
    pub(crate) fn defer(&mut self, fence: u64, blocks: Vec<BlockId>) {
        let at = self.waiting.partition_point(|(other, _)| *other <= fence);
        self.waiting.insert(at, (fence, blocks));
    }

    /// Takes one list of blocks whose step is complete.
    pub(crate) fn pop_complete(&mut self, completed: u64) -> Option<Vec<BlockId>> {
        if self.waiting.front()?.0 > completed {
            return None;
        }
        self.waiting.pop_front().map(|(_, blocks)| blocks)
    }

    /// All blocks held.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.waiting.iter().flat_map(|(_, blocks)| blocks.iter().copied())
    }
}
