//! How long an answer may be, and whether it fits.
//!
//! Prompt and `max_tokens` together must fit the context; a request for more is refused with both counts rather than
//! cut short without notice. A request that names no number gets what the context leaves, up to the configured default.

use super::{params::Common, validate::Fields};
use crate::{
    error::{ApiError, ApiResult, context_length},
    state::AppState,
};

/// Reads `max_tokens` and its other name `alias`, which counts if both are there.
pub(crate) fn max_tokens(fields: &mut Fields, alias: &str, min: u32) -> ApiResult<Option<u32>> {
    let high = i128::from(u32::MAX);
    let old = fields.int("max_tokens", min.into(), high)?;
    let new = fields.int(alias, min.into(), high)?;
    Ok(new.or(old))
}

/// Truncates the prompt if asked to, and finds the number of answer tokens. `param` is what the prompt came from.
pub(crate) fn fit(
    state: &AppState,
    common: &Common,
    mut prompt: Vec<u32>,
    max_tokens: Option<u32>,
    param: &str,
) -> ApiResult<(Vec<u32>, u32)> {
    let max_len = state.limits().max_model_len;
    if let Some(keep) = common.truncate_prompt {
        // With -1 the answer's tokens are left room for, too.
        let keep = if keep.saturating_add(1) >= max_len {
            max_len.saturating_sub(max_tokens.unwrap_or(1).max(1) as usize).max(1)
        } else {
            keep
        };
        prompt.drain(..prompt.len().saturating_sub(keep));
    }
    if prompt.is_empty() {
        return Err(ApiError::invalid(param, "The prompt is empty."));
    }
    let left = max_len.saturating_sub(prompt.len());
    let wanted = match max_tokens {
        Some(wanted) if wanted as usize > left => {
            return Err(context_length(prompt.len(), wanted as usize, max_len).with_param(param));
        }
        Some(wanted) => wanted,
        None if left == 0 => return Err(context_length(prompt.len(), 1, max_len).with_param(param)),
        None => {
            let default = state.config().default_max_tokens.max(1) as usize;
            u32::try_from(default.min(left)).unwrap_or(u32::MAX)
        }
    };
    if common.sampling.min_tokens > wanted {
        let message =
            format!("'min_tokens' is {}, more than 'max_tokens', {wanted}.", common.sampling.min_tokens);
        return Err(ApiError::invalid("min_tokens", message));
    }
    Ok((prompt, wanted))
}
