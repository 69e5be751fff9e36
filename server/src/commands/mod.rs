//! What the commands of the binary do; one file each.

mod bench;
mod check;
mod convert;
mod doctor;
mod embed;
mod load;
mod load_encoder;
mod memory;
mod models;
mod perplexity;
mod register;
mod run;
mod serve;
mod tier;

pub use bench::bench;
pub use check::check;
pub use convert::convert;
pub use doctor::doctor;
pub use embed::embed;
pub use models::models;
pub use perplexity::perplexity;
pub use register::register;
pub use run::run;
pub use serve::serve;

/// Writes a line to standard output.
fn say(line: &str) -> std::io::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{line}")
}

/// Writes `error` to standard error as the one line that ends a command.
///
/// Unlike `eprintln!` it does not panic when nobody listens there any more.
pub fn complain(error: &anyhow::Error) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "error: {}", describe(error));
}

/// The error and its causes in one line; a cause that the sentence already tells is not told again.
fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::describe;
    use anyhow::{Context, anyhow};

    #[test]
    fn causes_are_told_once() {
        let cause = || Err::<(), _>(anyhow!("no such file"));
        assert_eq!(describe(&cause().context("config.json").unwrap_err()), "config.json: no such file");
        assert_eq!(
            describe(&cause().context("config.json: no such file").unwrap_err()),
            "config.json: no such file"
        );
        assert_eq!(describe(&anyhow!("two\nlines")), "two lines");
    }
}
