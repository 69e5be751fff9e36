//! `ingle bench`: hands tokenizers and models to the benchmark crate and writes what it found.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use ingle_bench::TextCodec;
use ingle_bench::cli::{EmbedBenchArgs, Format, MakeModelArgs, OutputArgs, ServeBenchArgs, StartupBenchArgs};
use ingle_bench::compare::Verdict;
use ingle_bench::model::{RandomModel, Subject};
use ingle_bench::report::{
    Table, embed_html, lines, model_html, model_remarks, model_table, serve_html, serve_remarks, serve_table,
    startup_html, write, write_json,
};
use serde::Serialize;

use super::load::{find_generator, load_options, root, step_tokens};
use crate::cli::bench::{BenchArgs, BenchCommand, BenchModelArgs};
use crate::text::{Specials, Tokenizer};

/// Measures, and prints what was found.
///
/// # Errors
/// One sentence that names what is wrong.
pub fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    match &args.command {
        Some(BenchCommand::Serve(args)) => serve(args),
        Some(BenchCommand::Model(args)) => model(args),
        Some(BenchCommand::Embed(args)) => embed(args),
        Some(BenchCommand::Startup(args)) => startup(args),
        Some(BenchCommand::MakeModel(args)) => make_model(args),
        None => compare(args),
    }
}

fn serve(args: &ServeBenchArgs) -> anyhow::Result<()> {
    let codec = args.tokenizer.as_deref().map(codec).transpose()?;
    let result = ingle_bench::serve::run(args, codec)?;
    page(&args.out, || serve_html(&result))?;
    print(&args.out, &result, &serve_table(&result.points), &lines(&result)?)?;
    note(&args.out, &serve_remarks(&result));
    Ok(())
}

fn model(args: &BenchModelArgs) -> anyhow::Result<()> {
    ingle_engine::set_num_threads(args.load.threads);
    ingle_engine::pin_threads(args.load.pin_threads);
    let options = load_options(&args.load)?;
    let (made, path);
    let (name, subject) = match (&args.bench.random_weights, &args.bench.model) {
        (Some(preset), _) => {
            made = RandomModel::new(preset, args.load.seed)?;
            (format!("{preset} (random weights)"), Subject::MadeUp(&made))
        }
        (None, Some(name)) => {
            path = find_generator(name, &args.load)?;
            (root(name), Subject::Folder(&path))
        }
        (None, None) => bail!("a model or --random-weights is wanted"),
    };
    let sizes = (args.load.block_size, step_tokens(&args.load, &options.device));
    let result = ingle_bench::model::run(&args.bench, &name, &subject, &options, sizes)?;
    page(&args.bench.out, || model_html(&result))?;
    print(&args.bench.out, &result, &model_table(&result), &lines(&result)?)?;
    note(&args.bench.out, &model_remarks(&result));
    Ok(())
}

fn make_model(args: &MakeModelArgs) -> anyhow::Result<()> {
    let parameters = RandomModel::new(&args.preset, args.seed)?.write(&args.out_dir)?;
    let millions = parameters as f64 / 1e6;
    writeln!(std::io::stdout(), "{}: {millions:.1} M random parameters, bf16", args.out_dir.display())?;
    Ok(())
}

fn embed(args: &EmbedBenchArgs) -> anyhow::Result<()> {
    let codec = args.tokenizer.as_deref().map(codec).transpose()?;
    let result = ingle_bench::embed::run(args, codec)?;
    page(&args.out, || embed_html(&result))?;
    print(&args.out, &result, &ingle_bench::embed::table(&result), &lines(&result)?)?;
    note(&args.out, &ingle_bench::embed::remarks(&result));
    Ok(())
}

fn startup(args: &StartupBenchArgs) -> anyhow::Result<()> {
    let mut args = args.clone();
    let own = args.model.is_some();
    if args.ready_path.is_empty() {
        args.ready_path = if own { "/ready" } else { "/health" }.to_owned();
    }
    let (command, url) = match (&args.model, &args.url) {
        (Some(model), _) => {
            let port = ingle_bench::startup::free_port()?.to_string();
            let program = std::env::current_exe()?.to_string_lossy().into_owned();
            let mut command = vec![program, "serve".to_owned()];
            command.extend(args.embed.then(|| "--embedding-model".to_owned()));
            command.extend([model.clone(), "--port".to_owned(), port.clone()]);
            command.extend(args.command.iter().cloned());
            (command, format!("http://127.0.0.1:{port}"))
        }
        (None, Some(url)) => (args.command.clone(), url.clone()),
        (None, None) => bail!("--url must say where the command will serve"),
    };
    let result = ingle_bench::startup::run(&args, &command, &url)?;
    page(&args.out, || startup_html(&result))?;
    print(&args.out, &result, &ingle_bench::startup::table(&result), &lines(&result)?)
}

fn compare(args: &BenchArgs) -> anyhow::Result<()> {
    let [before, after] = &args.compare[..] else { bail!("--compare wants two files") };
    let found = ingle_bench::compare::compare(before, after, args.fail_above, args.anyway)?;
    let out =
        OutputArgs { output: None, html: None, format: args.format, quiet: false, metadata: Vec::new() };
    let lines: Result<Vec<String>, _> = found.changes.iter().map(serde_json::to_string).collect();
    print(&out, &found, &ingle_bench::compare::table(&found.changes), &lines?)?;
    let mut remarks = Vec::new();
    if !found.differences.is_empty() {
        remarks
            .push(format!("compared all the same, although these differ: {}", found.differences.join("; ")));
    }
    let unsure = found.count(Verdict::Unsure);
    if unsure > 0 {
        remarks.push(format!(
            "{unsure} figures are unsure: too few repetitions to tell a change from chance; measure both with more \
             --repeats (--repetitions)"
        ));
    }
    note(&out, &remarks);
    let worse = found.count(Verdict::Regression);
    if worse > 0 {
        let allowed = args.fail_above.map(|allowed| format!(" by more than {:.1}%", allowed * 100.0));
        bail!(
            "{worse} of {} figures are worse{}, missing or with more failed requests",
            found.changes.len(),
            allowed.unwrap_or_default()
        );
    }
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

/// Writes the page of `--html`, if one is wanted.
fn page(out: &OutputArgs, made: impl FnOnce() -> anyhow::Result<String>) -> anyhow::Result<()> {
    out.html.as_deref().map_or(Ok(()), |path| write(path, &made()?))
}

/// Writes the result where the flags say, in the form they say.
fn print(out: &OutputArgs, result: &impl Serialize, table: &Table, lines: &[String]) -> anyhow::Result<()> {
    if let Some(path) = &out.output {
        write_json(path, result)?;
    }
    let text = match out.format {
        Format::Md => table.markdown(),
        Format::Csv => table.csv(),
        Format::Json => serde_json::to_string_pretty(result)? + "\n",
        Format::Jsonl => lines.iter().map(|line| format!("{line}\n")).collect(),
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
