//! A second oracle for the Llama forward pass: candle-transformers' own, which shares no code with ours.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use common::{Driver, distance, fixture, load, prompts};

fn check(name: &str) {
    let folder = fixture(name);
    let device = Device::Cpu;
    let config = std::fs::read(folder.join("config.json")).expect("config.json");
    let config: LlamaConfig = serde_json::from_slice(&config).expect("a Llama config");
    let config = config.into_config(false);
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &device).expect("weights");
    let oracle =
        Llama::load(VarBuilder::from_tensors(tensors, DType::F32, &device), &config).expect("a Llama");
    let model = load(name, None);

    for prompt in prompts(name) {
        let mut cache = Cache::new(true, DType::F32, &config, &device).expect("a cache");
        let input =
            Tensor::new(prompt.input_ids.as_slice(), &device).and_then(|t| t.unsqueeze(0)).expect("ids");
        let want = oracle.forward(&input, 0, &mut cache).and_then(|t| t.squeeze(0)).expect("logits");
        let want: Vec<f32> = want.to_vec1().expect("f32 logits");

        let mut driver = Driver::new(&*model, 4, prompt.input_ids.len() + 4);
        let mut seq = driver.seq();
        let have = driver.step(&mut [(&mut seq, &prompt.input_ids)], false).remove(0);
        let off = distance(&have, &want);
        assert!(off <= 1e-4, "{name}: {off} off");
    }
}

// Only configs in the older spelling, which is the one candle-transformers reads.
#[test]
fn plain_rotation() {
    check("llama_tied");
}

#[test]
fn llama3_rotation() {
    check("llama_llama3");
}
