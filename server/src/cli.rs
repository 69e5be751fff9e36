//! The command line: flags, their environment variables, and the TOML file behind them.
//!
//! Every flag `--some-name` of a command is also the environment variable `INGLE_SOME_NAME` and the key `some-name` in
//! the file given with `--config` (or `INGLE_CONFIG`), at the top level or in a table named after the command. A flag
//! wins over the environment, the environment over the file, the file over the default.

mod device;
mod dimensions;
mod tier;

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

pub mod bench;

use bench::BenchArgs;
pub use device::DeviceName;
pub use dimensions::{Dimensions, widths};
pub use tier::{RegisterArgs, TierArgs};

/// Ingle serves language models on your own machine: the LOCAL tier behind a model router.
#[derive(Debug, Parser)]
#[command(name = "ingle", version, max_term_width = 110, after_help = AFTER_HELP)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  ingle serve HuggingFaceTB/SmolLM2-135M-Instruct     serve a model of the hub on 127.0.0.1:8080
  ingle serve ./my-model --served-model-name local --alias gpt-4,llama-2-70b
  ingle serve ./my-model --register smg+http://router:30000
  ingle serve --embedding-model sentence-transformers/all-mpnet-base-v2          embeddings only
  ingle serve ./my-model --embedding-model ./my-embedder --reranker ./my-reranker   all in one process
  ingle run ./my-model \"Why is the sky blue?\"          one answer in the terminal
  ingle embed texts.jsonl --output vectors.npy        the embeddings of a file's texts
  ingle convert model.gguf ./my-model                 a GGUF file as a safetensors folder
  ingle bench serve --url http://127.0.0.1:8080       load on a server, and what its clients feel
  ingle bench model ./my-model                        how fast this machine computes a model";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over an OpenAI-style HTTP API.
    Serve(Box<ServeArgs>),
    /// Answer one prompt in the terminal.
    Run(Box<RunArgs>),
    /// Convert a GGUF file to a safetensors folder.
    Convert(ConvertArgs),
    /// Measure the speed of a server or of a model.
    Bench(Box<BenchArgs>),
    /// List the models on this machine.
    Models(ModelsArgs),
    /// Measure how well a model foresees a text, to see what rounding its weights costs.
    Perplexity(Box<PerplexityArgs>),
    /// Tell what this machine offers and what of it is used.
    Doctor(DoctorArgs),
    /// Check that what this machine computes is right: every operation against its plain formula, on random inputs.
    Check(CheckArgs),
    /// Ask routers whether they can be reached and know a server.
    Register(RegisterArgs),
    /// Embed the texts of a file: an indexing tool that needs no server.
    Embed(Box<EmbedArgs>),
}

/// Which model, and how it is loaded; shared by all commands that run one.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Branch, tag or commit of a hub model.
    #[arg(long, env = "INGLE_REVISION")]
    pub revision: Option<String>,
    /// Token for private hub models.
    #[arg(long, env = "INGLE_HF_TOKEN", hide_env_values = true)]
    pub hf_token: Option<String>,
    /// Folder of downloaded hub models [default: the Hugging Face cache].
    #[arg(long, env = "INGLE_DOWNLOAD_DIR")]
    pub download_dir: Option<PathBuf>,
    /// Never ask the hub; use what is on this machine.
    #[arg(long, env = "INGLE_OFFLINE", num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub offline: bool,
    /// Folder with the tokenizer, if not the model's own.
    #[arg(long, env = "INGLE_TOKENIZER")]
    pub tokenizer: Option<PathBuf>,
    /// File with the chat template (Jinja), if not the model's own.
    #[arg(long, env = "INGLE_CHAT_TEMPLATE")]
    pub chat_template: Option<PathBuf>,
    /// Type of the weights in memory; auto: as stored in the checkpoint.
    #[arg(long, env = "INGLE_DTYPE", default_value = "auto")]
    pub dtype: FloatType,
    /// Round the weights to fewer bits while they are loaded, for less memory and more speed (not with Metal). A
    /// quantised GGUF file needs no flag (Q8_0, Q4_0 and Q4_1 are computed as they are stored), nor does a GPTQ, AWQ or
    /// FP8 checkpoint.
    #[arg(long, env = "INGLE_QUANTIZATION", default_value = "none")]
    pub quantization: QuantizationName,
    /// Type of cached keys and values; auto: that of the weights (bf16 for quantised ones).
    #[arg(long, env = "INGLE_KV_CACHE_DTYPE", default_value = "auto")]
    pub kv_cache_dtype: KvTypeName,
    /// Where to compute: `cpu`, the NVIDIA GPU `cuda` or `cuda:N`, `metal`; auto: the first GPU that can be used, else
    /// the CPU (`ingle doctor` tells why not).
    #[arg(long, env = "INGLE_DEVICE", default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceName,
    /// GPUs of this machine that the model is divided over. On the CPU as many threads hold a share each, which is slower
    /// than one and there to try it.
    #[arg(long, env = "INGLE_TENSOR_PARALLEL_SIZE", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub tensor_parallel_size: u32,
    /// On a GPU, too, give a sequence the same bits whatever shares its batch: one kernel for all sizes of batch, which is
    /// slower. On the CPU it is always so.
    #[arg(long, env = "INGLE_DETERMINISTIC", num_args = 0..=1, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub deterministic: bool,
    /// Threads that compute; 0: all processors this process may use.
    #[arg(long, env = "INGLE_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// Keep each thread that computes to a processor of its own (Linux). Helps where nothing else runs on these processors,
    /// hurts where something does.
    #[arg(long, env = "INGLE_PIN_THREADS", num_args = 0..=1, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub pin_threads: bool,
    /// Prompt plus answer of one request at most, in tokens [default: what the model and the cache allow].
    #[arg(long, env = "INGLE_MAX_MODEL_LEN")]
    pub max_model_len: Option<usize>,
    /// Memory for cached keys and values, in MiB [default: a quarter of the free memory, 4096 at most; on an NVIDIA GPU
    /// as --gpu-memory-utilization says].
    #[arg(long, env = "INGLE_KV_CACHE_MEMORY")]
    pub kv_cache_memory: Option<usize>,
    /// Share of an NVIDIA GPU's memory, 0.05 to 1, that may be in use: what weights and the largest step, run once at the
    /// start, leave of it is for cached keys and values.
    #[arg(long, env = "INGLE_GPU_MEMORY_UTILIZATION", default_value_t = 0.9, value_parser = utilization, value_name = "SHARE")]
    pub gpu_memory_utilization: f64,
    /// Tokens per cache block.
    #[arg(long, env = "INGLE_BLOCK_SIZE", default_value_t = 16)]
    pub block_size: usize,
    /// Sequences that run at once at most [default: 64; on a GPU 256].
    #[arg(long, env = "INGLE_MAX_NUM_SEQS")]
    pub max_num_seqs: Option<usize>,
    /// Tokens of one step at most; longer prompts are computed in chunks [default: 512; on a GPU 2048].
    #[arg(long, env = "INGLE_MAX_NUM_BATCHED_TOKENS")]
    pub max_num_batched_tokens: Option<usize>,
    /// Keep computed blocks for later prompts that begin the same way.
    #[arg(long, env = "INGLE_ENABLE_PREFIX_CACHING", num_args = 0..=1, default_value = "true", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub enable_prefix_caching: bool,
    /// Split long prompts over steps, so that running answers go on meanwhile.
    #[arg(long, env = "INGLE_ENABLE_CHUNKED_PREFILL", num_args = 0..=1, default_value = "true", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub enable_chunked_prefill: bool,
    /// Seed of requests that bring none.
    #[arg(long, env = "INGLE_SEED", default_value_t = 0)]
    pub seed: u64,
}

/// Models that embed and rank, beside the one that generates or alone.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Embeddings and reranking")]
pub struct EncoderArgs {
    /// Embedding model: folder, hub id, or `default` (all-mpnet-base-v2). Without MODEL only it is served. Several:
    /// repeat or separate by commas.
    #[arg(long, env = "INGLE_EMBEDDING_MODEL", value_delimiter = ',')]
    pub embedding_model: Vec<String>,
    /// Model that scores pairs of a query and a document (a cross-encoder): folder or hub id.
    #[arg(long, env = "INGLE_RERANKER")]
    pub reranker: Option<String>,
    /// Names the (first) embedding model answers to, separated by commas; the first is its own [default: the folder's
    /// name; of a hub id the id and its last part].
    #[arg(long, env = "INGLE_EMBEDDING_SERVED_NAME", value_delimiter = ',')]
    pub embedding_served_name: Vec<String>,
    /// Names the reranker answers to, separated by commas; the first is its own [default: as above].
    #[arg(long, env = "INGLE_RERANKER_SERVED_NAME", value_delimiter = ',')]
    pub reranker_served_name: Vec<String>,
    /// Address (IP:PORT) that serves and lists only these models, for gateways that want one model per URL; with
    /// --reranker-listen only those that embed. Several: repeat or separate by commas.
    #[arg(long, env = "INGLE_EMBEDDING_LISTEN", value_delimiter = ',')]
    pub embedding_listen: Vec<SocketAddr>,
    /// Address (IP:PORT) that serves and lists only the reranker; several: repeat or separate by commas.
    #[arg(long, env = "INGLE_RERANKER_LISTEN", value_delimiter = ',')]
    pub reranker_listen: Vec<SocketAddr>,
    /// Share of computing time, 0.01 to 0.99, that these models may count on while the generating model has work, too;
    /// what one does not use is the other's. A running chat is slowed down by 1 / (1 - share) at most.
    #[arg(long, env = "INGLE_EMBEDDING_SHARE", default_value_t = DEFAULT_EMBEDDING_SHARE, value_parser = share)]
    pub embedding_share: f64,
    /// Type of the weights in memory; auto: as stored in the checkpoint, on CUDA devices bf16 for f32.
    #[arg(long, env = "INGLE_EMBEDDING_DTYPE", default_value = "auto")]
    pub embedding_dtype: FloatType,
    /// Round the weights to fewer bits while they are loaded (not with Metal).
    #[arg(long, env = "INGLE_EMBEDDING_QUANTIZATION", default_value = "none")]
    pub embedding_quantization: QuantizationName,
    /// Numbers that embeddings may be cut to with `dimensions`, besides those that the model's own config.json names: for
    /// models that were trained for it and do not say so. Several: separate by commas; `any`: every number.
    #[arg(long, env = "INGLE_EMBEDDING_DIMENSIONS", value_delimiter = ',', value_name = "N|any")]
    pub embedding_dimensions: Vec<Dimensions>,
    /// Tokens of one batch at most. Batches are cut shorter than that by the speed measured.
    #[arg(long, env = "INGLE_MAX_BATCH_TOKENS", default_value_t = 16_384)]
    pub max_batch_tokens: usize,
    /// Inputs or documents of one request at most.
    #[arg(long, env = "INGLE_MAX_CLIENT_BATCH_SIZE", default_value_t = 2048)]
    pub max_client_batch_size: usize,
    /// Inputs that may wait at most; further requests are answered 429.
    #[arg(long, env = "INGLE_MAX_QUEUED_INPUTS", default_value_t = 16_384)]
    pub max_queued_inputs: usize,
    /// Cut inputs that are too long for the model, instead of refusing them.
    #[arg(long, env = "INGLE_AUTO_TRUNCATE", num_args = 0..=1, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set)]
    pub auto_truncate: bool,
}

/// See [`EncoderArgs::embedding_share`].
const DEFAULT_EMBEDDING_SHARE: f64 = 0.2;

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.01..=0.99).contains(&share) => Ok(share),
        _ => Err("a number from 0.01 to 0.99 is wanted".to_owned()),
    }
}

fn utilization(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.05..=1.0).contains(&share) => Ok(share),
        _ => Err("a number from 0.05 to 1 is wanted".to_owned()),
    }
}

/// `ingle embed`
#[derive(Debug, Clone, Args)]
pub struct EmbedArgs {
    /// File with a text a line, or JSON a line (a string, or an object with the text under --field); `-`: standard
    /// input.
    pub input: PathBuf,
    /// Embedding model: folder, hub id, or `default` (all-mpnet-base-v2).
    #[arg(long, short = 'm', env = "INGLE_EMBEDDING_MODEL", default_value = "default")]
    pub model: String,
    /// File to write: `.npy` (float32, one row a text) or JSONL (the object with its `embedding`) [default: JSONL on
    /// standard output].
    #[arg(long, short = 'o')]
    pub output: Option<PathBuf>,
    /// Field of a JSON object that holds its text.
    #[arg(long, default_value = "text")]
    pub field: String,
    /// What the lines are; auto: JSON if the first line is a JSON string or object.
    #[arg(long, default_value = "auto")]
    pub input_format: LineFormat,
    /// Name of the model's prompt that goes before each text (`query`, `document`, ...).
    #[arg(long)]
    pub prompt_name: Option<String>,
    /// Fewer numbers a text, where the model was trained for it.
    #[arg(long)]
    pub dimensions: Option<usize>,
    /// Numbers that --dimensions may be, besides those that the model's own config.json names; `any`: every number.
    #[arg(long, env = "INGLE_EMBEDDING_DIMENSIONS", value_delimiter = ',', value_name = "N|any")]
    pub embedding_dimensions: Vec<Dimensions>,
    /// Fail at a text that is too long for the model; else it is cut, and told.
    #[arg(long)]
    pub no_truncate: bool,
    /// Type of the weights in memory; auto: as stored in the checkpoint, on CUDA devices bf16 for f32.
    #[arg(long, env = "INGLE_EMBEDDING_DTYPE", default_value = "auto")]
    pub dtype: FloatType,
    /// Round the weights to fewer bits while they are loaded (not with Metal).
    #[arg(long, env = "INGLE_EMBEDDING_QUANTIZATION", default_value = "none")]
    pub quantization: QuantizationName,
    /// Where to compute: `cpu`, the NVIDIA GPU `cuda` or `cuda:N`, `metal`; auto: the first GPU that can be used, else
    /// the CPU (`ingle doctor` tells why not).
    #[arg(long, env = "INGLE_DEVICE", default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceName,
    /// Threads that compute; 0: all processors this process may use.
    #[arg(long, env = "INGLE_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// Branch, tag or commit of a hub model.
    #[arg(long, env = "INGLE_REVISION")]
    pub revision: Option<String>,
    /// Token for private hub models.
    #[arg(long, env = "INGLE_HF_TOKEN", hide_env_values = true)]
    pub hf_token: Option<String>,
    /// Folder of downloaded hub models [default: the Hugging Face cache].
    #[arg(long, env = "INGLE_DOWNLOAD_DIR")]
    pub download_dir: Option<PathBuf>,
    /// Never ask the hub; use what is on this machine.
    #[arg(long, env = "INGLE_OFFLINE", num_args = 0..=1, default_value = "false", default_missing_value = "true")]
    pub offline: bool,
    /// TOML file with any of these settings.
    #[arg(long, env = "INGLE_CONFIG")]
    pub config: Option<PathBuf>,
}

/// What the lines of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LineFormat {
    /// Found out from the first line.
    Auto,
    /// JSON strings or objects.
    Jsonl,
    /// Texts.
    Text,
}

/// `ingle serve`
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Folder, GGUF file or hub id [default: SmolLM2-135M-Instruct].
    #[arg(env = "INGLE_MODEL")]
    pub model: Option<String>,
    /// How the model is loaded and run.
    #[command(flatten)]
    pub load: ModelArgs,
    /// Address to listen on. Anything but a loopback address needs --api-key or is open to everybody who reaches it.
    #[arg(long, env = "INGLE_HOST", default_value = "127.0.0.1", help_heading = "Serving")]
    pub host: IpAddr,
    /// Port to listen on; 0: any free one.
    #[arg(long, env = "INGLE_PORT", default_value_t = 8080, help_heading = "Serving")]
    pub port: u16,
    /// Listen on this Unix socket instead.
    #[arg(long, env = "INGLE_UDS", help_heading = "Serving")]
    pub uds: Option<PathBuf>,
    /// Key that clients must send as a bearer token; several: repeat or separate by commas.
    #[arg(
        long,
        env = "INGLE_API_KEY",
        value_delimiter = ',',
        hide_env_values = true,
        help_heading = "Serving"
    )]
    pub api_key: Vec<String>,
    /// Names the model answers to, separated by commas; the first is its own.
    #[arg(long, env = "INGLE_SERVED_MODEL_NAME", value_delimiter = ',', help_heading = "Serving")]
    pub served_model_name: Vec<String>,
    /// More addresses to listen on (IP:PORT), separated by commas or repeated; they serve everything, as --host and
    /// --port do.
    #[arg(long, env = "INGLE_LISTEN", value_delimiter = ',', help_heading = "Serving")]
    pub listen: Vec<SocketAddr>,
    /// How models that embed and rank are loaded and run.
    #[command(flatten)]
    pub encoders: EncoderArgs,
    /// Requests that may wait at most; more are answered 429.
    #[arg(long, env = "INGLE_MAX_NUM_QUEUED_REQS", default_value_t = 256, help_heading = "Serving")]
    pub max_num_queued_reqs: usize,
    /// Answer tokens of a request that names no number, at most.
    #[arg(long, env = "INGLE_DEFAULT_MAX_TOKENS", default_value_t = 4096, help_heading = "Serving")]
    pub default_max_tokens: u32,
    /// Choices (`n`) of one request at most.
    #[arg(long, env = "INGLE_MAX_N", default_value_t = 16, help_heading = "Serving")]
    pub max_n: usize,
    /// Bytes of a request body at most.
    #[arg(long, env = "INGLE_MAX_BODY_BYTES", default_value_t = 16 << 20, help_heading = "Serving")]
    pub max_body_bytes: usize,
    /// Seconds one request may take.
    #[arg(long, env = "INGLE_REQUEST_TIMEOUT", default_value_t = 3600, help_heading = "Serving")]
    pub request_timeout: u64,
    /// Seconds that running requests get to finish after SIGTERM.
    #[arg(long, env = "INGLE_DRAIN_TIMEOUT", default_value_t = 30, help_heading = "Serving")]
    pub drain_timeout: u64,
    /// Seconds after SIGTERM in which /ready says no and requests are still taken: for balancers that only look at
    /// /ready, and supervisors that cannot wait before the signal.
    #[arg(long, env = "INGLE_DRAIN_DELAY", default_value_t = 0, help_heading = "Serving")]
    pub drain_delay: u64,
    /// Origins of web pages that may call the API (CORS), separated by commas; `*`: all.
    #[arg(long, env = "INGLE_ALLOWED_ORIGINS", value_delimiter = ',', help_heading = "Serving")]
    pub allowed_origins: Vec<String>,
    /// Host names accepted besides the local ones when no key is set, separated by commas.
    #[arg(long, env = "INGLE_ALLOWED_HOSTS", value_delimiter = ',', help_heading = "Serving")]
    pub allowed_hosts: Vec<String>,
    /// Ask for a key at /metrics too.
    #[arg(long, env = "INGLE_PROTECT_METRICS", num_args = 0..=1, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set, help_heading = "Serving")]
    pub protect_metrics: bool,
    /// Form of the log.
    #[arg(long, env = "INGLE_LOG_FORMAT", default_value = "human", help_heading = "Serving")]
    pub log_format: LogFormat,
    /// What is logged: error, warn, info, debug, or a tracing filter.
    #[arg(long, env = "INGLE_LOG", default_value = "info", help_heading = "Serving")]
    pub log: String,
    /// How it behaves as a tier.
    #[command(flatten)]
    pub tier: TierArgs,
    /// TOML file with any of these settings.
    #[arg(long, env = "INGLE_CONFIG", help_heading = "Serving")]
    pub config: Option<PathBuf>,
}

/// `ingle run`
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Folder, GGUF file or hub id.
    pub model: String,
    /// What to ask; `-`: read it from standard input.
    pub prompt: String,
    /// How the model is loaded and run.
    #[command(flatten)]
    pub load: ModelArgs,
    /// A system message before the prompt.
    #[arg(long)]
    pub system: Option<String>,
    /// Continue the prompt as it is, without a chat template.
    #[arg(long)]
    pub raw: bool,
    /// Answer tokens at most.
    #[arg(long, short = 'n', default_value_t = 512)]
    pub max_tokens: u32,
    /// 0: always the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Sample from the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// TOML file with any of these settings.
    #[arg(long, env = "INGLE_CONFIG")]
    pub config: Option<PathBuf>,
}

/// `ingle convert`
#[derive(Debug, Clone, Args)]
pub struct ConvertArgs {
    /// The GGUF file.
    pub gguf: PathBuf,
    /// Folder to write.
    pub out_dir: PathBuf,
    /// Type of the written weights; auto: bf16. Quantised weights are exact only in f32.
    #[arg(long, default_value = "auto")]
    pub dtype: FloatType,
    /// Replace files that exist.
    #[arg(long)]
    pub overwrite: bool,
}

/// `ingle models`
#[derive(Debug, Clone, Args)]
pub struct ModelsArgs {
    /// Folder of downloaded hub models [default: the Hugging Face cache].
    #[arg(long, env = "INGLE_DOWNLOAD_DIR")]
    pub download_dir: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `ingle perplexity`
#[derive(Debug, Clone, Args)]
pub struct PerplexityArgs {
    /// Folder, GGUF file or hub id.
    pub model: String,
    /// A text file; `-`: standard input.
    pub file: PathBuf,
    /// How the model is loaded and run.
    #[command(flatten)]
    pub load: ModelArgs,
    /// Tokens scored together; each window starts without a past.
    #[arg(long, default_value_t = 512)]
    pub window: usize,
    /// Stop after this many windows [default: the whole text].
    #[arg(long)]
    pub max_windows: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// TOML file with any of these settings.
    #[arg(long, env = "INGLE_CONFIG")]
    pub config: Option<PathBuf>,
}

/// `ingle doctor`
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// Compute threads to assume; 0: as many as this process may use.
    #[arg(long, env = "INGLE_THREADS", default_value_t = 0)]
    pub threads: usize,
}

/// `ingle check`
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Where to compute (see `ingle serve --help`).
    #[arg(long, env = "INGLE_DEVICE", default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceName,
    /// Threads that compute; 0: all processors this process may use.
    #[arg(long, env = "INGLE_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// Also check the models in this folder against the `reference.json` beside each (tests/fixtures of the sources).
    #[arg(long)]
    pub fixtures: Option<PathBuf>,
    /// Seed of the inputs [default: another each time].
    #[arg(long)]
    pub seed: Option<u64>,
    /// Write the results to this file, as JSON.
    #[arg(long, short = 'o')]
    pub output: Option<PathBuf>,
}

/// A floating-point type by the names that vLLM and PyTorch use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FloatType {
    /// Decide from the checkpoint.
    Auto,
    /// 32 bits.
    #[value(alias = "float32", alias = "float")]
    F32,
    /// 16 bits with the range of f32.
    #[value(alias = "bfloat16")]
    Bf16,
    /// 16 bits, IEEE.
    #[value(alias = "float16", alias = "half")]
    F16,
}

/// How weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizationName {
    /// As they are.
    None,
    /// Bytes, a scale for each 32 elements: half the memory of bf16.
    Int8,
    /// Half bytes, a scale for each 32 elements: little more than a quarter of the memory of bf16; answers change
    /// noticeably in small models.
    Int4,
    /// 8-bit floating point (e4m3), a scale for each row: half the memory of bf16; on CUDA devices only.
    Fp8,
}

/// How cached keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvTypeName {
    /// As the weights; bf16 if they are quantised.
    Auto,
    /// 32 bits.
    #[value(alias = "float32", alias = "float")]
    F32,
    /// 16 bits, the exponent of f32.
    #[value(alias = "bfloat16")]
    Bf16,
    /// 16 bits, IEEE.
    #[value(alias = "float16", alias = "half")]
    F16,
    /// Bytes with a scale for each token and head: half the memory of bf16 (CPU only).
    Int8,
    /// Floats of 8 bits (e4m3), unscaled: half the memory of bf16 (GPU only).
    Fp8,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for people.
    Human,
    /// A JSON object a line.
    Json,
}

/// Parses `args` (the program's name first) together with the environment and the config file.
///
/// # Errors
/// As clap reports them; [`clap::Error::exit`] prints and ends with status 2 (0 for `--help`).
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    let matches = Cli::command().try_get_matches_from(&args)?;
    if let Some((name, command)) = matches.subcommand()
        && let Ok(Some(path)) = command.try_get_one::<PathBuf>("config")
    {
        args.extend(from_file(path, name, command)?);
        return Cli::from_arg_matches(&Cli::command().try_get_matches_from(&args)?);
    }
    Cli::from_arg_matches(&matches)
}

/// The settings of the file at `path` for command `name` as flags, without those that the command line or the
/// environment gave.
fn from_file(path: &PathBuf, name: &str, matches: &clap::ArgMatches) -> Result<Vec<OsString>, clap::Error> {
    let fail = |message: String| {
        Cli::command().error(clap::error::ErrorKind::InvalidValue, format!("{}: {message}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
    let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| fail(error.to_string()))?;
    let root = Cli::command();
    let commands: Vec<&str> = root.get_subcommands().map(clap::Command::get_name).collect();
    let own = table.get(name).and_then(toml::Value::as_table).cloned().unwrap_or_default();
    table.retain(|key, value| !(value.is_table() && commands.contains(&key)));
    table.extend(own);
    let command = root.find_subcommand(name).ok_or_else(|| fail(format!("no command {name}")))?;
    let mut flags = Vec::new();
    for (key, value) in table {
        let known = command.get_arguments().find(|arg| {
            arg.get_long() == Some(key.replace('_', "-").as_str())
                || (arg.is_positional() && arg.get_id() == key.as_str())
        });
        let Some(arg) = known.filter(|arg| arg.get_id() != "config") else {
            return Err(fail(format!(
                "unknown setting {key:?}; `ingle {name} --help` lists the flags, which are the settings"
            )));
        };
        let given = matches.value_source(arg.get_id().as_str());
        if matches!(given, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            continue;
        }
        let values = match value {
            toml::Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_) => {
                    value.to_string()
                }
                _ => return Err(fail(format!("{key} is a table or a date, not a setting"))),
            };
            flags.push(match arg.get_long() {
                Some(long) => format!("--{long}={value}").into(),
                None => value.into(),
            });
        }
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_with(file: &str, flags: &[&str]) -> Result<ServeArgs, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ingle.toml");
        std::fs::write(&path, file).unwrap();
        let mut args: Vec<OsString> = vec!["ingle".into(), "serve".into(), "--config".into(), path.into()];
        args.extend(flags.iter().map(OsString::from));
        match parse(args).map_err(|error| error.to_string())?.command {
            Command::Serve(serve) => Ok(*serve),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_file_stands_behind_the_flags() {
        let file = "port = 9\nmodel = \"m\"\nthreads = 3\nenable_prefix_caching = false\n[serve]\nserved-model-name = [\"a\", \"b\"]\n[run]\nthreads = 9\n";
        let serve = parse_with(file, &["--threads", "2"]).unwrap();
        assert_eq!((serve.port, serve.load.threads), (9, 2));
        assert_eq!(serve.model.as_deref(), Some("m"));
        assert_eq!(serve.served_model_name, ["a", "b"]);
        assert!(!serve.load.enable_prefix_caching);
    }

    #[test]
    fn a_wrong_file_is_refused_by_name() {
        assert!(parse_with("prot = 9\n", &[]).unwrap_err().contains("unknown setting \"prot\""));
        assert!(parse_with("port = \"x\"\n", &[]).unwrap_err().contains("--port"));
        assert!(parse_with("port = \n", &[]).unwrap_err().contains("ingle.toml"));
        assert!(parse_with("port = { a = 1 }\n", &[]).unwrap_err().contains("port"));
    }

    #[test]
    fn every_flag_of_serve_has_its_variable() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").unwrap();
        for arg in serve.get_arguments().filter(|arg| arg.get_long().is_some_and(|long| long != "help")) {
            let long = arg.get_long().unwrap();
            let wanted = format!("INGLE_{}", long.to_uppercase().replace('-', "_"));
            let env = arg.get_env().map(|env| env.to_string_lossy().into_owned());
            assert_eq!(env.as_deref(), Some(wanted.as_str()), "--{long}");
        }
    }
}
