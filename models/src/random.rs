//! Models of made-up weights, in memory: how fast a shape is does not depend on what its weights are.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use serde_json::{Map, Value};

use crate::causal_lm::{CausalLm, LoadOptions};
use crate::error::{Result, invalid};
use crate::load::load_parts;
use crate::source::TensorSource;

/// What a made-up tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fill {
    /// Small numbers around zero, the same for all tensors of a shape.
    Random,
    /// Ones.
    Ones,
    /// Zeros.
    Zeros,
}

/// A tensor to come, bf16.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MadeUp {
    /// As transformers names it.
    pub name: String,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// What it holds.
    pub fill: Fill,
}

/// Makes up a model of the shape that `config`, the text of a config.json, says, from `tensors`.
///
/// # Errors
/// As [`crate::load_causal_lm`], as if the tensors had been read from files.
pub fn made_up_causal_lm(
    config: &str,
    tensors: Vec<MadeUp>,
    seed: u64,
    options: &LoadOptions,
) -> Result<Box<dyn CausalLm>> {
    let path = Path::new("made-up weights");
    let config: Map<String, Value> =
        serde_json::from_str(config).map_err(|error| invalid(path, error.to_string()))?;
    let tensors = tensors.into_iter().map(|tensor| (tensor.name, (tensor.shape, tensor.fill))).collect();
    let source = MadeUpSource { tensors, seed, made: Mutex::default() };
    let open = || -> Result<Box<dyn TensorSource>> { Ok(Box::new(source)) };
    Ok(Box::new(load_parts((path, &config), (path, &Map::new()), open, options, None)?))
}

/// Shape and content.
type Kind = (Vec<usize>, Fill);

struct MadeUpSource {
    tensors: BTreeMap<String, Kind>,
    seed: u64,
    /// One tensor a shape: a model has few shapes and many layers.
    made: Mutex<HashMap<Kind, Tensor>>,
}

impl TensorSource for MadeUpSource {
    fn path(&self) -> &Path {
        Path::new("made-up weights")
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|(shape, _)| shape.as_slice())
    }

    fn dtype(&self, _: &str) -> Result<Option<DType>> {
        Ok(Some(DType::BF16))
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let key = self.tensors.get(name);
        let key = key.ok_or_else(|| invalid(self.path(), format!("has no tensor {name:?}")))?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tensor) = made.get(key) {
            return Ok(tensor.clone());
        }
        let count = key.0.iter().product();
        let values = match key.1 {
            Fill::Random => numbers(self.seed ^ made.len() as u64, count),
            Fill::Ones => vec![bf16::ONE; count],
            Fill::Zeros => vec![bf16::ZERO; count],
        };
        let tensor = Tensor::from_vec(values, key.0.as_slice(), &Device::Cpu)?;
        made.insert(key.clone(), tensor.clone());
        Ok(tensor)
    }
}

/// Numbers after which a tensor repeats itself: more of them would only take longer to make.
const PERIOD: usize = (1 << 20) + 7;

/// Even numbers from -0.035 to 0.035, whose deviation is the 0.02 that models are usually initialised with.
fn numbers(seed: u64, count: usize) -> Vec<bf16> {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    let mut values = Vec::with_capacity(count);
    while values.len() < count.min(PERIOD) {
        // xorshift: good enough for numbers that are only multiplied.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let four = [state, state >> 16, state >> 32, state >> 48];
        let left = count.min(PERIOD) - values.len();
        values.extend(
            four.iter()
                .take(left)
                .map(|word| bf16::from_f32(f32::from(*word as u16 as i16) * (0.035 / 32768.0))),
        );
    }
    while values.len() < count {
        values.extend_from_within(..PERIOD.min(count - values.len()));
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_small_even_and_repeatable() {
        assert_eq!(numbers(1, 1001), numbers(1, 1001));
        assert_ne!(numbers(1, 1001), numbers(2, 1001));
        let long = numbers(3, 2 * PERIOD + 5);
        assert!(long.len() == 2 * PERIOD + 5 && long[..5] == long[2 * PERIOD..]);
        let values: Vec<f64> = numbers(7, 100_001).into_iter().map(|x| f64::from(x.to_f32())).collect();
        assert_eq!(values.len(), 100_001);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let spread = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        assert!(mean.abs() < 1e-3 && (spread - 0.02).abs() < 1e-3, "{mean}, {spread}");
    }
}
