//! `ingle run`: one answer in the terminal.

use std::io::{IsTerminal, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use ingle_engine::{FinishReason, Request, SamplingParams, TokenEvent};
use serde_json::json;

use super::load::{EngineSizes, Loaded, load};
use crate::cli::RunArgs;
use crate::text::{ChatInput, Detokenizer, Specials};

/// Loads the model, answers, and prints the speed on standard error.
///
/// # Errors
/// One sentence that names what is wrong.
pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("standard input could not be read")?;
    }
    let loaded = load(&args.model, &args.load, &EngineSizes { max_num_queued_reqs: 1, max_n: 1 }, None)?;
    if std::io::stderr().is_terminal() {
        // Nobody need listen there.
        let _ = writeln!(std::io::stderr(), "{}\n", loaded.report.join("\n"));
    }
    let ids = encode(&loaded, args, &prompt)?;
    let context = loaded.engine.limits().max_model_len;
    let room = context.saturating_sub(ids.len());
    if room == 0 {
        bail!(
            "the prompt has {} tokens, and the context of {context} leaves no room for an answer",
            ids.len()
        );
    }
    let request = Request {
        max_tokens: args.max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX)),
        prompt: ids,
        n: 1,
        sampling: SamplingParams {
            temperature: args.temperature,
            top_p: args.top_p,
            ..SamplingParams::default()
        },
        ..Request::default()
    };
    let request = request.validate(loaded.engine.limits())?;
    let begin = Instant::now();
    let mut stream = loaded.engine.submit(request)?;
    let mut detokenizer = Detokenizer::new(Arc::clone(&loaded.text.tokenizer), true);
    let mut out = std::io::stdout().lock();
    let mut first = None;
    while let Some(event) = stream.blocking_next() {
        match event {
            TokenEvent::Token { id, .. } => {
                first.get_or_insert_with(Instant::now);
                out.write_all(detokenizer.push(id).as_bytes())?;
                out.flush()?;
            }
            TokenEvent::Finished { reason, usage, .. } => {
                writeln!(out, "{}", detokenizer.finish())?;
                let first = first.unwrap_or(begin);
                let seconds = first.elapsed().as_secs_f64();
                let speed = f64::from(usage.completion_tokens.saturating_sub(1)) / seconds.max(1e-9);
                let cut = if reason == FinishReason::Length { "; cut at the limit" } else { "" };
                let _ = writeln!(
                    std::io::stderr(),
                    "\n{} prompt tokens, first token after {:.0} ms, {} answer tokens at {speed:.1} tokens/s{cut}",
                    usage.prompt_tokens,
                    first.duration_since(begin).as_secs_f64() * 1e3,
                    usage.completion_tokens,
                );
            }
            TokenEvent::Failed(error) => bail!(error),
            TokenEvent::PromptLogprobs(_) => {}
        }
    }
    Ok(())
}

fn encode(loaded: &Loaded, args: &RunArgs, prompt: &str) -> anyhow::Result<Vec<u32>> {
    let tokenizer = &loaded.text.tokenizer;
    let Some(template) = loaded.text.template.as_ref().filter(|_| !args.raw) else {
        return Ok(tokenizer.encode(prompt, Specials::Parse, true)?);
    };
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    messages.push(json!({"role": "user", "content": prompt}));
    let input = ChatInput { messages: &messages, add_generation_prompt: true, ..ChatInput::default() };
    Ok(template.encode_chat(tokenizer, &input)?)
}
