//! Architecture name -> family.
//!
//! # How to add a family
//!
//! 1. Write `families/NAME.rs` with `configure(json) -> Result<DecoderConfig>`: start from
//!    [`DecoderConfig::read`] with the family's [`crate::config::Defaults`], then set what differs. If the decoder lacks
//!    a difference, give [`DecoderConfig`] a field for it and the decoder one branch; no family has a forward pass.
//! 2. Declare the file in `families/mod.rs` and add its line to [`FAMILIES`], sorted by name.
//! 3. Describe a tiny model of it in `scripts/make_fixtures.py`, run that script with its name, and add the name to
//!    `models/tests/parity.rs`, which compares with what transformers computed.

use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::families::{
    gemma, granite, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe, smollm3,
};
use crate::json::ConfigJson;

type Configure = fn(&ConfigJson<'_>) -> Result<DecoderConfig>;

/// All families, by the name that `architectures` of config.json gives.
const FAMILIES: &[(&str, Configure)] = &[
    ("Gemma2ForCausalLM", gemma::configure_gemma2),
    ("Gemma3ForCausalLM", gemma::configure_gemma3),
    ("GraniteForCausalLM", granite::configure),
    ("LlamaForCausalLM", llama::configure),
    ("MistralForCausalLM", mistral::configure),
    ("MixtralForCausalLM", mixtral::configure),
    ("Olmo2ForCausalLM", olmo2::configure),
    ("Phi3ForCausalLM", phi3::configure),
    ("Qwen2ForCausalLM", qwen2::configure),
    ("Qwen3ForCausalLM", qwen3::configure),
    ("Qwen3MoeForCausalLM", qwen3_moe::configure),
    ("SmolLM3ForCausalLM", smollm3::configure),
];

/// The validated decoder that a config.json describes.
pub(crate) fn decoder_config(json: &ConfigJson<'_>) -> Result<DecoderConfig> {
    let architectures = json.list("architectures")?.unwrap_or_default();
    let names: Vec<&str> = architectures.iter().filter_map(serde_json::Value::as_str).collect();
    let Some((name, _)) = FAMILIES.iter().find(|(name, _)| names.contains(name)) else {
        return Err(match names.first() {
            None => json.invalid("architectures is missing, so the model's kind is unknown"),
            Some(name) => Error::UnknownArchitecture { name: (*name).to_owned(), known: known() },
        });
    };
    decoder_config_of(json, name)
}

/// As [`decoder_config`] for a family that was found otherwise, by its name in [`FAMILIES`].
pub(crate) fn decoder_config_of(json: &ConfigJson<'_>, name: &str) -> Result<DecoderConfig> {
    let Some((name, configure)) = FAMILIES.iter().find(|(known, _)| *known == name) else {
        return Err(Error::UnknownArchitecture { name: name.to_owned(), known: known() });
    };
    let mut config = configure(json)?;
    config.architecture = (*name).to_owned();
    config.validate(json)?;
    Ok(config)
}

/// Whether a family has this name.
pub(crate) fn is_known(name: &str) -> bool {
    FAMILIES.iter().any(|(known, _)| *known == name)
}

pub(crate) fn known() -> String {
    FAMILIES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::FAMILIES;

    #[test]
    fn families_are_sorted_and_named_once() {
        assert!(FAMILIES.is_sorted_by(|a, b| a.0 < b.0));
    }
}
