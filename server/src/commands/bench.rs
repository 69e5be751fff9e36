//! `ingle bench`: hands tokenizers and models to the benchmark crate and writes what it found.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use ingle_bench::TextCodec;
use ingle_bench::cli::{BenchArgs, BenchCommand, Format, OutputArgs, ServeBenchArgs};
use ingle_bench::report::{Table, serve_remarks, serve_table, write_json};
use serde::Serialize;

use crate::text::{Specials, Tokenizer};

/// Measures, and prints what was found.
///
/// # Errors
/// One sentence that names what is wrong.
pub fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    match &args.command {
        BenchCommand::Serve(args) => serve(args),
    }
}

fn serve(args: &ServeBenchArgs) -> anyhow::Result<()> {
    let codec = args.tokenizer.as_deref().map(codec).transpose()?;
    let result = ingle_bench::serve::run(args, codec)?;
    print(&args.out, &result, &serve_table(&result.points), &result.points)?;
    note(&args.out, &serve_remarks(&result.points));
    Ok(())
}

/// The tokenizer in `path`.
fn codec(path: &Path) -> anyhow::Result<Arc<dyn TextCodec>> {
    struct Codec(Tokenizer);
    impl TextCodec for Codec {
        fn encode(&self, text: &str, specials: bool) -> Result<Vec<u32>, String> {
            self.0.encode(text, Specials::Parse, specials).map_err(|error| error.to_string())
        }
    }
    let tokenizer = if path.extension().is_some_and(|extension| extension == "gguf") {
        let files = ingle_engine::gguf_text_files(path)?;
        Tokenizer::from_values(files.tokenizer, files.tokenizer_config)?
    } else if path.is_file() {
        Tokenizer::load(path.parent().context("--tokenizer has no folder")?)?
    } else {
        Tokenizer::load(path)?
    };
    Ok(Arc::new(Codec(tokenizer)))
}

/// Writes the result where the flags say, in the form they say.
fn print<R: Serialize, P: Serialize>(
    out: &OutputArgs,
    result: &R,
    table: &Table,
    points: &[P],
) -> anyhow::Result<()> {
    if let Some(path) = &out.output {
        write_json(path, result)?;
    }
    let text = match out.format {
        Format::Md => table.markdown(),
        Format::Csv => table.csv(),
        Format::Json => serde_json::to_string_pretty(result)? + "\n",
        Format::Jsonl => {
            let lines: Result<Vec<String>, _> = points.iter().map(serde_json::to_string).collect();
            lines?.iter().map(|line| format!("{line}\n")).collect()
        }
    };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

/// Remarks for people, on standard error.
fn note(out: &OutputArgs, remarks: &[String]) {
    if !out.quiet {
        for remark in remarks {
            // Nobody need listen there.
            let _ = writeln!(std::io::stderr(), "{remark}");
        }
    }
}
