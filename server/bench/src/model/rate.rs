//! Which of the machine's rates a model's weights are multiplied at.

use serde_json::{Map, Value};

/// Name and 10^9 operations a second of the multiply-adds that the set `isa` of the kernels uses for `weights`, of the
/// measured `rates`. A rate that was not measured (those of AMX tiles never are) is replaced by that of f32, and this by the
/// fastest there is.
pub(super) fn matrix_rate(isa: &str, weights: &str, rates: &Map<String, Value>) -> (String, f64) {
    let kinds: &[&str] = match (isa, weights) {
        // Byte dot products; sets without them widen to f32.
        ("amx" | "avx512-fp16" | "avx512-bf16" | "avx512-vnni" | "neon-dot", "int8" | "int4") => {
            &["int8", "f32"]
        }
        ("avx512-fp16", "bf16" | "f16") => &["f16", "f32"],
        ("amx" | "avx512-bf16", "bf16") => &["bf16", "f32"],
        _ => &["f32"],
    };
    let named = |kind: &&str| rates.iter().find(|(name, _)| name.split(' ').next() == Some(*kind));
    let speed = |value: &Value| value.as_f64().unwrap_or(0.0);
    let fastest = || rates.iter().max_by(|a, b| speed(a.1).total_cmp(&speed(b.1)));
    kinds
        .iter()
        .find_map(named)
        .or_else(fastest)
        .map_or_else(|| ("nothing".to_owned(), 0.0), |(name, value)| (name.clone(), speed(value)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn weights_are_held_against_the_instructions_that_multiply_them() {
        let all = json!({
            "f32 avx512-fma": 100.0, "bf16 avx512-dot": 190.0, "f16 avx512-fma": 200.0, "int8 avx512-vnni": 400.0,
        });
        let all = all.as_object().unwrap();
        for (isa, weights, wanted) in [
            ("avx512-fp16", "bf16", "f16 avx512-fma"),
            ("avx512-fp16", "f16", "f16 avx512-fma"),
            ("avx512-fp16", "f32", "f32 avx512-fma"),
            ("avx512-fp16", "int4", "int8 avx512-vnni"),
            ("avx512-bf16", "bf16", "bf16 avx512-dot"),
            ("avx512-bf16", "f16", "f32 avx512-fma"),
            ("avx512-bf16", "int8", "int8 avx512-vnni"),
            ("avx512-vnni", "bf16", "f32 avx512-fma"),
            ("avx512-vnni", "int8", "int8 avx512-vnni"),
            ("avx512", "int8", "f32 avx512-fma"),
            ("avx2", "bf16", "f32 avx512-fma"),
            ("amx", "bf16", "bf16 avx512-dot"),
            ("portable", "int8", "f32 avx512-fma"),
        ] {
            assert_eq!(matrix_rate(isa, weights, all).0, wanted, "{isa}, {weights}");
        }
        assert_eq!(matrix_rate("avx512-vnni", "bf16", all).1, 100.0);
    }

    #[test]
    fn a_rate_that_was_not_measured_is_replaced() {
        let rates = |value: Value| value.as_object().unwrap().clone();
        let few = rates(json!({"f32 portable": 5.0}));
        assert_eq!(matrix_rate("amx", "bf16", &few), ("f32 portable".to_owned(), 5.0));
        assert_eq!(matrix_rate("neon-dot", "int8", &few), ("f32 portable".to_owned(), 5.0));
        let device = rates(json!({"bf16 (cuBLAS)": 700.0}));
        assert_eq!(matrix_rate("avx512", "fp8", &device), ("bf16 (cuBLAS)".to_owned(), 700.0));
    }
}
