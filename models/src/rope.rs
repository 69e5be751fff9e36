//! Rotary position embeddings: the scalings of `rope_parameters`, and the tables of one step.
//!
//! A rotation here is a function of the position alone, never of how a prompt was cut into steps or of batch mates.
//! Two scalings of transformers depend on the length of the call instead; how they are settled is said at
//! [`RopeKind::Dynamic`] and [`RopeKind::LongRope`].

use std::f64::consts::PI;

use candle_core::{Device, Tensor};
use ingle_kernels::RopeTables;

use crate::error::Result;
use crate::json::ConfigJson;

/// One rotation as the config describes it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RopeConfig {
    theta: f64,
    /// Leading part of each head that is rotated; even.
    rotary_dim: usize,
    kind: RopeKind,
}

#[derive(Debug, Clone, PartialEq)]
enum RopeKind {
    Default,
    Linear {
        factor: f64,
    },
    /// Positions up to `max_position` are rotated as by default. A later one gets the frequencies of a sequence that
    /// ends with it, as transformers gives a token that it decodes; it does not turn with later tokens.
    Dynamic {
        factor: f64,
        max_position: usize,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original: f64,
    },
    Yarn {
        factor: f64,
        attention_factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original: f64,
        truncate: bool,
    },
    /// The short factors serve models run with sequences of at most `original` tokens, the long ones all others: chosen
    /// once at load, so that keys in the cache never mix the two.
    LongRope {
        short: Vec<f32>,
        long: Vec<f32>,
        attention_factor: f64,
        original: usize,
    },
}

/// What a rotation needs to know of the rest of the config.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RopeContext {
    pub(crate) head_dim: usize,
    pub(crate) max_position: usize,
    pub(crate) default_theta: f64,
}

impl RopeConfig {
    /// The model's one rotation: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.
    pub(crate) fn read(json: &ConfigJson<'_>, context: RopeContext) -> Result<Self> {
        let parameters = match json.object("rope_scaling")? {
            Some(scaling) => Some(scaling),
            None => json.object("rope_parameters")?,
        };
        if parameters
            .is_some_and(|p| p.get("full_attention").is_some() || p.get("sliding_attention").is_some())
        {
            return Err(json.invalid("rope_parameters by layer type are not supported for this architecture"));
        }
        Self::read_from(json, parameters, context)
    }

    /// A rotation from its own object; what that lacks is looked up in `json`.
    pub(crate) fn read_from(
        json: &ConfigJson<'_>,
        parameters: Option<ConfigJson<'_>>,
        context: RopeContext,
    ) -> Result<Self> {
        let inner = parameters.unwrap_or(*json);
        let positive = |key: &str| match inner.positive(key)? {
            None => json.positive(key),
            found => Ok(found),
        };
        let theta = positive("rope_theta")?.unwrap_or(context.default_theta);
        if theta <= 1.0 {
            return Err(json.invalid(format!("rope_theta must be above 1, not {theta}")));
        }
        let partial = positive("partial_rotary_factor")?.unwrap_or(1.0);
        let rotary_dim = (context.head_dim as f64 * partial) as usize;
        if rotary_dim == 0 || rotary_dim % 2 == 1 || rotary_dim > context.head_dim {
            let head_dim = context.head_dim;
            return Err(json
                .invalid(format!("{rotary_dim} of {head_dim} head dimensions cannot be rotated in pairs")));
        }
        let kind = match parameters {
            None => RopeKind::Default,
            Some(parameters) => read_kind(json, &parameters, rotary_dim, context.max_position)?,
        };
        Ok(Self { theta, rotary_dim, kind })
    }
}

fn read_kind(
    json: &ConfigJson<'_>,
    parameters: &ConfigJson<'_>,
    rotary_dim: usize,
    max_position: usize,
) -> Result<RopeKind> {
    let name = match parameters.string("rope_type")? {
        Some(name) => name,
        None => parameters.string("type")?.unwrap_or("default"),
    };
    let required = |key: &str| {
        let value = parameters.positive(key)?;
        value.ok_or_else(|| json.invalid(format!("rope type {name:?} needs {key}")))
    };
    // Phi-3 says it beside the rotation, and that wins.
    let original = match json.opt_size("original_max_position_embeddings", MAX_POSITION)? {
        Some(n) => Some(n),
        None => parameters.opt_size("original_max_position_embeddings", MAX_POSITION)?,
    };
    let original = original.unwrap_or(max_position);
    Ok(match name {
        "default" => RopeKind::Default,
        "linear" => RopeKind::Linear { factor: required("factor")? },
        "dynamic" if rotary_dim < 4 => return Err(json.invalid("dynamic rope needs at least 4 dimensions")),
        "dynamic" => RopeKind::Dynamic { factor: required("factor")?, max_position },
        "llama3" => {
            let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
            if high <= low {
                return Err(
                    json.invalid(format!("high_freq_factor {high} must exceed low_freq_factor {low}"))
                );
            }
            RopeKind::Llama3 {
                factor: required("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original: original as f64,
            }
        }
        "yarn" => {
            let implied = max_position as f64 / original as f64;
            let factor = parameters.positive("factor")?.unwrap_or(implied);
            let mscale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
            let attention_factor = match parameters.positive("attention_factor")? {
                Some(given) => given,
                None => match (parameters.positive("mscale")?, parameters.positive("mscale_all_dim")?) {
                    (Some(a), Some(b)) => mscale(a) / mscale(b),
                    _ => mscale(1.0),
                },
            };
            RopeKind::Yarn {
                factor,
                attention_factor,
                beta_fast: parameters.positive("beta_fast")?.unwrap_or(32.0),
                beta_slow: parameters.positive("beta_slow")?.unwrap_or(1.0),
                original: original as f64,
                truncate: parameters.bool("truncate", true)?,
            }
        }
        // "su" is the name the first Phi-3 checkpoints gave it.
        "longrope" | "su" => {
            let factors = |key: &str| {
                let list = parameters.factors(key)?.unwrap_or_default();
                if list.len() == rotary_dim / 2 {
                    return Ok(list);
                }
                let (have, want) = (list.len(), rotary_dim / 2);
                Err(json.invalid(format!("{key} must have {want} numbers, it has {have}")))
            };
            let implied = max_position as f64 / original as f64;
            let factor = parameters.positive("factor")?.unwrap_or(implied);
            let attention_factor = match parameters.positive("attention_factor")? {
                Some(given) => given,
                None if factor <= 1.0 || original < 2 => 1.0,
                None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
            };
            RopeKind::LongRope {
                short: factors("short_factor")?,
                long: factors("long_factor")?,
                attention_factor,
                original,
            }
        }
        other => {
            return Err(json.invalid(format!(
                "rope type {other:?} is not supported; known are: default, dynamic, linear, llama3, longrope, yarn"
            )));
        }
    })
}

/// Longest context a config may claim.
pub(crate) const MAX_POSITION: usize = 1 << 28;

/// A rotation ready to make tables.
#[derive(Debug)]
pub(crate) struct Rope {
    inv_freq: Vec<f32>,
    /// Factor on cosine and sine.
    factor: f32,
    dynamic: Option<DynamicRope>,
}

#[derive(Debug)]
struct DynamicRope {
    theta: f64,
    factor: f64,
    max_position: usize,
}

impl Rope {
    /// `max_len`: the longest sequence that the model will be run with.
    pub(crate) fn new(config: &RopeConfig, max_len: usize) -> Self {
        let plain = frequencies(config.theta, config.rotary_dim);
        let (inv_freq, factor) = match &config.kind {
            RopeKind::Default | RopeKind::Dynamic { .. } => (plain, 1.0),
            RopeKind::Linear { factor } => (plain.iter().map(|f| f / *factor as f32).collect(), 1.0),
            RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let scale = |f: &f32| {
                    let wavelength = 2.0 * PI / f64::from(*f);
                    let smooth =
                        (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    if wavelength < original / high_freq_factor {
                        *f
                    } else if wavelength > original / low_freq_factor {
                        (f64::from(*f) / factor) as f32
                    } else {
                        ((1.0 - smooth) * f64::from(*f) / factor + smooth * f64::from(*f)) as f32
                    }
                };
                (plain.iter().map(scale).collect(), 1.0)
            }
            RopeKind::Yarn { factor, attention_factor, beta_fast, beta_slow, original, truncate } => {
                let range = yarn_range(config, (*beta_fast, *beta_slow), *original, *truncate);
                let scale = |(i, f): (usize, &f32)| {
                    // 0: the frequency stays; 1: it is divided by the factor.
                    let ramp = ((i as f64 - range.0) / (range.1 - range.0)).clamp(0.0, 1.0);
                    (f64::from(*f) / factor * ramp + f64::from(*f) * (1.0 - ramp)) as f32
                };
                (plain.iter().enumerate().map(scale).collect(), *attention_factor)
            }
            RopeKind::LongRope { short, long, attention_factor, original } => {
                let factors = if max_len > *original { long } else { short };
                (plain.iter().zip(factors).map(|(f, by)| f / by).collect(), *attention_factor)
            }
        };
        let dynamic = match config.kind {
            RopeKind::Dynamic { factor, max_position } => {
                Some(DynamicRope { theta: config.theta, factor, max_position })
            }
            _ => None,
        };
        Self { inv_freq, factor: factor as f32, dynamic }
    }

    /// Cosines and sines of the tokens of one step.
    pub(crate) fn tables(&self, positions: &[u32], device: &Device) -> Result<RopeTables> {
        match &self.dynamic {
            Some(dynamic) if positions.iter().any(|p| *p as usize >= dynamic.max_position) => {
                self.dynamic_tables(dynamic, positions, device)
            }
            _ => Ok(RopeTables::new(positions, &self.inv_freq, self.factor, device)?),
        }
    }

    /// Cosines and sines of positions `0..len`, made once for all steps.
    pub(crate) fn tables_by_position(&self, len: usize, device: &Device) -> Result<RopeTables> {
        let positions: Vec<u32> = (0..u32::try_from(len).unwrap_or(u32::MAX)).collect();
        Ok(RopeTables { by_position: true, ..self.tables(&positions, device)? })
    }

    /// As [`Rope::tables`], with frequencies of its own for each position past the trained length.
    fn dynamic_tables(
        &self,
        dynamic: &DynamicRope,
        positions: &[u32],
        device: &Device,
    ) -> Result<RopeTables> {
        let half = self.inv_freq.len();
        let dim = (2 * half) as f64;
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for &position in positions {
            let len = (position as usize + 1).max(dynamic.max_position) as f64;
            let stretch = dynamic.factor * len / dynamic.max_position as f64 - (dynamic.factor - 1.0);
            let stretched = frequencies(dynamic.theta * stretch.powf(dim / (dim - 2.0)), 2 * half);
            for freq in stretched {
                let (s, c) = (position as f32 * freq).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
        let shape = (positions.len(), half);
        Ok(RopeTables {
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
            by_position: false,
        })
    }
}

/// `theta^(-2i / dim)`, the exponent rounded to f32 as in transformers.
fn frequencies(theta: f64, dim: usize) -> Vec<f32> {
    let frequency = |i: usize| 1.0 / theta.powf(f64::from((2 * i) as f32 / dim as f32)) as f32;
    (0..dim / 2).map(frequency).collect()
}

/// Between which frequencies yarn blends: those that turn `beta.0` and `beta.1` times over the original context.
fn yarn_range(config: &RopeConfig, beta: (f64, f64), original: f64, truncate: bool) -> (f64, f64) {
    let dim = config.rotary_dim as f64;
    let turns = |n: f64| dim * (original / (n * 2.0 * PI)).ln() / (2.0 * config.theta.ln());
    let (mut low, mut high) = (turns(beta.0), turns(beta.1));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    // Equal ends would divide by zero.
    if low == high { (low, high + 0.001) } else { (low, high) }
}
