//! What the commands of the binary do; one file each.

mod convert;
mod load;
mod models;
mod run;
mod serve;

pub use convert::convert;
pub use models::models;
pub use run::run;
pub use serve::serve;
