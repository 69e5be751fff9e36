//! `ingle bench`: the commands of the benchmark crate, and how models are loaded for it.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use ingle_bench::cli::{
    EMBED_HELP, EmbedBenchArgs, Format, MODEL_HELP, MakeModelArgs, ModelBenchArgs, SERVE_HELP, STARTUP_HELP,
    ServeBenchArgs, StartupBenchArgs,
};

use super::ModelArgs;

/// `ingle bench`
#[derive(Debug, Clone, Args)]
#[command(arg_required_else_help = true, args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    /// Compare two results: what changed from the first file to the second, with 95% confidence intervals of the
    /// repetitions. A measurement that the second lacks, or with more failed requests, is a regression: status 1. With one
    /// repetition a change is "unsure" and never a regression: measure with --repeats 3 or more.
    #[arg(long, num_args = 2, value_names = ["BEFORE.json", "AFTER.json"])]
    pub compare: Vec<PathBuf>,
    /// With --compare: exit with status 1 if a figure is worse by more than this, such as 5%, and its interval shows that it
    /// is worse at all; else it is "unsure".
    #[arg(long, requires = "compare", value_parser = share)]
    pub fail_above: Option<f64>,
    /// With --compare: also if machine, model, weights, threads or workload differ.
    #[arg(long, requires = "compare")]
    pub anyway: bool,
    /// With --compare: form of the table.
    #[arg(long, default_value = "md", requires = "compare")]
    pub format: Format,
}

/// What can be measured.
#[derive(Debug, Clone, Subcommand)]
pub enum BenchCommand {
    /// Put load on a running server (any with an OpenAI-style API) and measure what its clients feel.
    #[command(after_long_help = SERVE_HELP)]
    Serve(Box<ServeBenchArgs>),
    /// Measure how fast a model computes on this machine, without a server.
    #[command(after_long_help = MODEL_HELP)]
    Model(Box<BenchModelArgs>),
    /// Measure an embedding server (OpenAI or text-embeddings-inference style): texts a second by length and batch.
    #[command(after_long_help = EMBED_HELP)]
    Embed(Box<EmbedBenchArgs>),
    /// Measure how long a server takes from exec to ready to its first token or embedding, and the memory it holds.
    #[command(after_long_help = STARTUP_HELP)]
    Startup(Box<StartupBenchArgs>),
    /// Write a model of random weights with a tokenizer, so that every server can be given the same one.
    MakeModel(MakeModelArgs),
}

/// `ingle bench model`
#[derive(Debug, Clone, Args)]
pub struct BenchModelArgs {
    /// What is measured.
    #[command(flatten)]
    pub bench: ModelBenchArgs,
    /// How the model is loaded and run.
    #[command(flatten, next_help_heading = "Model")]
    pub load: ModelArgs,
}

/// `5%` or `0.05`.
fn share(text: &str) -> Result<f64, String> {
    let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 100.0));
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number / unit),
        _ => Err("a share such as 5% is wanted".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn shares_are_read_in_both_forms() {
        assert_eq!((share("5%"), share("0.05")), (Ok(0.05), Ok(0.05)));
        for wrong in ["", "x%", "-1", "inf"] {
            assert!(share(wrong).is_err(), "{wrong}");
        }
    }
}
