//! A mixture of experts.
//!
//! 1. Score each token against all experts and choose its best few, in f32 on the host.
//! 2. Gather the tokens of each expert and run it once on all of them.
//! 3. Sum, for each token, its experts' outputs by their weights, in the order of the experts.
//!
//! A token's choice, order and sums involve no other token, so its result does not depend on batch mates.

use candle_core::{DType, Tensor};

use crate::config::MoeConfig;
use crate::error::Result;
use crate::linear::Linear;
use crate::mlp::Mlp;

/// The experts of one layer.
#[derive(Debug)]
pub(crate) struct Moe {
    pub(crate) router: Linear,
    pub(crate) experts: Vec<Mlp>,
    pub(crate) config: MoeConfig,
}

impl Moe {
    /// `[num_tokens, hidden] -> [num_tokens, hidden]`
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let scores = self.router.forward(x)?.to_dtype(DType::F32)?.to_vec2::<f32>()?; // [T, experts]
        let choices: Vec<_> = scores.iter().map(|row| route(row, &self.config)).collect();

        // Rows of the outputs, expert after expert; `rows[choice][token]` is where a token's output lies.
        let top_k = self.config.top_k;
        let mut outputs = Vec::new();
        let mut rows = vec![vec![0u32; choices.len()]; top_k];
        let mut weights = vec![vec![0f32; choices.len()]; top_k];
        let mut num_rows = 0;
        for (idx, expert) in self.experts.iter().enumerate() {
            let mut tokens = Vec::new();
            for (token, chosen) in choices.iter().enumerate() {
                if let Some(choice) = chosen.iter().position(|(expert, _)| *expert == idx) {
                    rows[choice][token] = num_rows;
                    weights[choice][token] = chosen[choice].1;
                    num_rows += 1;
                    tokens.push(token as u32);
                }
            }
            if !tokens.is_empty() {
                let tokens = Tensor::new(tokens, x.device())?;
                outputs.push(expert.forward(&x.index_select(&tokens, 0)?)?);
            }
        }
        let outputs = Tensor::cat(&outputs, 0)?; // [T * top_k, hidden]

        let mut sum: Option<Tensor> = None;
        for (rows, weights) in rows.into_iter().zip(weights) {
            let rows = Tensor::new(rows, x.device())?;
            let weights = Tensor::new(weights, x.device())?.to_dtype(x.dtype())?.unsqueeze(1)?; // [T, 1]
            let part = outputs.index_select(&rows, 0)?.broadcast_mul(&weights)?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        // top_k is at least 1, so there is a sum.
        Ok(sum.unwrap_or(x.zeros_like()?))
    }
}

/// The experts of one token with their weights, ascending by expert: softmax over all, then the best `top_k`, ties to
/// the lower index.
fn route(scores: &[f32], config: &MoeConfig) -> Vec<(usize, f32)> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    let mut chosen: Vec<_> = exp.iter().map(|e| e / sum).enumerate().collect();
    // `total_cmp` orders NaN too, so a broken token still routes somewhere; its logits are NaN and end its request.
    chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    chosen.truncate(config.top_k);
    if config.normalise {
        let sum: f32 = chosen.iter().map(|(_, weight)| weight).sum();
        chosen.iter_mut().for_each(|(_, weight)| *weight /= sum);
    }
    chosen.sort_by_key(|(expert, _)| *expert);
    chosen
}

#[cfg(test)]
mod tests {
    use super::route;
    use crate::config::{ExpertNaming, MoeConfig};

    fn config(top_k: usize, normalise: bool) -> MoeConfig {
        MoeConfig { num_experts: 4, top_k, intermediate_size: 1, normalise, naming: ExpertNaming::Qwen }
    }

    #[test]
    fn the_best_experts_are_chosen_by_softmax() {
        let scores = [0.0, 3f32.ln(), 0.0, 5f32.ln()];
        let near = |have: Vec<(usize, f32)>, want: &[(usize, f32)]| {
            assert_eq!(have.len(), want.len());
            for (have, want) in have.iter().zip(want) {
                assert!(have.0 == want.0 && (have.1 - want.1).abs() < 1e-6, "{have:?} is not {want:?}");
            }
        };
        near(route(&scores, &config(2, false)), &[(1, 0.3), (3, 0.5)]);
        near(route(&scores, &config(2, true)), &[(1, 0.375), (3, 0.625)]);
        near(route(&scores, &config(3, false)), &[(0, 0.1), (1, 0.3), (3, 0.5)]);
    }

    #[test]
    fn nan_scores_route_somewhere() {
        assert_eq!(route(&[f32::NAN; 4], &config(2, true)).len(), 2);
    }
}
