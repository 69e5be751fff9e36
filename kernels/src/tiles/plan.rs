//! Which kernel of `cuda/linear.cuh` computes a product, and how it is launched.

/// Argument of the kernels, as `LinearArgs` in `cuda/linear.cuh`. Addresses are the device's; 0: absent.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct LinearArgs {
    /// `[tokens, cols]`, rows `x_stride` elements apart.
    pub x: u64,
    /// Tiles, or a row-major matrix.
    pub codes: u64,
    /// f16, in the order of the tiles.
    pub scales: u64,
    /// f16, in the order of the tiles.
    pub mins: u64,
    /// f32, one a row.
    pub row_scales: u64,
    /// f32, one a token, if activations are rounded to e4m3.
    pub token_scales: u64,
    /// `[rows]` in the type of `x`.
    pub bias: u64,
    /// `[tokens, rows]`, or half the columns if gated.
    pub y: u64,
    /// `[splits, tokens, rows]` f32, if the columns are split.
    pub partial: u64,
    /// Rows of `x`.
    pub tokens: u32,
    /// Output features.
    pub rows: u32,
    /// Input features.
    pub cols: u32,
    /// See `x`.
    pub x_stride: u32,
    /// Factor on all scales.
    pub unit: f32,
    /// One of the constants below.
    pub activation: u32,
    /// Sum of flags below.
    pub flags: u32,
}

impl LinearArgs {
    /// Outputs are the sums.
    pub const NOT_GATED: u32 = 4;
    /// Rows of `x` may be read sixteen bytes at a time.
    pub const WIDE_X: u32 = 1;
    /// Rows of a row-major matrix may be read sixteen bytes at a time.
    pub const WIDE_WEIGHTS: u32 = 2;
}

/// Most tokens of the kernel that reads activations straight from memory.
pub const SKINNY_TOKENS: usize = 16;

/// Tokens that one launch should have at most, so that what split columns leave stays small.
pub const MAX_TOKENS: usize = 512;

/// Weights and activations of e4m3 numbers.
pub const ROUNDED_FP8: &str = "fp8x8";

const TILE_ROWS: usize = 16;
const TILE_COLS: usize = 64;
const SKINNY_WARPS: usize = 8;
const TILED_WARPS: usize = 4;
const TILED_STAGES: usize = 4;

/// The size of a product.
#[derive(Debug, Clone, Copy)]
pub struct LinearShape {
    /// Rows of activations.
    pub tokens: usize,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The first half of the rows gates the second.
    pub gated: bool,
}

/// A launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearPlan {
    /// Of the kernel.
    pub name: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of shared memory that the launch gives.
    pub shared_bytes: u32,
    /// Parts of the columns; if more than one, `finish_linear` adds them.
    pub splits: u32,
}

impl LinearPlan {
    /// For activations `type_name` (`bf16`, `f16`) and weights `format`, on a device of `multiprocessors`.
    ///
    /// Activations that are rounded to e4m3 have the `format` [`ROUNDED_FP8`].
    ///
    /// With `one_order` the same kernel is taken however many tokens there are, so that a token's result has the same
    /// bits alone and among any others; without, few tokens have a kernel of their own.
    #[must_use]
    pub fn new(
        type_name: &str,
        format: &str,
        shape: LinearShape,
        multiprocessors: usize,
        one_order: bool,
    ) -> Self {
        let LinearShape { tokens, rows, cols, gated } = shape;
        let tile_rows = rows.div_ceil(TILE_ROWS);
        if tokens <= SKINNY_TOKENS && !one_order && format != ROUNDED_FP8 {
            let by_eight = if tokens <= 8 { 1 } else { 2 };
            // Two rows of tiles share what is read of the activations, but make half as many blocks.
            let pairs = gated || by_eight == 2 || (tokens > 4 && tile_rows >= 16 * multiprocessors);
            let group = if pairs { 2 } else { 1 };
            return Self {
                name: format!("linear_skinny_{type_name}_{format}_{by_eight}x{group}"),
                grid: [tile_rows.div_ceil(group) as u32, tokens.div_ceil(8 * by_eight) as u32, 1],
                block: 32 * SKINNY_WARPS as u32,
                shared_bytes: 0,
                splits: 1,
            };
        }
        let by_eight = if tokens <= 32 { 4 } else { 8 };
        let number_bytes = if format == ROUNDED_FP8 { 1 } else { 2 };
        let row_blocks = tile_rows.div_ceil(2 * TILED_WARPS);
        // From the matrix alone, not from the tokens: the order of summation follows from it. At least eight steps each.
        let steps = cols.div_ceil(TILE_COLS);
        let splits = (2 * multiprocessors / row_blocks.max(1)).clamp(1, (steps / 8).clamp(1, 8));
        Self {
            name: format!("linear_tiled_{type_name}_{format}_{by_eight}"),
            grid: [tokens.div_ceil(8 * by_eight) as u32, row_blocks as u32, splits as u32],
            block: 32 * TILED_WARPS as u32,
            shared_bytes: (TILED_STAGES * 8 * by_eight * TILE_COLS * number_bytes) as u32,
            splits: splits as u32,
        }
    }
}

/// Whether the kernels can gate `rows`: each half must be whole tiles.
#[must_use]
pub fn can_gate(rows: usize) -> bool {
    rows.is_multiple_of(2 * TILE_ROWS)
}
