//! How much a model computes and reads for a token, from its config.json.

use std::path::Path;

use serde_json::Value;

/// Sizes that decide work and traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) hidden: u64,
    pub(crate) layers: u64,
    /// Width of all query heads together.
    pub(crate) query_width: u64,
    pub(crate) vocab: u64,
    pub(crate) tied: bool,
}

impl Shape {
    /// `None` if the config lacks a size.
    pub(crate) fn of(config: &Value) -> Option<Self> {
        let config = config.get("text_config").unwrap_or(config);
        let number = |name: &str| config[name].as_u64();
        let (hidden, heads) = (number("hidden_size")?, number("num_attention_heads")?);
        Some(Self {
            hidden,
            layers: number("num_hidden_layers")?,
            query_width: number("head_dim").unwrap_or(hidden / heads.max(1)) * heads,
            vocab: number("vocab_size")?,
            // What transformers takes for granted; Gemma ties unless it says otherwise.
            tied: config["tie_word_embeddings"].as_bool().unwrap_or_else(|| {
                config["model_type"].as_str().is_some_and(|kind| kind.starts_with("gemma"))
            }),
        })
    }

    /// That of the model folder `path`; `None` for a GGUF file.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        Self::of(&serde_json::from_slice(&std::fs::read(path.join("config.json")).ok()?).ok()?)
    }

    /// Parameters of one table of the vocabulary.
    fn table(&self) -> u64 {
        self.hidden * self.vocab
    }

    /// Share of the weights that a step reads: all but the input table, of which a token needs one row.
    pub(crate) fn read_share(&self, num_parameters: usize) -> f64 {
        let skipped = if self.tied { 0 } else { self.table() };
        1.0 - skipped as f64 / num_parameters.max(1) as f64
    }

    /// Operations of the matrix products of `tokens` tokens, of which `rows` get logits, and of attention over `pairs`
    /// pairs of a query and a key. Experts that are not chosen are counted too.
    pub(crate) fn flops(&self, num_parameters: usize, tokens: u64, rows: u64, pairs: f64) -> f64 {
        let tables = if self.tied { 1 } else { 2 } * self.table();
        let layers = (num_parameters as u64).saturating_sub(tables);
        2.0 * (layers as f64 * tokens as f64 + self.table() as f64 * rows as f64)
            + 4.0 * (self.layers * self.query_width) as f64 * pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;

    #[test]
    fn smollm2_costs_what_its_shape_says() {
        let shape = Shape::of(&preset("smollm2-135m").unwrap()).unwrap();
        let parameters = 134_515_008;
        assert_eq!(shape.read_share(parameters), 1.0);
        // 106 M parameters in the layers and 28 M in the table.
        let decode = shape.flops(parameters, 1, 1, 0.0);
        assert_eq!(decode, 2.0 * parameters as f64);
        let prefill = shape.flops(parameters, 512, 1, 512.0 * 513.0 / 2.0);
        assert!((prefill / 512.0 / 0.230e9 - 1.0).abs() < 0.03, "{}", prefill / 512.0);
        let untied = Shape::of(&preset("llama-3.1-8b").unwrap()).unwrap();
        assert!((untied.read_share(8_030_261_248) - 0.9346).abs() < 1e-3);
    }
}
