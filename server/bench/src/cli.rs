//! The flags of `ingle bench`. Names are those of vLLM's `bench serve` and of llama-bench where the meaning is the same.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use crate::serve::{Access, Api, DatasetName, PromptForm, Rate};

/// `ingle bench`
#[derive(Debug, Clone, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What can be measured.
#[derive(Debug, Clone, Subcommand)]
pub enum BenchCommand {
    /// Put load on a running server (any with an OpenAI-style API) and measure what its clients feel.
    #[command(after_long_help = SERVE_HELP)]
    Serve(Box<ServeBenchArgs>),
}

const SERVE_HELP: &str = "\
Examples:
  ingle bench serve --url http://127.0.0.1:8080
  ingle bench serve --url http://127.0.0.1:8080 --max-concurrency 1,8,32 --input-len 128 --output-len 128 --html report.html
  ingle bench serve --url http://127.0.0.1:8000 --request-rate 1,2,4 --goodput ttft:500 tpot:50
  ingle bench serve --peers ingle=http://127.0.0.1:8080,vllm=http://127.0.0.1:8000 --repeats 3 --output both.json
  ingle bench serve --url http://127.0.0.1:8080 --backend openai-chat --dataset-name multi-turn --num-turns 4
  ingle bench serve --url http://127.0.0.1:8080 --dataset-name sharegpt --dataset-path ShareGPT.json

What the figures mean:
  TTFT  time to first token: from sending the request to the first token's arrival
  TPOT  time per output token: (end - first token) / (tokens - 1), one value a request
  ITL   inter-token latency: between one arrival and the next, one value a pair of arrivals
  E2EL  end-to-end latency: from sending the request to the end of its stream
  goodput: requests a second that kept all objectives of --goodput";

/// Where servers are and how they are asked.
#[derive(Debug, Clone, Args)]
pub struct TargetArgs {
    /// Address of the server, with or without `/v1`.
    #[arg(long, visible_alias = "base-url", short = 'u')]
    pub url: Option<String>,
    /// Several servers under the same load in turn: name=url, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "NAME=URL", conflicts_with = "url")]
    pub peers: Vec<String>,
    /// Name of the model there [default: the first that the server lists]. With --peers: name=model pairs, or one
    /// for all.
    #[arg(long, short = 'm', value_delimiter = ',')]
    pub model: Vec<String>,
    /// Key sent as a bearer token.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Further header, `name: value`; may be repeated.
    #[arg(long)]
    pub header: Vec<String>,
    /// Seconds that one request may take.
    #[arg(long, default_value_t = 600)]
    pub timeout: u64,
}

impl TargetArgs {
    /// The servers, in the order given.
    ///
    /// # Errors
    /// One sentence that names the flag at fault.
    pub fn accesses(&self) -> anyhow::Result<Vec<Access>> {
        let mut servers: Vec<(String, String)> = Vec::new();
        for peer in &self.peers {
            match peer.split_once('=') {
                Some((name, url)) if !name.is_empty() && !url.is_empty() => {
                    servers.push((name.trim().to_owned(), url.trim().to_owned()));
                }
                _ => anyhow::bail!("--peers wants name=url, not {peer:?}"),
            }
        }
        if let Some(url) = &self.url {
            servers.push(("server".to_owned(), url.clone()));
        }
        if servers.is_empty() {
            anyhow::bail!("--url or --peers must say where the server is");
        }
        let mut headers = Vec::new();
        for header in &self.header {
            let (name, value) =
                header.split_once(':').ok_or_else(|| anyhow::anyhow!("--header wants `name: value`"))?;
            headers.push((name.trim().to_owned(), value.trim().to_owned()));
        }
        let model = |name: &str| {
            let own =
                self.model.iter().filter_map(|pair| pair.split_once('=')).find(|(peer, _)| *peer == name);
            let for_all = || self.model.iter().find(|model| !model.contains('=')).cloned();
            own.map(|(_, model)| model.to_owned()).or_else(for_all)
        };
        Ok(servers
            .into_iter()
            .map(|(name, url)| Access {
                model: model(&name),
                name,
                url,
                api_key: self.api_key.clone(),
                headers: headers.clone(),
                timeout: Duration::from_secs(self.timeout.max(1)),
            })
            .collect())
    }
}

/// Where results go.
#[derive(Debug, Clone, Args)]
pub struct OutputArgs {
    /// Write the whole result to this file, as JSON.
    #[arg(long, short = 'o', help_heading = "Results")]
    pub output: Option<PathBuf>,
    /// Form of the table on standard output.
    #[arg(long, default_value = "md", help_heading = "Results")]
    pub format: Format,
    /// No progress on standard error.
    #[arg(long, short = 'q', help_heading = "Results")]
    pub quiet: bool,
    /// Note kept in the result, `key=value`; may be repeated.
    #[arg(long, help_heading = "Results")]
    pub metadata: Vec<String>,
}

/// Forms of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Markdown.
    Md,
    /// Comma-separated values.
    Csv,
    /// One JSON document, the whole result.
    Json,
    /// One JSON object a line, a line a measurement.
    Jsonl,
}

/// `ingle bench serve`
#[derive(Debug, Clone, Args)]
pub struct ServeBenchArgs {
    /// Where the servers are.
    #[command(flatten)]
    pub target: TargetArgs,
    /// Which route is asked.
    #[arg(long, default_value = "openai")]
    pub backend: Api,
    /// Path of the route, if not that of the backend.
    #[arg(long)]
    pub endpoint: Option<String>,
    /// Fields put into every request, as a JSON object.
    #[arg(long, value_name = "JSON")]
    pub extra_body: Option<String>,

    /// Requests under way at once; several, separated by commas, are measured one after another [default: 8, or no
    /// limit if --request-rate is given].
    #[arg(long, short = 'c', value_delimiter = ',', help_heading = "Load")]
    pub max_concurrency: Vec<usize>,
    /// Requests a second, or inf; several are measured one after another.
    #[arg(long, short = 'r', value_delimiter = ',', default_value = "inf", help_heading = "Load")]
    pub request_rate: Vec<Rate>,
    /// How even the arrivals are: 1 is a Poisson process, below 1 comes in bursts, above 1 is more even.
    #[arg(long, default_value_t = 1.0, help_heading = "Load")]
    pub burstiness: f64,
    /// Conversations (single requests, but for multi-turn) of each measurement [default: 4 times the concurrency, 32
    /// at least].
    #[arg(long, short = 'n', help_heading = "Load")]
    pub num_prompts: Option<usize>,
    /// Begin no further conversation after so many seconds.
    #[arg(long, help_heading = "Load")]
    pub max_seconds: Option<f64>,
    /// Requests before each measurement that are not counted [default: as many as the concurrency, 8 at most].
    #[arg(long, help_heading = "Load")]
    pub num_warmups: Option<usize>,
    /// Measure everything so many times; servers and loads take turns.
    #[arg(long, default_value_t = 1, help_heading = "Load")]
    pub repeats: usize,
    /// Seed of prompts and arrivals: the same seed gives the same load.
    #[arg(long, default_value_t = 0, help_heading = "Load")]
    pub seed: u64,
    /// Objectives that a request must keep to count for goodput, in milliseconds: ttft:MS tpot:MS e2el:MS.
    #[arg(long, num_args = 1.., value_name = "NAME:MS", help_heading = "Load")]
    pub goodput: Vec<String>,

    /// Where prompts come from.
    #[arg(long, default_value = "random", help_heading = "Prompts")]
    pub dataset_name: DatasetName,
    /// File of the data set.
    #[arg(long, help_heading = "Prompts")]
    pub dataset_path: Option<PathBuf>,
    /// Tokens of a random prompt (of a question, for multi-turn).
    #[arg(long, visible_alias = "random-input-len", default_value_t = 512, help_heading = "Prompts")]
    pub input_len: usize,
    /// Tokens of an answer [default: as the data set says, else 128].
    #[arg(long, visible_alias = "random-output-len", help_heading = "Prompts")]
    pub output_len: Option<u32>,
    /// Lengths vary evenly between len * (1 - ratio) and len * (1 + ratio).
    #[arg(long, visible_alias = "random-range-ratio", default_value_t = 0.0, help_heading = "Prompts")]
    pub range_ratio: f64,
    /// Tokens before each random prompt that are the same for all (prefix_repetition: for all of a prefix).
    #[arg(long, visible_alias = "random-prefix-len", help_heading = "Prompts")]
    pub prefix_len: Option<usize>,
    /// Different prefixes of prefix_repetition.
    #[arg(long, default_value_t = 10, help_heading = "Prompts")]
    pub num_prefixes: usize,
    /// Questions of a multi-turn conversation.
    #[arg(long, default_value_t = 4, help_heading = "Prompts")]
    pub num_turns: usize,
    /// Go on past the end-of-text token, so that answers have exactly the wanted length [default: true for made-up
    /// prompts, false for files].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", help_heading = "Prompts")]
    pub ignore_eos: Option<bool>,
    /// Folder (or tokenizer.json, or GGUF file) of the tokenizer that counts tokens [default: the server's /tokenize].
    #[arg(long, help_heading = "Prompts")]
    pub tokenizer: Option<PathBuf>,
    /// How made-up prompts are sent.
    #[arg(long, default_value = "auto", help_heading = "Prompts")]
    pub prompt_form: PromptForm,

    /// Where results go.
    #[command(flatten)]
    pub out: OutputArgs,
}
