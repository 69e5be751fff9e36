//! `ingle perplexity`: how well a model foresees a text.

use std::io::{IsTerminal, Read, Write};

use anyhow::{Context, bail};
use ingle_engine::{Request, SamplingParams, TokenEvent};

use super::load::{EngineSizes, load, progress_bar};
use crate::cli::PerplexityArgs;
use crate::text::Specials;

/// Scores the text in windows that do not overlap, each from its second token on, and prints `exp` of the mean negative
/// log probability: 1 means every token foreseen, the size of the vocabulary means nothing learnt. Figures compare only
/// over the same text, windows and tokenizer.
///
/// # Errors
/// One sentence that names what is wrong.
pub fn perplexity(args: &PerplexityArgs) -> anyhow::Result<()> {
    let mut text = String::new();
    if args.file.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text).context("standard input could not be read")?;
    } else {
        text = std::fs::read_to_string(&args.file)
            .with_context(|| format!("{} could not be read", args.file.display()))?;
    }
    let loaded = load(&args.model, &args.load, &EngineSizes { max_num_queued_reqs: 1, max_n: 1 }, None)?;
    if std::io::stderr().is_terminal() {
        // Nobody need listen there.
        let _ = writeln!(std::io::stderr(), "{}\n", loaded.report.join("\n"));
    }
    let ids = loaded.text.tokenizer.encode(&text, Specials::Literal, false)?;
    let window = args.window.min(loaded.engine.limits().max_model_len);
    if window < 2 {
        bail!("a window of {window} tokens has nothing to foresee");
    }
    let windows: Vec<&[u32]> = ids
        .chunks(window)
        .filter(|window| window.len() >= 2)
        .take(args.max_windows.unwrap_or(usize::MAX))
        .collect();
    if windows.is_empty() {
        bail!("the text has {} tokens; two are needed", ids.len());
    }
    let bar = progress_bar("Scoring", "windows");
    bar.set_length(windows.len() as u64);
    let (mut sum, mut count) = (0.0_f64, 0_usize);
    for window in windows {
        let request = Request {
            prompt: window.to_vec(),
            max_tokens: 0,
            n: 1,
            prompt_logprobs: Some(0),
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            ..Request::default()
        };
        let mut stream = loaded.engine.submit(request.validate(loaded.engine.limits())?)?;
        while let Some(event) = stream.blocking_next() {
            match event {
                TokenEvent::PromptLogprobs(tokens) => {
                    // The first token has nothing before it that could foresee it.
                    for token in tokens.into_iter().flatten() {
                        sum -= f64::from(token.logprob);
                        count += 1;
                    }
                }
                TokenEvent::Failed(error) => bail!(error),
                TokenEvent::Token { .. } | TokenEvent::Finished { .. } => {}
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let perplexity = (sum / count.max(1) as f64).exp();
    let mut out = std::io::stdout().lock();
    if args.json {
        let report = serde_json::json!({
            "perplexity": perplexity, "tokens": count, "window": window, "weights": loaded.weight_format,
        });
        writeln!(out, "{report}")?;
    } else {
        writeln!(
            out,
            "perplexity {perplexity:.4} over {count} tokens in windows of {window} ({})",
            loaded.weight_format
        )?;
    }
    Ok(())
}
