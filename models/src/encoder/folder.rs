//! What a sentence-transformers folder says beside its transformer: modules.json, the settings of each module, prompts.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::PoolingMode;
use super::head::DenseActivation;
use crate::error::{Result, invalid};
use crate::json::{ConfigJson, read_file, read_object};
use crate::rope::MAX_POSITION;

const MAX_MODULES_BYTES: u64 = 1 << 20;
const MAX_MODULES: usize = 64;
const MAX_DENSE_WIDTH: usize = 1 << 16;

/// Names that Transformer's settings have had.
const TRANSFORMER_SETTINGS: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

/// What a folder is made of.
#[derive(Debug)]
pub(crate) struct Pipeline {
    /// Folder of the transformer.
    pub(crate) transformer: PathBuf,
    /// `None`: no module pools.
    pub(crate) pooling: Option<Pooled>,
    pub(crate) steps: Vec<StepSpec>,
}

/// The pooling module.
#[derive(Debug)]
pub(crate) struct Pooled {
    /// Where it is configured, for messages.
    pub(crate) path: PathBuf,
    pub(crate) modes: Vec<PoolingMode>,
    /// Width of the tokens' vectors as the module expects them.
    pub(crate) width: Option<usize>,
}

/// What is done to pooled vectors.
#[derive(Debug)]
pub(crate) enum StepSpec {
    Dense(DenseSpec),
    Normalize,
}

/// A dense layer in a folder of its own.
#[derive(Debug)]
pub(crate) struct DenseSpec {
    pub(crate) folder: PathBuf,
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    pub(crate) bias: bool,
    pub(crate) activation: DenseActivation,
}

/// Settings of the tokenising side.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    pub(crate) max_seq_len: Option<usize>,
    pub(crate) lower_case: bool,
    pub(crate) prompts: BTreeMap<String, String>,
    pub(crate) default_prompt: Option<String>,
    /// What makes scores of a classifier's logits.
    pub(crate) score: Option<DenseActivation>,
}

impl Pipeline {
    /// `None` if `folder` has no modules.json: a plain transformer.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("modules.json");
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = read_file(&path, MAX_MODULES_BYTES)?;
        let parsed = serde_json::from_slice(&bytes);
        let modules = match parsed {
            Ok(Value::Array(modules)) => modules,
            Ok(_) => return Err(invalid(&path, "is not a JSON list of modules")),
            Err(error) => return Err(invalid(&path, format!("is not valid JSON: {error}"))),
        };
        if modules.len() > MAX_MODULES {
            let have = modules.len();
            return Err(invalid(&path, format!("has {have} modules; at most {MAX_MODULES} are accepted")));
        }
        let (mut transformer, mut pooling, mut steps) = (None, None, Vec::new());
        for (idx, module) in modules.iter().enumerate() {
            let Value::Object(module) = module else {
                return Err(invalid(&path, format!("module {idx} is not an object")));
            };
            let module = ConfigJson::new(&path, module);
            let kind = module.string("type")?.unwrap_or_default();
            let dir = module_folder(folder, &path, module.string("path")?.unwrap_or_default())?;
            let early = |what: &str| invalid(&path, format!("module {idx} ({what}) comes before a Pooling"));
            match kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" if idx == 0 => transformer = Some(dir),
                "Pooling" if transformer.is_some() && pooling.is_none() => {
                    pooling = Some(read_pooling(&dir)?);
                }
                "Dense" if pooling.is_none() => return Err(early("Dense")),
                "Normalize" if pooling.is_none() => return Err(early("Normalize")),
                "Dense" => steps.push(StepSpec::Dense(read_dense(dir)?)),
                "Normalize" => steps.push(StepSpec::Normalize),
                // Of use in training only.
                "Dropout" => {}
                "Transformer" | "Pooling" => {
                    return Err(invalid(&path, format!("module {idx} ({kind}) is out of place")));
                }
                _ => {
                    return Err(invalid(
                        &path,
                        format!(
                            "module {idx} has type {kind:?}, which is not supported; known are: Transformer, \
                             Pooling, Dense, Normalize, Dropout"
                        ),
                    ));
                }
            }
        }
        let transformer = transformer.ok_or_else(|| invalid(&path, "names no Transformer"))?;
        Ok(Some(Self { transformer, pooling, steps }))
    }
}

impl Settings {
    /// From the folder of the model and that of its transformer.
    pub(crate) fn read(folder: &Path, transformer: &Path) -> Result<Self> {
        let mut settings = Self::default();
        if let Some(path) =
            TRANSFORMER_SETTINGS.iter().map(|name| transformer.join(name)).find(|path| path.is_file())
        {
            let object = read_object(&path)?;
            let json = ConfigJson::new(&path, &object);
            settings.max_seq_len = json.opt_size("max_seq_length", MAX_POSITION)?;
            settings.lower_case = json.bool("do_lower_case", false)?;
        }
        if settings.max_seq_len.is_none() {
            settings.max_seq_len = tokenizer_length(transformer)?;
        }
        let path = folder.join("config_sentence_transformers.json");
        if path.is_file() {
            let object = read_object(&path)?;
            let json = ConfigJson::new(&path, &object);
            if let Some(prompts) = json.object("prompts")? {
                for name in prompts.keys() {
                    if let Some(text) = prompts.string(name)? {
                        settings.prompts.insert(name.to_owned(), text.to_owned());
                    }
                }
            }
            let score = json.string("activation_fn")?;
            settings.score = score.map(|class| torch_activation(&json, class)).transpose()?;
            if let Some(name) = json.string("default_prompt_name")? {
                if !settings.prompts.contains_key(name) {
                    return Err(json.invalid(format!("default_prompt_name {name:?} is none of the prompts")));
                }
                settings.default_prompt = Some(name.to_owned());
            }
        }
        Ok(settings)
    }
}

/// `model_max_length` of tokenizer_config.json. Tokenizers without a limit write a huge number there.
fn tokenizer_length(transformer: &Path) -> Result<Option<usize>> {
    let path = transformer.join("tokenizer_config.json");
    if !path.is_file() {
        return Ok(None);
    }
    let object: Map<String, Value> = read_object(&path)?;
    let length = object.get("model_max_length").and_then(Value::as_f64);
    Ok(length.filter(|n| (1.0..MAX_POSITION as f64).contains(n)).map(|n| n as usize))
}

/// The folder of a module, which must lie in the model's own.
fn module_folder(folder: &Path, file: &Path, path: &str) -> Result<PathBuf> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || path.contains(['\\', '\0']) {
        return Err(invalid(file, format!("module path {path:?} leads out of the folder")));
    }
    Ok(folder.join(path))
}

fn read_pooling(dir: &Path) -> Result<Pooled> {
    let path = dir.join("config.json");
    let object = read_object(&path)?;
    let json = ConfigJson::new(&path, &object);
    if !json.bool("include_prompt", true)? {
        return Err(json.invalid("include_prompt is false; pooling without the prompt is not supported"));
    }
    let width = match json.opt_size("word_embedding_dimension", MAX_DENSE_WIDTH)? {
        Some(width) => Some(width),
        None => json.opt_size("embedding_dimension", MAX_DENSE_WIDTH)?,
    };
    let modes = match json.get("pooling_mode") {
        Some(Value::Array(names)) => names.iter().map(|name| mode(&json, name)).collect::<Result<_>>()?,
        Some(name) => vec![mode(&json, name)?],
        None => {
            // In the order in which their vectors lie.
            let flags = [
                ("pooling_mode_cls_token", PoolingMode::Cls),
                ("pooling_mode_max_tokens", PoolingMode::Max),
                ("pooling_mode_mean_tokens", PoolingMode::Mean),
                ("pooling_mode_mean_sqrt_len_tokens", PoolingMode::MeanSqrtLen),
                ("pooling_mode_weightedmean_tokens", PoolingMode::WeightedMean),
                ("pooling_mode_lasttoken", PoolingMode::Last),
            ];
            let mut modes = Vec::new();
            for (key, mode) in flags {
                if json.bool(key, false)? {
                    modes.push(mode);
                }
            }
            if modes.is_empty() { vec![PoolingMode::Mean] } else { modes }
        }
    };
    if modes.is_empty() || modes.len() > 6 {
        return Err(json.invalid(format!("pooling_mode names {} modes", modes.len())));
    }
    Ok(Pooled { modes, width, path })
}

fn mode(json: &ConfigJson<'_>, name: &Value) -> Result<PoolingMode> {
    match name.as_str() {
        Some("cls") => Ok(PoolingMode::Cls),
        Some("max") => Ok(PoolingMode::Max),
        Some("mean") => Ok(PoolingMode::Mean),
        Some("mean_sqrt_len_tokens") => Ok(PoolingMode::MeanSqrtLen),
        Some("weightedmean") => Ok(PoolingMode::WeightedMean),
        Some("lasttoken") => Ok(PoolingMode::Last),
        _ => Err(json.invalid(format!(
            "pooling_mode {name} is not supported; known are: cls, max, mean, mean_sqrt_len_tokens, weightedmean, \
             lasttoken"
        ))),
    }
}

fn read_dense(folder: PathBuf) -> Result<DenseSpec> {
    let path = folder.join("config.json");
    let object = read_object(&path)?;
    let json = ConfigJson::new(&path, &object);
    for (key, usual) in
        [("module_input_name", "sentence_embedding"), ("module_output_name", "sentence_embedding")]
    {
        if json.string(key)?.is_some_and(|name| name != usual) {
            return Err(json.invalid(format!("{key} must be {usual:?}: other modules are not computed")));
        }
    }
    let activation = json.string("activation_function")?.unwrap_or("torch.nn.modules.activation.Tanh");
    Ok(DenseSpec {
        in_features: json.size("in_features", MAX_DENSE_WIDTH)?,
        out_features: json.size("out_features", MAX_DENSE_WIDTH)?,
        bias: json.bool("bias", true)?,
        activation: torch_activation(&json, activation)?,
        folder,
    })
}

/// The activation that torch has under this class name.
pub(crate) fn torch_activation(json: &ConfigJson<'_>, class: &str) -> Result<DenseActivation> {
    use ingle_kernels::Activation;
    match class.rsplit('.').next().unwrap_or_default() {
        "Identity" => Ok(DenseActivation::Identity),
        "Tanh" => Ok(DenseActivation::Tanh),
        "Sigmoid" => Ok(DenseActivation::Sigmoid),
        "ReLU" => Ok(DenseActivation::Mlp(Activation::Relu)),
        "GELU" => Ok(DenseActivation::Mlp(Activation::Gelu)),
        "SiLU" => Ok(DenseActivation::Mlp(Activation::Silu)),
        _ => Err(json.invalid(format!(
            "activation {class:?} is not supported; known are: GELU, Identity, ReLU, Sigmoid, SiLU, Tanh"
        ))),
    }
}
