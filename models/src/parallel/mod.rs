//! One model over several devices: tensor parallelism.
//!
//! 1. [`shard`] says which rows or columns of each tensor a rank holds. Heads and the MLP's width are divided; so are the
//!    rows of embedding and head. Norms, routers and the rotation are on every rank.
//! 2. [`group`] runs one thread a rank. Each loads its own share, and all are given the same steps.
//! 3. In a step the ranks meet three times: the outputs of attention and of the MLP are sums over the ranks
//!    ([`Communicator::all_reduce_sum`], two a layer), the embedding is a sum of which all terms but one are zero, and
//!    the logits are laid side by side ([`Communicator::all_gather`]), as are queries and keys where one norm spans all
//!    of their heads.
//!
//! Between threads, terms are added in the order of the ranks, so a token's result depends neither on its batch mates nor on
//! the rank that is asked; it differs from that of one device by the rounding of those sums. NCCL gives all ranks the
//! same sum, but picks the order of its terms by the size of the step; where results must be deterministic, all terms are gathered
//! instead and added in order.

mod communicator;
mod group;
#[cfg(feature = "nccl")]
mod nccl;
mod shard;
#[cfg(test)]
mod tests;
mod threads;

pub(crate) use communicator::{Communicator, Rank};
pub(crate) use group::load;
pub(crate) use shard::{Place, ShardedSource, Shards};
