//! `quantization_config` of a config.json.

use serde_json::Value;

use crate::error::Result;
use crate::json::ConfigJson;

/// How the projections of a checkpoint were quantised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scheme {
    Gptq(Gptq),
    Awq(Awq),
    Fp8(Fp8),
}

/// Codes packed along the input features, a zero and a scale for each output feature and group of input features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gptq {
    /// 4 or 8.
    pub(crate) bits: u32,
    /// Input features that share a scale; `None`: all.
    pub(crate) group_size: Option<usize>,
    /// All zeros are the middle code.
    pub(crate) symmetric: bool,
    /// Zeros are stored minus one, as the format's first version does.
    pub(crate) zeros_minus_one: bool,
}

/// Codes of four bits packed along the output features in an order of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Awq {
    /// Input features that share a scale; `None`: all.
    pub(crate) group_size: Option<usize>,
}

/// Weights of the type E4M3 with a scale for each tensor, row or block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fp8 {
    /// Rows and columns of a block, if the checkpoint scales by blocks.
    pub(crate) block: Option<(usize, usize)>,
    /// The checkpoint has scales for activations too.
    pub(crate) activation_scales: bool,
}

/// Columns that share a scale in the kernels' blocks.
pub(crate) const GROUP_STEP: usize = 32;
const MAX_GROUP: i64 = 1 << 22;
const MAX_BLOCK: u64 = 1 << 20;

impl Scheme {
    /// What the config says of quantised weights; `None`: nothing, so there are none.
    pub(crate) fn read(json: &ConfigJson<'_>) -> Result<Option<Self>> {
        let config = match json.object("quantization_config")? {
            Some(config) => config,
            // The first name of compressed-tensors' own.
            None => match json.object("compression_config")? {
                Some(config) => config,
                None => return Ok(None),
            },
        };
        let method = config.string("quant_method")?;
        match method {
            Some("gptq") => Gptq::read(&config).map(Self::Gptq).map(Some),
            Some("awq") => Awq::read(&config).map(Self::Awq).map(Some),
            Some("fp8") => Fp8::read(&config).map(Self::Fp8).map(Some),
            Some("compressed-tensors") => Fp8::read_compressed(&config).map(Self::Fp8).map(Some),
            _ => Err(config.invalid(format!(
                "weights quantised by {:?} are not supported; known are: awq, compressed-tensors (FP8 weights), fp8, gptq",
                method.unwrap_or("an unnamed method")
            ))),
        }
    }
}

impl Gptq {
    fn read(config: &ConfigJson<'_>) -> Result<Self> {
        let bits = config.size("bits", 64)?;
        if !matches!(bits, 4 | 8) {
            return Err(config.invalid(format!("GPTQ of {bits} bits is not supported; 4 and 8 are")));
        }
        if config.get("dynamic").is_some_and(|value| value.as_object().is_none_or(|map| !map.is_empty())) {
            return Err(config.invalid(
                "GPTQ with bits or groups of their own for some modules (dynamic) is not supported",
            ));
        }
        let zeros_minus_one = match config.string("checkpoint_format")? {
            None | Some("gptq") => true,
            Some("gptq_v2") => false,
            Some(other) => {
                return Err(config.invalid(format!(
                    "GPTQ's checkpoint_format {other:?} is not supported; gptq and gptq_v2 are"
                )));
            }
        };
        // Whether columns were really reordered is seen in g_idx.
        config.bool("desc_act", false)?;
        Ok(Self {
            bits: bits as u32,
            group_size: group_size(config, &["group_size"])?,
            symmetric: config.bool("sym", true)?,
            zeros_minus_one,
        })
    }
}

impl Awq {
    fn read(config: &ConfigJson<'_>) -> Result<Self> {
        let bits = match config.opt_size("bits", 64)? {
            Some(bits) => bits,
            None => config.size("w_bit", 64)?,
        };
        if bits != 4 {
            return Err(config.invalid(format!("AWQ of {bits} bits is not supported; 4 are")));
        }
        let version = config.string("version")?.unwrap_or("gemm");
        if !version.eq_ignore_ascii_case("gemm") {
            return Err(config.invalid(format!("AWQ's version {version:?} is not supported; gemm is")));
        }
        if !config.bool("zero_point", true)? {
            return Err(config.invalid("AWQ without zero points (zero_point: false) is not supported"));
        }
        Ok(Self { group_size: group_size(config, &["group_size", "q_group_size"])? })
    }
}

impl Fp8 {
    fn read(config: &ConfigJson<'_>) -> Result<Self> {
        let format = config.string("fmt")?.unwrap_or("e4m3");
        if format != "e4m3" {
            return Err(config.invalid(format!("FP8 of the type {format:?} is not supported; e4m3 is")));
        }
        let activations = config.string("activation_scheme")?.unwrap_or("dynamic");
        if !matches!(activations, "dynamic" | "static") {
            return Err(config.invalid(format!(
                "activation_scheme {activations:?} is not supported; dynamic and static are"
            )));
        }
        let block = config.get("weight_block_size").map(|value| block_size(config, value)).transpose()?;
        Ok(Self { block, activation_scales: activations == "static" })
    }

    fn read_compressed(config: &ConfigJson<'_>) -> Result<Self> {
        let format = config.string("format")?.unwrap_or("unnamed");
        if !matches!(format, "float-quantized" | "naive-quantized") {
            return Err(config.invalid(format!(
                "compressed-tensors of the format {format:?} is not supported; float-quantized is"
            )));
        }
        if let Some(sparsity) = config.object("sparsity_config")?
            && !matches!(sparsity.string("format")?, None | Some("dense"))
        {
            return Err(config.invalid("compressed-tensors with sparse weights is not supported"));
        }
        let groups = config.object("config_groups")?;
        let groups = groups.filter(|groups| !groups.is_empty());
        let groups = groups.ok_or_else(|| config.invalid("compressed-tensors without config_groups"))?;
        let mut scheme = Self { block: None, activation_scales: false };
        for name in groups.keys() {
            let Some(group) = groups.object(name)? else { continue };
            let Some(weights) = group.object("weights")? else { continue };
            let (bits, kind) = (weights.size("num_bits", 64)?, weights.string("type")?.unwrap_or("int"));
            if (bits, kind) != (8, "float") {
                return Err(config.invalid(format!(
                    "compressed-tensors with weights of {bits} bits of the type {kind:?} is not supported; 8 bits of float are"
                )));
            }
            if !weights.bool("symmetric", true)? {
                return Err(config.invalid("compressed-tensors with asymmetric FP8 weights is not supported"));
            }
            match weights.string("strategy")? {
                None | Some("tensor" | "channel") => {}
                Some("block") => {
                    let structure = weights.get("block_structure");
                    let structure = structure.ok_or_else(|| config.invalid("block_structure is missing"))?;
                    let block = block_size(config, structure)?;
                    if scheme.block.is_some_and(|other| other != block) {
                        return Err(config.invalid("blocks of several sizes are not supported"));
                    }
                    scheme.block = Some(block);
                }
                Some(other) => {
                    return Err(config.invalid(format!(
                        "compressed-tensors with scales by {other:?} is not supported; tensor, channel and block are"
                    )));
                }
            }
            if let Some(activations) = group.object("input_activations")? {
                scheme.activation_scales |= !activations.bool("dynamic", false)?;
            }
        }
        Ok(scheme)
    }
}

/// The first of `keys` that is there: a multiple of 32, or -1 for all input features.
fn group_size(config: &ConfigJson<'_>, keys: &[&str]) -> Result<Option<usize>> {
    let value = keys.iter().find_map(|key| config.get(key));
    let value = value.ok_or_else(|| config.invalid(format!("{} is missing", keys[0])))?;
    match value.as_i64() {
        Some(-1) => Ok(None),
        Some(size @ 1..=MAX_GROUP) if (size as usize).is_multiple_of(GROUP_STEP) => Ok(Some(size as usize)),
        _ => Err(config.invalid(format!(
            "{} must be -1 or a multiple of {GROUP_STEP} up to {MAX_GROUP}, not {value}",
            keys[0]
        ))),
    }
}

/// `[128, 128]`, or `"128x128"`.
fn block_size(config: &ConfigJson<'_>, value: &Value) -> Result<(usize, usize)> {
    let sizes: Vec<Option<u64>> = match value {
        Value::Array(sizes) => sizes.iter().map(Value::as_u64).collect(),
        Value::String(text) => text.split('x').map(|part| part.parse().ok()).collect(),
        _ => Vec::new(),
    };
    match sizes.as_slice() {
        [Some(rows @ 1..=MAX_BLOCK), Some(cols @ 1..=MAX_BLOCK)] => Ok((*rows as usize, *cols as usize)),
        _ => Err(config.invalid(format!("blocks must have two sizes from 1 to {MAX_BLOCK}, not {value}"))),
    }
}
