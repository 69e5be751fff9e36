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

/// Writes `error` to standard error as the one line that ends a command.
///
/// Unlike `eprintln!` it does not panic when nobody listens there any more.
pub fn complain(error: &anyhow::Error) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
}
