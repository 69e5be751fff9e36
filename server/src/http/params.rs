//! The parameters that chat and completions share: sampling, length, stops, streaming, and what is refused.

use ingle_engine::{Limits, SamplingParams};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::models::task_name;
use super::validate::{Fields, integer};
use crate::{
    auth::Tenant,
    error::{ApiError, ApiResult, ErrorKind, quote},
    record::Record,
    state::{AppState, ModelName},
};

/// Bytes of a stop string at most.
const MAX_STOP_BYTES: usize = 256;
/// Bytes of a cache salt at most.
const MAX_SALT_BYTES: usize = 256;

/// What chat and completions have in common.
#[derive(Debug)]
pub(crate) struct Common {
    /// The name for the answer.
    pub(crate) model: String,
    pub(crate) sampling: SamplingParams,
    pub(crate) n: u16,
    pub(crate) stop: Vec<String>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    pub(crate) priority: i32,
    pub(crate) cache_salt: [u8; 32],
    pub(crate) skip_special: bool,
    /// Keep only so many tokens of the prompt's end.
    pub(crate) truncate_prompt: Option<usize>,
}

/// Parameters that exist and are not built; each is refused by name unless its value asks for nothing.
const NOT_BUILT: &[(&str, &str)] = &[
    ("tools", "tool calls are not built"),
    ("tool_choice", "tool calls are not built"),
    ("functions", "tool calls are not built"),
    ("function_call", "tool calls are not built"),
    ("response_format", "structured output is not built, only {\"type\": \"text\"} is served"),
    ("structured_outputs", "structured output is not built"),
    ("guided_json", "structured output is not built"),
    ("guided_regex", "structured output is not built"),
    ("guided_choice", "structured output is not built"),
    ("guided_grammar", "structured output is not built"),
    ("guided_decoding_backend", "structured output is not built"),
    ("guided_whitespace_pattern", "structured output is not built"),
    ("json_schema", "structured output is not built"),
    ("grammar", "structured output is not built"),
    ("regex", "structured output is not built"),
    ("ebnf", "structured output is not built"),
    ("modalities", "this server makes text only"),
    ("audio", "this server makes text only"),
    ("prediction", "predicted output is not built"),
    ("web_search_options", "this server fetches nothing"),
    ("reasoning_effort", "the model has no such setting"),
    ("verbosity", "the model has no such setting"),
    ("chat_template", "the template of the model is used, never one of a request"),
    ("documents", "documents are not passed to templates"),
    ("mm_processor_kwargs", "this server reads text only"),
    ("prompt_embeds", "prompts are text or token ids"),
    ("logits_processors", "code of a request is not run"),
    ("allowed_token_ids", "use logit_bias"),
    ("bad_words", "use logit_bias"),
    ("best_of", "ask for n choices"),
    ("use_beam_search", "beam search is not built"),
    ("length_penalty", "beam search is not built"),
    ("early_stopping", "beam search is not built"),
    ("suffix", "the model does not fill in"),
    ("include_stop_str_in_output", "stop strings are never part of the answer"),
    ("prompt_logprobs", "use echo with logprobs on /v1/completions"),
    ("return_tokens_as_token_ids", "tokens are given as text and bytes"),
    ("return_token_ids", "tokens are given as text; see /tokenize"),
    ("spaces_between_special_tokens", "it cannot be turned off"),
    ("kv_transfer_params", "prefill and decode are not split"),
    ("lora_request", "adapters are not built"),
    ("logits_processor_args", "code of a request is not run"),
    ("thinking_token_budget", "the model has no such setting"),
    ("mirostat", "use temperature, top_p, top_k and min_p"),
    ("typical_p", "use temperature, top_p, top_k and min_p"),
    ("dry_multiplier", "use repetition_penalty"),
    ("xtc_probability", "use temperature, top_p, top_k and min_p"),
];

/// Whether `value` of the parameter `name` asks for nothing.
fn is_neutral(name: &str, value: &Value) -> bool {
    match (name, value) {
        ("spaces_between_special_tokens", v) => v == &Value::Bool(true),
        ("best_of", v) => integer(v) == Some(1),
        ("length_penalty", v) => v.as_f64() == Some(1.0),
        ("typical_p", v) => v.as_f64() == Some(1.0),
        ("mirostat" | "dry_multiplier" | "xtc_probability", v) => v.as_f64() == Some(0.0),
        ("suffix", Value::String(s)) => s.is_empty(),
        ("response_format", v) => v
            .as_object()
            .is_some_and(|o| o.len() == 1 && o.get("type").and_then(Value::as_str) == Some("text")),
        ("modalities", v) => {
            v.as_array().is_some_and(|a| a.len() == 1 && a.first().and_then(Value::as_str) == Some("text"))
        }
        ("tool_choice" | "function_call" | "reasoning_effort", Value::String(s)) => s == "none",
        (_, Value::Bool(b)) => !b,
        (_, Value::Array(items)) => items.is_empty(),
        _ => false,
    }
}

/// Finds the model a request names: `None` and the empty name mean the default one.
pub(crate) fn model(state: &AppState, fields: &mut Fields) -> ApiResult<ModelName> {
    let asked = fields.string("model")?.filter(|name| !name.is_empty());
    let asked = asked.unwrap_or_else(|| state.default_model().to_owned());
    let name = state.resolve(&asked).ok_or_else(|| unknown_model(&asked))?;
    match state.encoders().iter().find(|encoder| encoder.name() == name.served) {
        Some(encoder) => Err(wrong_task(&asked, task_name(encoder.task()), "generates text")),
        None => Ok(name),
    }
}

/// The 400 of a model that is asked for what it does not do.
pub(crate) fn wrong_task(name: &str, task: &str, wanted: &str) -> ApiError {
    let message =
        format!("The model '{}' has the task '{task}'; this route needs a model that {wanted}.", quote(name));
    ApiError::invalid("model", message)
}

/// The 404 of a model nobody serves.
pub(crate) fn unknown_model(name: &str) -> ApiError {
    ApiError::new(ErrorKind::ModelNotFound, format!("The model '{}' does not exist.", quote(name)))
        .with_param("model")
}

impl Common {
    /// Reads everything both routes know. `logprobs` is left to the caller: the two routes spell it differently.
    pub(crate) fn read(state: &AppState, record: &Record, fields: &mut Fields) -> ApiResult<Self> {
        let limits = state.limits();
        let name = model(state, fields)?;
        record.model(&name.asked, &name.served);
        let model = name.answer;
        record.give_time(
            fields.float("timeout", "of seconds above 0, up to 86400", |x| x > 0.0 && x <= 86_400.0)?,
        );
        for (name, why) in NOT_BUILT {
            if let Some(value) = fields.take(name)
                && !is_neutral(name, &value)
            {
                return Err(ApiError::invalid(*name, format!("'{name}' is not supported: {why}.")));
            }
        }
        fields.bool("parallel_tool_calls")?;
        fields.string("user")?;
        let stream = fields.bool("stream")?.unwrap_or(false);
        let (include_usage, continuous_usage) = stream_options(stream, fields)?;
        record.is_stream(stream);
        let n = fields.int("n", 1, limits.max_n as i128)?.unwrap_or(1);
        let sampling = sampling(limits, fields)?;
        let stop = stop_strings(state, fields)?;
        let priority = fields.int("priority", i32::MIN.into(), i32::MAX.into())?.unwrap_or(0);
        let cache_salt = cache_salt(record.tenant(), fields)?;
        let skip_special = fields.bool("skip_special_tokens")?.unwrap_or(true);
        let truncate_prompt = fields.int("truncate_prompt_tokens", -1, limits.max_model_len as i128)?;
        let truncate_prompt = match truncate_prompt {
            Some(0) => {
                return Err(ApiError::invalid(
                    "truncate_prompt_tokens",
                    "'truncate_prompt_tokens' must be -1 or at least 1.",
                ));
            }
            Some(-1) => Some(limits.max_model_len.saturating_sub(1)),
            Some(k) => usize::try_from(k as i64).ok(),
            None => None,
        };
        Ok(Self {
            model,
            sampling,
            n,
            stop,
            stream,
            include_usage,
            continuous_usage,
            priority,
            cache_salt,
            skip_special,
            truncate_prompt,
        })
    }
}

fn stream_options(stream: bool, fields: &mut Fields) -> ApiResult<(bool, bool)> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok((false, false)) };
    if !stream {
        return Err(ApiError::invalid(
            "stream_options",
            "'stream_options' is only allowed when 'stream' is true.",
        ));
    }
    let continuous = options.bool("continuous_usage_stats")?.unwrap_or(false);
    let include = options.bool("include_usage")?.unwrap_or(false);
    options.bool("include_obfuscation")?;
    // Usage in every chunk without the chunk at the end would leave a client without the final count.
    Ok((include || continuous, continuous))
}

fn sampling(limits: &Limits, fields: &mut Fields) -> ApiResult<SamplingParams> {
    let default = SamplingParams::default();
    let within_2 = |x: f64| (-2.0..=2.0).contains(&x);
    Ok(SamplingParams {
        temperature: fields
            .float("temperature", "from 0 to 2", |x| (0.0..=2.0).contains(&x))?
            .unwrap_or(default.temperature),
        // A float so small that `f32` makes it 0 would be no set at all.
        top_p: fields
            .float("top_p", "above 0, up to 1", |x| x > 0.0 && x <= 1.0)?
            .map_or(default.top_p, |p| p.max(f32::MIN_POSITIVE)),
        top_k: top_k(fields)?,
        min_p: fields.float("min_p", "from 0 to 1", |x| (0.0..=1.0).contains(&x))?.unwrap_or(default.min_p),
        repetition_penalty: fields
            .float("repetition_penalty", "from 0.01 to 10", |x| (0.01..=10.0).contains(&x))?
            .unwrap_or(default.repetition_penalty),
        presence_penalty: fields.float("presence_penalty", "from -2 to 2", within_2)?.unwrap_or(0.0),
        frequency_penalty: fields.float("frequency_penalty", "from -2 to 2", within_2)?.unwrap_or(0.0),
        logit_bias: logit_bias(limits, fields)?,
        seed: fields.int("seed", i64::MIN.into(), i64::MAX.into())?,
        logprobs: None,
        min_tokens: fields.int("min_tokens", 0, limits.max_model_len as i128)?.unwrap_or(0),
        stop_token_ids: fields
            .token_ids("stop_token_ids", limits.vocab_size, limits.max_token_list)?
            .unwrap_or_default(),
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
    })
}

/// `-1` and `0` both mean all tokens.
fn top_k(fields: &mut Fields) -> ApiResult<u32> {
    let k: i64 = fields.int("top_k", -1, i64::from(u32::MAX).into())?.unwrap_or(0);
    Ok(u32::try_from(k).unwrap_or(0))
}

fn logit_bias(limits: &Limits, fields: &mut Fields) -> ApiResult<Vec<(u32, f32)>> {
    const NAME: &str = "logit_bias";
    let Some(value) = fields.take(NAME) else { return Ok(Vec::new()) };
    let Value::Object(map) = value else {
        return Err(ApiError::invalid(NAME, "'logit_bias' must be an object of token ids and numbers."));
    };
    if map.len() > limits.max_token_list {
        let message =
            format!("'logit_bias' has {} entries; {} are allowed.", map.len(), limits.max_token_list);
        return Err(ApiError::invalid(NAME, message));
    }
    let mut list = Vec::with_capacity(map.len());
    for (key, bias) in &map {
        let id = key.parse::<u32>().ok().filter(|id| (*id as usize) < limits.vocab_size);
        let Some(id) = id else {
            return Err(ApiError::invalid(
                NAME,
                format!("'logit_bias' has the key '{}', which is no token id.", quote(key)),
            ));
        };
        match bias.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => list.push((id, bias as f32)),
            _ => {
                return Err(ApiError::invalid(
                    NAME,
                    format!("The bias of token {id} must be a number from -100 to 100."),
                ));
            }
        }
    }
    // "7" and "07" are one token: what it would get is not clear.
    list.sort_unstable_by_key(|(id, _)| *id);
    if list.windows(2).any(|pair| matches!(pair, [a, b] if a.0 == b.0)) {
        return Err(ApiError::invalid(NAME, "'logit_bias' names a token twice."));
    }
    Ok(list)
}

fn stop_strings(state: &AppState, fields: &mut Fields) -> ApiResult<Vec<String>> {
    const NAME: &str = "stop";
    let max = state.config().max_stop;
    let list = match fields.take(NAME) {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![Value::String(stop)],
        Some(Value::Array(list)) => list,
        Some(_) => return Err(ApiError::invalid(NAME, "'stop' must be a string or an array of strings.")),
    };
    if list.len() > max {
        return Err(ApiError::invalid(
            NAME,
            format!("'stop' has {} strings; {max} are allowed.", list.len()),
        ));
    }
    let legal = |stop| match stop {
        Value::String(s) if (1..=MAX_STOP_BYTES).contains(&s.len()) => Ok(s),
        _ => Err(ApiError::invalid(NAME, format!("Each stop string must have 1 to {MAX_STOP_BYTES} bytes."))),
    };
    list.into_iter().map(legal).collect()
}

/// One salt of tenant and request. Without key and salt it is zeros: everybody shares.
fn cache_salt(tenant: Tenant, fields: &mut Fields) -> ApiResult<[u8; 32]> {
    const NAME: &str = "cache_salt";
    let Some(salt) = fields.string(NAME)? else { return Ok(tenant.0) };
    if !(1..=MAX_SALT_BYTES).contains(&salt.len()) {
        return Err(ApiError::invalid(NAME, format!("'cache_salt' must have 1 to {MAX_SALT_BYTES} bytes.")));
    }
    Ok(Sha256::new().chain_update(tenant.0).chain_update(salt.as_bytes()).finalize().into())
}
