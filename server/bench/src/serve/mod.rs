//! `ingle bench serve`: load on servers.
//!
//! 1. Each server is reached (`target`), and it is found out who counts tokens and whether it takes token ids (`pool`).
//! 2. For each repeat, load and server, in this order so that servers take turns: the workload is made from the seed
//!    (`dataset`), warm-up requests are sent, then the load (`load`, `arrival`, `client`).
//! 3. The records of all repeats of a load on a server become its figures (`metrics`), a [`Point`].
//!
//! Everything runs on one thread: two clients' timers never race, and the cost of the client is seen as it is.

mod arrival;
mod client;
mod dataset;
mod load;
mod metrics;
mod pool;
mod record;
mod sse;
mod sweep;
mod target;
mod workload;

pub use arrival::Rate;
pub use dataset::{DatasetName, PromptForm};
pub(crate) use metrics::RUN_FIGURES;
pub use metrics::Slo;
pub(crate) use pool::{TokenPool, random_words};
pub(crate) use sweep::first_token;
pub use sweep::{Point, ServeResult, run};
pub use target::{Access, Api};
pub(crate) use target::{base_url, http_client, root_cause};
