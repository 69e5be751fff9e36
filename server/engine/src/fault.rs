//! Planted bugs: the simulation must find each of them, else it is too weak.
//!
//! Without the feature `testing` no fault can be set and every question is answered "no" at compile time.

/// A bug that the scheduler or the block pool can be told to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(feature = "testing"), allow(dead_code, unreachable_pub))]
pub enum Fault {
    /// The last block of a released table keeps its reference.
    SkipDeref,
    /// Blocks are freed although a step in flight still writes them.
    FreeEarly,
    /// The abort of a waiting request is forgotten.
    DropAbort,
    /// A token is sent twice.
    DoubleEmit,
    /// One block too few is allocated when a table grows past its first block.
    OffByOneBlock,
    /// A cache hit takes no reference.
    UnpinnedLookup,
    /// A forked choice shares the prompt's partial block.
    SharePartialBlock,
    /// A block enters the cache before it is computed.
    RegisterEarly,
    /// Tenants share one cache.
    IgnoreSalt,
    /// A preempted sequence keeps its count of computed tokens.
    StaleComputed,
    /// The oldest sequence is the first victim.
    PreemptOldest,
    /// A step may hold one token more than its budget.
    BudgetOverrun,
    /// A non-finite row ends the whole step's requests.
    FailWholeBatch,
    /// A paused request goes on.
    IgnorePause,
    /// A reallocated block stays in the cache.
    KeepHash,
    /// The waiting head may be passed without limit.
    UnboundedPassing,
    /// One token more than `max_tokens`.
    OneTokenMore,
    /// A preempted sequence does not return to the queue.
    ForgetPreempted,
    /// The whole prompt is taken from the cache, the last token included.
    FullPromptHit,
    /// A token that is not known is looked for in the place of another sequence.
    WrongPlace,
    /// A step that needs the values of tokens is planned before they are known.
    IgnorePenalties,
    /// Tokens that are not known do not count as tokens of the answer.
    StaleCount,
    /// A step that fails ends also a request of which it computed nothing but what follows an end.
    FailInVain,
}

#[cfg(feature = "testing")]
impl Fault {
    /// All of them.
    pub const ALL: [Self; 23] = [
        Self::SkipDeref,
        Self::FreeEarly,
        Self::DropAbort,
        Self::DoubleEmit,
        Self::OffByOneBlock,
        Self::UnpinnedLookup,
        Self::SharePartialBlock,
        Self::RegisterEarly,
        Self::IgnoreSalt,
        Self::StaleComputed,
        Self::PreemptOldest,
        Self::BudgetOverrun,
        Self::FailWholeBatch,
        Self::IgnorePause,
        Self::KeepHash,
        Self::UnboundedPassing,
        Self::OneTokenMore,
        Self::ForgetPreempted,
        Self::FullPromptHit,
        Self::WrongPlace,
        Self::IgnorePenalties,
        Self::StaleCount,
        Self::FailInVain,
    ];
}

/// The fault planted, if any.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    #[cfg(feature = "testing")]
    planted: Option<Fault>,
}

impl Faults {
    #[cfg(feature = "testing")]
    pub(crate) fn plant(&mut self, fault: Fault) {
        self.planted = Some(fault);
    }

    /// Whether `fault` is planted.
    #[cfg(feature = "testing")]
    pub(crate) fn has(self, fault: Fault) -> bool {
        self.planted == Some(fault)
    }

    /// Whether `fault` is planted: never.
    #[cfg(not(feature = "testing"))]
    #[allow(clippy::unused_self)]
    pub(crate) fn has(self, _fault: Fault) -> bool {
        false
    }
}
