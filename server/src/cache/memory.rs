//! Answers in this process, bounded by their bytes; the least used go first.

use std::time::Duration;

use super::{CacheKey, Stored};

/// Bytes that an entry takes besides its body, about.
const OVERHEAD: u32 = 128;

pub(super) struct Memory(moka::sync::Cache<CacheKey, Stored>);

impl Memory {
    pub(super) fn new(max_bytes: u64, ttl: Duration) -> Self {
        let weigh = |_: &CacheKey, stored: &Stored| {
            u32::try_from(stored.body.len()).unwrap_or(u32::MAX).saturating_add(OVERHEAD)
        };
        Self(moka::sync::Cache::builder().max_capacity(max_bytes).weigher(weigh).time_to_live(ttl).build())
    }

    pub(super) fn get(&self, key: &CacheKey) -> Option<Stored> {
        self.0.get(key)
    }

    pub(super) fn put(&self, key: CacheKey, stored: Stored) {
        self.0.insert(key, stored);
    }
}
