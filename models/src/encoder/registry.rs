//! Architecture name -> family of encoders.

use super::config::EncoderConfig;
use super::families::{bert, distilbert, modernbert, mpnet, nomic_bert, roberta};
use crate::error::{Error, Result};
use crate::json::ConfigJson;
use crate::registry as decoders;

type Configure = fn(&ConfigJson<'_>) -> Result<EncoderConfig>;

/// All families, by the name of the architecture without what the checkpoint's head was for: `BertModel`,
/// `BertForMaskedLM` and `BertForSequenceClassification` are all `Bert`.
const FAMILIES: &[(&str, Configure)] = &[
    ("Bert", bert::configure),
    ("Camembert", roberta::configure),
    ("DistilBert", distilbert::configure),
    ("MPNet", mpnet::configure),
    ("ModernBert", modernbert::configure),
    ("NomicBert", nomic_bert::configure),
    ("Roberta", roberta::configure),
    ("XLMRoberta", roberta::configure),
];

/// Ends of names: what a checkpoint's head was for. Only the classification head is of use here.
const HEADS: [&str; 5] =
    ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTextEncoding"];

/// What a config.json describes.
pub(crate) enum Described {
    /// A bidirectional encoder, and whether the checkpoint is a classifier.
    Encoder { config: Box<EncoderConfig>, classifies: bool },
    /// A generating family, whose name is given as the registry of decoders knows it.
    Decoder { architecture: String },
}

/// The first of the config's `architectures` that is known.
pub(crate) fn describe(json: &ConfigJson<'_>) -> Result<(String, Described)> {
    let architectures = json.list("architectures")?.unwrap_or_default();
    let names: Vec<&str> = architectures.iter().filter_map(serde_json::Value::as_str).collect();
    for name in &names {
        for head in HEADS {
            let Some(family) = name.strip_suffix(head) else { continue };
            let Some((_, configure)) = FAMILIES.iter().find(|(known, _)| *known == family) else { continue };
            let classifies = head == "ForSequenceClassification";
            let config = Box::new(configure(json)?);
            return Ok(((*name).to_owned(), Described::Encoder { config, classifies }));
        }
        if let Some(architecture) = decoder_name(name) {
            return Ok(((*name).to_owned(), Described::Decoder { architecture }));
        }
    }
    Err(match names.first() {
        None => json.invalid("architectures is missing, so the model's kind is unknown"),
        Some(name) => Error::UnknownArchitecture { name: (*name).to_owned(), known: known() },
    })
}

/// `Qwen3ForCausalLM` and `Qwen3Model` are one body.
fn decoder_name(name: &str) -> Option<String> {
    let body = name.strip_suffix("ForCausalLM").or_else(|| name.strip_suffix("Model"))?;
    let body = body.strip_suffix("Text").unwrap_or(body);
    let full = format!("{body}ForCausalLM");
    decoders::is_known(&full).then_some(full)
}

fn known() -> String {
    let encoders = FAMILIES.iter().map(|(name, _)| format!("{name}Model"));
    let classifiers = FAMILIES.iter().filter(|(name, _)| *name != "NomicBert");
    let classifiers = classifiers.map(|(name, _)| format!("{name}ForSequenceClassification"));
    let mut all: Vec<String> = encoders.chain(classifiers).collect();
    all.push(decoders::known());
    all.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_sorted_and_named_once() {
        assert!(FAMILIES.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn bodies_of_decoders_are_known_by_either_name() {
        assert_eq!(decoder_name("Qwen3Model").as_deref(), Some("Qwen3ForCausalLM"));
        assert_eq!(decoder_name("Gemma3TextModel").as_deref(), Some("Gemma3ForCausalLM"));
        assert_eq!(decoder_name("T5Model"), None);
    }
}
