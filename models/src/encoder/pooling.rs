//! From a vector for each token to one for each sequence.

use super::PoolingMode;

/// Pools `hidden` `[num_tokens, width]` to `[num_seqs, modes * width]`. Sums run over the tokens in order.
pub(crate) fn pool(hidden: &[f32], width: usize, cu_seqlens: &[u32], modes: &[PoolingMode]) -> Vec<f32> {
    let mut pooled = Vec::with_capacity(cu_seqlens.len().saturating_sub(1) * modes.len() * width);
    for pair in cu_seqlens.windows(2) {
        let rows = &hidden[pair[0] as usize * width..pair[1] as usize * width];
        for mode in modes {
            let start = pooled.len();
            pool_rows(rows, width, *mode, &mut pooled);
            debug_assert_eq!(pooled.len(), start + width);
        }
    }
    pooled
}

fn pool_rows(rows: &[f32], width: usize, mode: PoolingMode, pooled: &mut Vec<f32>) {
    let len = rows.len() / width;
    let start = pooled.len();
    let weighted = |pooled: &mut Vec<f32>, weight: fn(usize) -> f32, divisor: f32| {
        pooled.resize(start + width, 0.0);
        let sums = &mut pooled[start..];
        for (at, row) in rows.chunks_exact(width).enumerate() {
            let weight = weight(at);
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
        }
        sums.iter_mut().for_each(|sum| *sum /= divisor);
    };
    match mode {
        PoolingMode::Cls => pooled.extend_from_slice(&rows[..width]),
        PoolingMode::Last => pooled.extend_from_slice(&rows[rows.len() - width..]),
        PoolingMode::Max => {
            pooled.extend_from_slice(&rows[..width]);
            for row in rows.chunks_exact(width).skip(1) {
                pooled[start..].iter_mut().zip(row).for_each(|(max, x)| *max = max.max(*x));
            }
        }
        PoolingMode::Mean => weighted(pooled, |_| 1.0, len as f32),
        PoolingMode::MeanSqrtLen => weighted(pooled, |_| 1.0, (len as f32).sqrt()),
        PoolingMode::WeightedMean => {
            // 1 + 2 + .. + len, in f32 as the weights are.
            let sum = (len as f64 * (len as f64 + 1.0) / 2.0) as f32;
            weighted(pooled, |at| (at + 1) as f32, sum);
        }
    }
}

/// Scales each row of `width` to length 1; a row of zeros stays.
pub fn normalize(rows: &mut [f32], width: usize) {
    for row in rows.chunks_exact_mut(width) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
        row.iter_mut().for_each(|x| *x /= norm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_does_what_it_says() {
        let hidden = [1.0, -2.0, 3.0, 5.0, 2.0, 0.0, 7.0, 7.0];
        let pooled = |mode| pool(&hidden, 2, &[0, 3, 4], &[mode]);
        assert_eq!(pooled(PoolingMode::Cls), [1.0, -2.0, 7.0, 7.0]);
        assert_eq!(pooled(PoolingMode::Last), [2.0, 0.0, 7.0, 7.0]);
        assert_eq!(pooled(PoolingMode::Max), [3.0, 5.0, 7.0, 7.0]);
        assert_eq!(pooled(PoolingMode::Mean), [2.0, 1.0, 7.0, 7.0]);
        let root = 3.0_f32.sqrt();
        assert_eq!(pooled(PoolingMode::MeanSqrtLen), [6.0 / root, 3.0 / root, 7.0, 7.0]);
        assert_eq!(pooled(PoolingMode::WeightedMean), [13.0 / 6.0, 8.0 / 6.0, 7.0, 7.0]);
        let both = pool(&hidden, 2, &[0, 4], &[PoolingMode::Cls, PoolingMode::Last]);
        assert_eq!(both, [1.0, -2.0, 7.0, 7.0]);
    }

    #[test]
    fn lengths_become_one_and_zeros_stay() {
        let mut rows = [3.0, 4.0, 0.0, 0.0];
        normalize(&mut rows, 2);
        assert_eq!(rows, [0.6, 0.8, 0.0, 0.0]);
    }
}
