//! How products of many tokens are cut for a library.

/// Tokens from which unpacking a panel of codes costs less than the library is faster.
pub const PANEL_TOKENS: usize = 256;

/// Elements of a panel, about.
const PANEL: usize = 1 << 26;
/// Rows of a panel are whole tiles of any library's kernel.
const PANEL_ROWS: usize = 128;
/// As many as a launch has blocks for in its second dimension.
const MOST_PANEL_ROWS: usize = 1 << 19;

/// Rows of a matrix `[rows, cols]` that are unpacked at a time.
#[must_use]
pub fn panel_rows(rows: usize, cols: usize) -> usize {
    let of_panel = PANEL / cols.max(1) / PANEL_ROWS * PANEL_ROWS;
    of_panel.clamp(PANEL_ROWS, MOST_PANEL_ROWS).min(rows)
}

/// The most tokens that a library's kernel for `tokens` is chosen for: at most an eighth more, or 15 more.
#[must_use]
pub fn token_group(tokens: usize) -> usize {
    tokens.next_multiple_of((tokens.next_power_of_two() / 16).max(16))
}

#[cfg(test)]
mod tests {
    use super::{panel_rows, token_group};

    #[test]
    fn groups_hold_what_is_asked_of_them_and_little_more() {
        for tokens in 17..5000 {
            let most = token_group(tokens);
            assert!(most >= tokens && most - tokens < (tokens / 8).max(16), "{tokens} in {most}");
            assert_eq!(token_group(most), most, "the largest of a group is in it");
        }
        assert_eq!([17, 256, 257, 2048, 2049].map(token_group), [32, 256, 288, 2048, 2304]);
    }

    #[test]
    fn panels_are_whole_tiles_and_never_empty() {
        for (rows, cols, wanted) in [
            (4096, 4096, 4096),
            (28672, 4096, 16384),
            (100, 64, 100),
            (1 << 21, 64, 1 << 19),
            (8192, 28672, 2304),
            (300, 1 << 30, 128),
            (1, 1, 1),
        ] {
            assert_eq!(panel_rows(rows, cols), wanted, "[{rows}, {cols}]");
        }
    }
}
