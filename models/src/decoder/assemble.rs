//! The layers of a decoder from what its layout names.

use ingle_kernels::AttnParams;

use super::{Attention, Layer, LayerMlp};
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::layout::{ExpertsSpec, LayerSpec, MlpSpec};
use crate::linear::Linear;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::moe::Moe;

pub(super) fn load_layer(
    config: &DecoderConfig,
    idx: usize,
    spec: &LayerSpec,
    loader: &mut Loader<'_>,
) -> Result<Layer> {
    let layer = config.layers[idx];
    Ok(Layer {
        attn_pre_norm: loader.opt_norm(spec.attn_pre_norm.as_ref())?,
        attention: Attention {
            qkv: loader.linear(&spec.qkv)?,
            q_norm: loader.opt_norm(spec.q_norm.as_ref())?,
            k_norm: loader.opt_norm(spec.k_norm.as_ref())?,
            o: loader.linear(&spec.o)?,
            rope: layer.rope,
            params: AttnParams {
                scale: config.attention_scale as f32,
                sliding_window: layer.sliding_window,
                softcap: config.attention_softcap.map(|cap| cap as f32),
            },
        },
        attn_post_norm: loader.opt_norm(spec.attn_post_norm.as_ref())?,
        mlp_pre_norm: loader.opt_norm(spec.mlp_pre_norm.as_ref())?,
        mlp: load_mlp(config, &spec.mlp, loader)?,
        mlp_post_norm: loader.opt_norm(spec.mlp_post_norm.as_ref())?,
    })
}

fn load_mlp(config: &DecoderConfig, spec: &MlpSpec, loader: &mut Loader<'_>) -> Result<LayerMlp> {
    let activation = config.activation;
    let (router, experts) = match (spec, config.moe) {
        (MlpSpec::Dense { gate_up, down }, _) => {
            let (gate_up, down) = (loader.linear(gate_up)?, loader.linear(down)?);
            return Ok(LayerMlp::Dense(Mlp { gate_up, down, activation }));
        }
        (MlpSpec::Moe { router, experts }, Some(moe)) => ((router, moe), experts),
        (MlpSpec::Moe { .. }, None) => unreachable!("a layout has experts only where the config has"),
    };
    // Small, and the choice of experts turns on small differences: never quantised.
    let (router, config) = (loader.exact_linear(router.0)?, router.1);
    let experts = match experts {
        ExpertsSpec::Separate(experts) => experts
            .iter()
            .map(|(gate_up, down)| {
                let (gate_up, down) = (loader.linear(gate_up)?, loader.linear(down)?);
                Ok(Mlp { gate_up, down, activation })
            })
            .collect::<Result<_>>()?,
        ExpertsSpec::Fused { gate_up, down } => {
            let (gate_up, down) = (loader.tensor(gate_up)?, loader.tensor(down)?); // [experts, rows, cols]
            (0..config.num_experts)
                .map(|idx| {
                    let gate_up = Linear { weight: loader.stack(&[gate_up.get(idx)?])?, bias: None };
                    let down = Linear { weight: loader.stack(&[down.get(idx)?])?, bias: None };
                    Ok(Mlp { gate_up, down, activation })
                })
                .collect::<Result<_>>()?
        }
    };
    Ok(LayerMlp::Moe(Moe { router, experts, config }))
}
