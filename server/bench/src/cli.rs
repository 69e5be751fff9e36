//! The flags of `ingle bench`. Names are those of vLLM's `bench serve` and of llama-bench where the meaning is the same.

use std::path::PathBuf;
use std::time::Duration;

use std::str::FromStr;

use clap::{Args, ValueEnum};

use crate::embed::EmbedApi;
use crate::serve::{Access, Api, DatasetName, PromptForm, Rate};

/// Ends the help of `ingle bench serve`.
pub const SERVE_HELP: &str = "\
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
    /// Write a page with plots to this file; it needs no network and no script.
    #[arg(long, help_heading = "Results")]
    pub html: Option<PathBuf>,
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
    /// limit if --request-rate is given, be it inf].
    #[arg(long, short = 'c', value_delimiter = ',', help_heading = "Load")]
    pub max_concurrency: Vec<usize>,
    /// Requests a second, or inf for all at once; several are measured one after another [default: inf, with 8 under way].
    #[arg(long, short = 'r', value_delimiter = ',', help_heading = "Load")]
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
    /// Seed of prompts and arrivals: the same seed gives the same load to the letter, of which a prefix cache knows the second
    /// run [default: lengths and arrivals are those of seed 0, the words of made-up prompts are others in every run].
    #[arg(long, help_heading = "Load")]
    pub seed: Option<u64>,
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

/// Ends the help of `ingle bench model`.
pub const MODEL_HELP: &str = "\
Examples:
  ingle bench model ./my-model                                   pp512 and tg128, as llama-bench
  ingle bench model ./my-model --quantization int8 -p 512,2048 -n 128 -b 1,8,32
  ingle bench model ./my-model -d 0,2048 --format csv --output speed.json
  ingle bench model --random-weights llama-3.2-1b                 a known shape, weights made up
  ingle bench model ./my-model --threads 1 -p 128 -n 0

What the table says:
  ppN     N prompt tokens, computed in steps of --max-num-batched-tokens
  tgN     N answer tokens, one a step and sequence
  @ dN    with N tokens cached before;  xN: N sequences together
  GB/s    weights and cached keys and values that had to be read; its limit is the read bandwidth measured now
  GFLOP/s matrix products and attention; its limit is the rate, measured now, of the instructions that multiply
          weights of this type";

/// A prompt and an answer that follow each other: `512,128`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptAndGen(pub (usize, usize));

impl FromStr for PromptAndGen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let pair = text.split_once([',', '+', ':']);
        let pair = pair.and_then(|(prompt, answer)| Some((prompt.parse().ok()?, answer.parse().ok()?)));
        pair.map(Self).ok_or_else(|| "two numbers are wanted, such as 512,128".to_owned())
    }
}

/// `ingle bench model`: what is measured. How the model is loaded is the binary's to say.
#[derive(Debug, Clone, Args)]
pub struct ModelBenchArgs {
    /// Folder, GGUF file or hub id.
    #[arg(required_unless_present = "random_weights", conflicts_with = "random_weights")]
    pub model: Option<String>,
    /// Make the weights up, in memory: name of a preset (tiny, smollm2-135m, smollm2-360m, qwen3-0.6b, llama-3.2-1b,
    /// llama-3.1-8b, llama-3.1-70b), or a folder with a config.json. They are the same for the same --seed.
    #[arg(long, value_name = "PRESET|FOLDER")]
    pub random_weights: Option<String>,
    /// Lengths of prompts [default: 512]; 0: none.
    #[arg(long, short = 'p', value_delimiter = ',', help_heading = "Measured")]
    pub n_prompt: Option<Vec<usize>>,
    /// Lengths of answers [default: 128]; 0: none.
    #[arg(long, short = 'n', value_delimiter = ',', help_heading = "Measured")]
    pub n_gen: Option<Vec<usize>>,
    /// A prompt and its answer measured together, `512,128`; may be repeated.
    #[arg(long, visible_alias = "pg", value_name = "PROMPT,GEN", help_heading = "Measured")]
    pub prompt_and_gen: Vec<PromptAndGen>,
    /// Tokens cached before the clock starts.
    #[arg(long, short = 'd', value_delimiter = ',', default_value = "0", help_heading = "Measured")]
    pub n_depth: Vec<usize>,
    /// Sequences computed together.
    #[arg(long, short = 'b', value_delimiter = ',', default_value = "1", help_heading = "Measured")]
    pub batch_size: Vec<usize>,
    /// Times that each case is measured, after one that does not count.
    #[arg(long, short = 'r', default_value_t = 5, help_heading = "Measured")]
    pub repetitions: usize,
    /// Where results go.
    #[command(flatten)]
    pub out: OutputArgs,
}

/// `ingle bench make-model`
#[derive(Debug, Clone, Args)]
pub struct MakeModelArgs {
    /// Name of a preset (tiny, smollm2-135m, smollm2-360m, qwen3-0.6b, llama-3.2-1b, llama-3.1-8b, llama-3.1-70b), or a
    /// folder with a config.json.
    pub preset: String,
    /// Folder to write: config, bf16 weights as safetensors, tokenizer.
    pub out_dir: PathBuf,
    /// The same seed gives the same weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Ends the help of `ingle bench embed`.
pub const EMBED_HELP: &str = "\
Examples:
  ingle bench embed --url http://127.0.0.1:8080
  ingle bench embed --url http://127.0.0.1:3000 --backend tei --lengths 128,384 --batch-size 1,32
  ingle bench embed --peers ingle=http://127.0.0.1:8080,tei=http://127.0.0.1:3000 --concurrency 4

Without --model, the first model is measured whose task is \"embed\", else the first that the server lists. A length that the
server refuses is a row with the reason; the command fails if all rows do.";

/// `ingle bench embed`
#[derive(Debug, Clone, Args)]
pub struct EmbedBenchArgs {
    /// Where the servers are.
    #[command(flatten)]
    pub target: TargetArgs,
    /// Which route is asked.
    #[arg(long = "backend", default_value = "openai")]
    pub api: EmbedApi,
    /// Tokens of a text; several are measured one after another.
    #[arg(long, value_delimiter = ',', default_value = "16,128,384", help_heading = "Load")]
    pub lengths: Vec<usize>,
    /// Texts of a request; several are measured one after another.
    #[arg(long, short = 'b', value_delimiter = ',', default_value = "1,32", help_heading = "Load")]
    pub batch_size: Vec<usize>,
    /// Requests at once.
    #[arg(long, short = 'c', default_value_t = 1, help_heading = "Load")]
    pub concurrency: usize,
    /// Requests of each length and batch.
    #[arg(long, short = 'n', default_value_t = 20, help_heading = "Load")]
    pub num_requests: usize,
    /// Requests before them that are not counted.
    #[arg(long, default_value_t = 2, help_heading = "Load")]
    pub num_warmups: usize,
    /// Measure everything so many times; servers, lengths and batches take turns.
    #[arg(long, default_value_t = 1, help_heading = "Load")]
    pub repeats: usize,
    /// Seed of the texts.
    #[arg(long, default_value_t = 0, help_heading = "Load")]
    pub seed: u64,
    /// Folder (or tokenizer.json) of the tokenizer that counts tokens [default: the server's /tokenize].
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// Where results go.
    #[command(flatten)]
    pub out: OutputArgs,
}

/// Ends the help of `ingle bench startup`.
pub const STARTUP_HELP: &str = "\
Examples:
  ingle bench startup ./my-model                        this binary, on a free port
  ingle bench startup ./my-model -- --quantization int8  with flags of `ingle serve`
  ingle bench startup ./my-embedder --embed              exec to the first embedding
  ingle bench startup --url http://127.0.0.1:8081 -- llama-server -m model.gguf --port 8081";

/// `ingle bench startup`
#[derive(Debug, Clone, Args)]
pub struct StartupBenchArgs {
    /// Model that this binary serves; without it, the command after `--` is started.
    pub model: Option<String>,
    /// Where the started command will serve.
    #[arg(long, short = 'u', required_unless_present = "model")]
    pub url: Option<String>,
    /// Path that answers 200 when the server is ready [default: /ready for this binary, else /health].
    #[arg(long, default_value = "", hide_default_value = true)]
    pub ready_path: String,
    /// Name of the model there [default: the first that the server lists].
    #[arg(long)]
    pub model_name: Option<String>,
    /// MODEL is an embedding model (or the command serves one): the first thing asked is an embedding.
    #[arg(long)]
    pub embed: bool,
    /// First thing asked.
    #[arg(long, default_value = "Once upon a time")]
    pub prompt: String,
    /// Starts.
    #[arg(long, short = 'r', default_value_t = 3)]
    pub repeats: usize,
    /// Seconds to wait for a start.
    #[arg(long, default_value_t = 300)]
    pub timeout: u64,
    /// File for what the server prints [default: its last lines are shown if it fails].
    #[arg(long)]
    pub log: Option<PathBuf>,
    /// Where results go.
    #[command(flatten)]
    pub out: OutputArgs,
    /// Flags of `ingle serve`, or the command to start.
    #[arg(last = true)]
    pub command: Vec<String>,
}
