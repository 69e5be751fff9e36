//! Who used what: totals per key and model (`ledger.rs`), and a line a request for those who must be able to look back
//! (`audit.rs`). Keys appear under a label made from their digest, never as they are.

pub mod audit;
pub mod ledger;
