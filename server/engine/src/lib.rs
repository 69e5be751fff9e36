//! The engine: token ids in, token ids out. No text, no JSON, no HTTP.
//!
//! One thread owns scheduler, cache and model and repeats: receive, schedule, execute, update, send. An
//! [`EngineHandle`] submits a [`ValidatedRequest`] and gets a [`TokenStream`]; dropping the stream aborts the request.
//!
//! - [`Scheduler`]: which sequence computes what, in which cache blocks; a pure state machine.
//! - [`Backend`]: computes a [`StepPlan`]; [`ModelRunner`] is the real one. A step can be planned while it computes another.
//! - [`Engine`]: the thread between the two and the clients.

mod backend;
mod block_hash;
mod block_pool;
mod compute;
mod config;
pub mod embed;
mod engine;
mod fault;
mod handle;
mod plan;
mod request;
mod runner;
mod sampler;
mod scheduler;
#[cfg(feature = "testing")]
mod scripted;
mod sequence;
mod stats;

pub use ingle_models::{Checked, check::check_models, check_ops, gpu, set_deterministic};
/// How the model under the engine is found, loaded and computed; users of the engine need no other crate.
pub use ingle_models::{
    ConvertDtype, ConvertOptions, ConvertProgress, ConvertReport, GgufText, Isa, KvDtype, LoadProgress,
    Progress, Quantization, convert, gguf_text_files, isa, num_threads, pin_threads, probe, set_num_threads,
};

pub use backend::{Backend, BackendError, SampleResult, SeqOutput, StepOutput};
pub use block_hash::{BlockHash, BlockHasher};
pub use block_pool::{BlockId, BlockPool, CacheEntry};
pub use compute::{ComputeArbiter, ComputeClass, ComputeStats, Sharing, Turn};
pub use config::{EngineConfig, Limits, Patience};
pub use engine::Engine;
pub use handle::{EngineHandle, Health, SubmitError, TokenStream};
pub use plan::{Place, RequestId, SampleSpec, ScheduledSeq, SeqId, StepId, StepPlan, StepTokens};
pub use request::{
    EngineError, FinishReason, InvalidKind, InvalidRequest, Request, SamplingParams, TokenEvent,
    TokenLogprobs, Usage, ValidatedRequest,
};
pub use runner::{
    CacheOptions, DType, Device, Fill, KvBudget, LoadOptions, LoadTimings, MadeUp, ModelInfo, ModelRunner,
    RunnerError,
};
pub use scheduler::{MAX_PASSES, MAX_PREEMPTIONS, NeverFits, Scheduler, SchedulerCounters, SchedulerEvent};
pub use sequence::SeqStatus;
pub use stats::{EngineStats, SchedulerGauges};

#[cfg(feature = "testing")]
pub use fault::Fault;
#[cfg(feature = "testing")]
pub use scheduler::{SchedulerSnapshot, SeqSnapshot};
#[cfg(feature = "testing")]
pub use scripted::{ScriptedBackend, StepFailure};
