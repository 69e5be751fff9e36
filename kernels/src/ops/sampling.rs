//! From rows of logits to tokens.
//!
//! The order is: banned tokens, logit bias, penalties, temperature, `min_p`, `top_k`, `top_p`, draw. Everything a row
//! needs comes with it, the random number too, so a row does not depend on its neighbours and only token ids leave the
//! device that computed the logits.

mod device;
mod edits;
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{DType, Tensor};

use crate::error::{Result, argument};
#[doc(hidden)]
pub use device::{DeviceRows, MAX_VOCAB, scan_parts};
#[doc(hidden)]
pub use edits::{Edit, edits_of};
pub use reference::sample_row;

/// How the token after one row of logits is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleRow<'a> {
    /// Divides the logits; `None`: the likeliest token, the lowest id of equal ones.
    pub temperature: Option<f32>,
    /// Draw from this many of the likeliest tokens; 0: from all.
    pub top_k: u32,
    /// Draw from the likeliest tokens that hold this share together; 1: from all.
    pub top_p: f32,
    /// Only tokens at least this likely, as a share of the likeliest one's probability; 0: all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in `prompt` or `output`; 1: off.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens in `output`.
    pub presence_penalty: f32,
    /// Taken off the logits of tokens in `output`, once for each time they occur.
    pub frequency_penalty: f32,
    /// Tokens before the answer; read by the repetition penalty alone.
    pub prompt: &'a [u32],
    /// Tokens of the answer so far; read by the penalties alone.
    pub output: &'a [u32],
    /// Tokens that must not come, unless they are all there is.
    pub banned: &'a [u32],
    /// Added to the logits of these tokens.
    pub logit_bias: &'a [(u32, f32)],
    /// A random number in `[0, 1)`; not read if there is no temperature.
    pub uniform: f64,
}

impl Default for SampleRow<'_> {
    /// The likeliest token of the model's own logits.
    fn default() -> Self {
        Self {
            temperature: None,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            prompt: &[],
            output: &[],
            banned: &[],
            logit_bias: &[],
            uniform: 0.0,
        }
    }
}

impl SampleRow<'_> {
    fn check(&self) -> Result<()> {
        let positive = |x: f32| x > 0.0 && x.is_finite();
        let fits = self.temperature.is_none_or(positive)
            && self.top_p > 0.0
            && (0.0..=1.0).contains(&self.min_p)
            && positive(self.repetition_penalty)
            && self.presence_penalty.is_finite()
            && self.frequency_penalty.is_finite()
            && (0.0..1.0).contains(&self.uniform)
            && self.logit_bias.iter().all(|(_, bias)| bias.is_finite());
        if fits { Ok(()) } else { Err(argument("sample", format!("parameters out of range: {self:?}"))) }
    }
}

/// Tokens that were chosen, one for each row of logits: on the device at once, and on their way to the host.
#[derive(Debug)]
pub struct ChosenTokens {
    ids: Tensor,
    #[cfg(feature = "cuda")]
    download: Option<crate::cuda::transfer::Download>,
}

/// The id of a row that chose nothing.
const NONE: u32 = u32::MAX;

impl ChosenTokens {
    /// The ids on the device of the logits, `[rows]` u32; `u32::MAX` where a row holds NaN or infinity.
    #[must_use]
    pub fn ids(&self) -> &Tensor {
        &self.ids
    }

    /// The ids, `None` where a row holds NaN or infinity. Waits until they have been chosen, on a CUDA device for nothing
    /// that was given to it later.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn wait(&self) -> Result<Vec<Option<u32>>> {
        #[cfg(feature = "cuda")]
        if let Some(download) = &self.download {
            return Ok(download.wait()?.into_iter().map(some).collect());
        }
        Ok(self.ids.to_vec1::<u32>()?.into_iter().map(some).collect())
    }
}

fn some(id: u32) -> Option<u32> {
    (id != NONE).then_some(id)
}

/// Chooses a token for each row of `logits [rows.len(), vocab]`; `None` where the row holds NaN or infinity.
///
/// As [`choose`] and [`ChosenTokens::wait`].
///
/// # Errors
/// As those.
pub fn sample(logits: &Tensor, rows: &[SampleRow<'_>]) -> Result<Vec<Option<u32>>> {
    choose(logits, rows)?.wait()
}

/// Chooses a token for each row of `logits [rows.len(), vocab]`; on a CUDA device the work is only begun.
///
/// There only the ids come back; elsewhere the logits are read as f32 and [`sample_row`] chooses. Both give the
/// same tokens, but where a random number falls within rounding (some 1e-7) of the border between two; and on CUDA devices a
/// token of less than 2^-46 of the likeliest one's probability is never drawn.
///
/// # Errors
/// If the numbers of rows differ, a parameter is out of its range, or the device fails.
pub fn choose(logits: &Tensor, rows: &[SampleRow<'_>]) -> Result<ChosenTokens> {
    let (count, vocab) = logits.dims2()?;
    if count != rows.len() || vocab == 0 {
        return Err(argument("sample", format!("{count} rows of {vocab} logits for {}", rows.len())));
    }
    rows.iter().try_for_each(SampleRow::check)?;
    #[cfg(feature = "cuda")]
    if !rows.is_empty() && crate::cuda::sampling::takes(logits) {
        let (ids, download) = crate::cuda::sampling::choose(logits, rows)?;
        return Ok(ChosenTokens { ids, download: Some(download) });
    }
    let mut values = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let chosen = values.chunks_exact_mut(vocab).zip(rows).map(|(logits, row)| sample_row(logits, row));
    let ids: Vec<u32> = chosen.map(|id| id.unwrap_or(NONE)).collect();
    Ok(ChosenTokens {
        ids: Tensor::new(ids, logits.device())?,
        #[cfg(feature = "cuda")]
        download: None,
    })
}
