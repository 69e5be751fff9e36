//! Totals per key and model since the start. There are as many rows as keys times served models, never more.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use serde::Serialize;
use utoipa::ToSchema;

use super::audit::Entry;

/// What one key used of one model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct UsageTotals {
    /// Label of the key: `key-` and the first digits of its digest.
    pub key: String,
    /// The model.
    pub model: String,
    /// Requests, of any end.
    pub requests: u64,
    /// Of them, those refused or failed (status 400 and above).
    pub errors: u64,
    /// Answers from the response cache.
    pub cached_responses: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Of them, those found in the prefix cache.
    pub cached_tokens: u64,
    /// Answer tokens.
    pub completion_tokens: u64,
    /// Money, by the cost of tokens when they were used.
    pub cost: f64,
    /// Tokens that were used before their cost was known; the next request that knows it pays for them.
    #[serde(skip)]
    unpriced: u64,
}

/// The totals.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    rows: Mutex<BTreeMap<(String, String), UsageTotals>>,
}

impl Ledger {
    /// Adds a request. `cost_per_1k` is the cost of a thousand tokens now, where it is known.
    pub(crate) fn book(&self, entry: &Entry<'_>, cost_per_1k: Option<f64>) {
        // Plain sums: a panic elsewhere leaves them whole.
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let row = rows.entry((entry.key.clone(), entry.model.to_owned())).or_insert_with(|| UsageTotals {
            key: entry.key.clone(),
            model: entry.model.to_owned(),
            ..UsageTotals::default()
        });
        row.requests = row.requests.saturating_add(1);
        row.errors = row.errors.saturating_add(u64::from(entry.status >= 400));
        row.cached_responses = row.cached_responses.saturating_add(u64::from(entry.from_cache));
        row.prompt_tokens = row.prompt_tokens.saturating_add(entry.prompt_tokens.into());
        row.cached_tokens = row.cached_tokens.saturating_add(entry.cached_tokens.into());
        row.completion_tokens = row.completion_tokens.saturating_add(entry.completion_tokens.into());
        let tokens = u64::from(entry.prompt_tokens).saturating_add(entry.completion_tokens.into());
        row.unpriced = row.unpriced.saturating_add(tokens);
        if let Some(cost) = cost_per_1k {
            row.cost += std::mem::take(&mut row.unpriced) as f64 / 1000.0 * cost;
        }
    }

    /// The rows of `key`, or all.
    pub(crate) fn rows(&self, key: Option<&str>) -> Vec<UsageTotals> {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows.values().filter(|row| key.is_none_or(|key| row.key == key)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_add_up() {
        let ledger = Ledger::default();
        for (key, status) in [("a", 200), ("a", 429), ("b", 200)] {
            let entry = Entry {
                key: key.to_owned(),
                model: "m",
                status,
                prompt_tokens: 10,
                cached_tokens: 4,
                completion_tokens: 5,
                ..Entry::default()
            };
            ledger.book(&entry, Some(10.0));
        }
        let rows = ledger.rows(Some("a"));
        let [row] = rows.as_slice() else { panic!("one row: {rows:?}") };
        assert_eq!((row.requests, row.errors, row.prompt_tokens, row.completion_tokens), (2, 1, 20, 10));
        assert_eq!((row.cached_tokens, row.cost), (8, 0.3));
        assert_eq!(ledger.rows(None).len(), 2);
    }

    #[test]
    fn tokens_of_unknown_cost_are_paid_for_later() {
        let ledger = Ledger::default();
        let entry = Entry { key: "a".to_owned(), model: "m", prompt_tokens: 500, ..Entry::default() };
        let cost = || ledger.rows(None).first().map(|row| row.cost);
        ledger.book(&entry, None);
        assert_eq!(cost(), Some(0.0));
        ledger.book(&entry, Some(2.0));
        assert_eq!(cost(), Some(2.0));
        ledger.book(&entry, Some(1.0));
        assert_eq!(cost(), Some(2.5));
    }
}
