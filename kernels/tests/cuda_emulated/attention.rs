//! Paged attention: parts of the context and their joining, ragged chunks, and what results must not depend on.

use super::harness::{
    Buffer, Format, Grid, SEEDS, assert_close, available, encoded, launch, random, rng, room,
};
use crate::args;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// As in cuda/attention.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct Attention {
    q: usize,
    k: usize,
    v: usize,
    out: usize,
    block_tables: usize,
    cu_blocks: usize,
    seq_lens: usize,
    cu_seqlens_q: usize,
    seqs: usize,
    cu_parts: usize,
    part_out: usize,
    part_stats: usize,
    bias: usize,
    q_stride: usize,
    k_stride: usize,
    v_stride: usize,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    num_seqs: u32,
    left: i32,
    right: i32,
    scale: f32,
    softcap: f32,
    bias_stride: u32,
    bias_reach: u32,
}

const SPLIT: usize = 128;

/// One attention and a cache with everything in it.
struct Case {
    format: Format,
    cache: Format,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    block_size: usize,
    window: Option<usize>,
    right: Option<usize>,
    softcap: f32,
    /// (queries, keys) of each sequence.
    seqs: Vec<(usize, usize)>,
    /// Keys are those of the step, without a cache.
    own_step: bool,
    /// Positions below the first of these, and its numbers by head and distance, with some to spare behind each head's.
    bias: Option<(usize, Vec<f32>)>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    num_slots: usize,
    tables: Vec<Vec<u32>>,
}

struct Shape {
    formats: (Format, Format),
    heads: (usize, usize),
    dim: usize,
}

impl Case {
    fn new(rng: &mut ChaCha8Rng, shape: &Shape, seqs: &[(usize, usize)]) -> Self {
        let ((format, cache), (heads, kv_heads), dim) = (shape.formats, shape.heads, shape.dim);
        let block_size = 16;
        // Blocks in any order; some stay unused and hold NaN.
        let blocks: usize = seqs.iter().map(|(_, len)| len.div_ceil(block_size)).sum::<usize>() + 3;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        let mut tables = Vec::new();
        for (_, len) in seqs {
            let table =
                (0..len.div_ceil(block_size)).map(|_| free.swap_remove(rng.random_range(0..free.len())));
            tables.push(table.collect::<Vec<_>>());
        }
        let num_slots = blocks * block_size;
        let (mut k, mut v) =
            (vec![f32::NAN; num_slots * kv_heads * dim], vec![f32::NAN; num_slots * kv_heads * dim]);
        for ((_, len), table) in seqs.iter().zip(&tables) {
            for pos in 0..*len {
                let at = (table[pos / block_size] as usize * block_size + pos % block_size) * kv_heads * dim;
                let mut fill = |to: &mut Vec<f32>| {
                    for (to, x) in to[at..].iter_mut().zip(random(rng, kv_heads * dim)) {
                        *to = cache.round(x * 2.0);
                    }
                };
                fill(&mut k);
                fill(&mut v);
            }
        }
        let tokens: usize = seqs.iter().map(|(queries, _)| queries).sum();
        let q = random(rng, tokens * heads * dim).into_iter().map(|x| format.round(x * 2.0)).collect();
        Self {
            format,
            cache,
            heads,
            kv_heads,
            dim,
            block_size,
            window: None,
            right: Some(0),
            softcap: 0.0,
            seqs: seqs.to_vec(),
            own_step: false,
            bias: None,
            q,
            k,
            v,
            num_slots,
            tables,
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// A case without a cache: each sequence brings all its tokens.
    fn of_the_step(rng: &mut ChaCha8Rng, shape: &Shape, lens: &[usize]) -> Self {
        let seqs: Vec<_> = lens.iter().map(|len| (*len, *len)).collect();
        let mut case = Self::new(rng, shape, &seqs);
        let tokens: usize = lens.iter().sum();
        let rows = tokens * case.kv_heads * case.dim;
        case.own_step = true;
        case.k = random(rng, rows).into_iter().map(|x| case.cache.round(x)).collect();
        case.v = random(rng, rows).into_iter().map(|x| case.cache.round(x)).collect();
        case.num_slots = tokens;
        case
    }

    /// Numbers of a head in the table of biases.
    fn bias_stride(reach: usize) -> usize {
        2 * reach - 1 + 5
    }

    /// The narrowest instance for these heads.
    fn width(&self) -> usize {
        let widths = [32, 64, 96, 128, 256].into_iter();
        let mut widths = widths.filter(|width| self.own_step || *width > 32);
        widths.find(|dim| *dim >= self.dim).expect("a width there is")
    }

    fn name(&self, kernel: &str) -> String {
        let dim = self.width();
        let fp8 = if self.cache == Format::Fp8 { "_fp8" } else { "" };
        format!("{kernel}_{}{fp8}_{dim}", self.format.name())
    }

    /// The formula, in f64.
    fn wanted(&self) -> Vec<f32> {
        let group = self.heads / self.kv_heads;
        let mut out = Vec::new();
        let mut token = 0;
        for ((queries, len), table) in self.seqs.iter().zip(&self.tables) {
            let first_token = token;
            for query in 0..*queries {
                let position = len - queries + query;
                for head in 0..self.heads {
                    let q = &self.q[(token * self.heads + head) * self.dim..][..self.dim];
                    let row = |pos: usize| {
                        let slot = if self.own_step {
                            first_token + pos
                        } else {
                            table[pos / self.block_size] as usize * self.block_size + pos % self.block_size
                        };
                        (slot * self.kv_heads + head / group) * self.dim
                    };
                    let seen = |pos: &usize| {
                        self.window.is_none_or(|window| pos + window > position)
                            && self.right.is_none_or(|right| *pos <= position + right)
                    };
                    let keys: Vec<usize> = (0..*len).filter(seen).collect();
                    let scores: Vec<f64> = keys
                        .iter()
                        .map(|pos| {
                            let k = &self.k[row(*pos)..][..self.dim];
                            let dot: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                            let bias = self.bias.as_ref().map_or(0.0, |(reach, values)| {
                                values[head * Self::bias_stride(*reach) + position + reach - 1 - pos]
                            });
                            let s = dot * f64::from(self.scale()) + f64::from(bias);
                            let cap = f64::from(self.softcap);
                            if cap > 0.0 { cap * (s / cap).tanh() } else { s }
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for feature in 0..self.dim {
                        let parts = keys.iter().zip(&weights);
                        let x: f64 = parts.map(|(pos, w)| w * f64::from(self.v[row(*pos) + feature])).sum();
                        out.push((x / sum) as f32);
                    }
                }
                token += 1;
            }
        }
        out
    }

    /// Runs the kernels of decode (`grid_x` blocks a sequence and group) or of prefill; sequences `which`.
    fn run(&self, which: &[usize], grid_x: Option<usize>, seed: u32) -> Vec<u8> {
        let tokens: usize = self.seqs.iter().map(|(queries, _)| queries).sum();
        // Queries are a slice of wider rows.
        let width = self.heads * self.dim + 8;
        let mut wide = vec![f32::NAN; tokens * width];
        for (to, from) in wide.chunks_exact_mut(width).zip(self.q.chunks_exact(self.heads * self.dim)) {
            to[..self.heads * self.dim].copy_from_slice(from);
        }
        let q = encoded(self.format, &wide);
        let (k, v) = (encoded(self.cache, &self.k), encoded(self.cache, &self.v));
        let sums = |counts: Vec<usize>| {
            let mut sums = vec![0_u32];
            counts.iter().for_each(|count| sums.push(sums[sums.len() - 1] + *count as u32));
            Buffer::new(&sums)
        };
        let blocks = Buffer::new(&self.tables.concat());
        let cu_blocks = sums(self.tables.iter().map(Vec::len).collect());
        let cu_seqlens_q = sums(self.seqs.iter().map(|(queries, _)| *queries).collect());
        let lens = Buffer::new(&self.seqs.iter().map(|(_, len)| *len as u32).collect::<Vec<_>>());
        let seqs = Buffer::new(&which.iter().map(|seq| *seq as u32).collect::<Vec<_>>());
        let parts = which.iter().map(|seq| self.seqs[*seq].1.div_ceil(SPLIT)).collect::<Vec<_>>();
        let num_parts: usize = parts.iter().sum();
        let cu_parts = sums(parts);
        let part_out = Buffer::<f32>::unwritten(num_parts * self.heads * self.dim);
        let part_stats = Buffer::<f32>::unwritten(num_parts * self.heads * 2);
        let out = room(self.format, tokens * self.heads * self.dim);
        let bias = self.bias.as_ref().map(|(_, values)| Buffer::new(values));
        let reach = self.bias.as_ref().map_or(0, |(reach, _)| *reach);
        let limit = |size: Option<usize>| size.map_or(i32::MAX / 2, |size| size as i32);
        let p = Attention {
            q: q.address(),
            k: k.address(),
            v: v.address(),
            out: out.address(),
            block_tables: if self.own_step { 0 } else { blocks.address() },
            cu_blocks: cu_blocks.address(),
            seq_lens: lens.address(),
            cu_seqlens_q: cu_seqlens_q.address(),
            seqs: seqs.address(),
            cu_parts: cu_parts.address(),
            part_out: part_out.address(),
            part_stats: part_stats.address(),
            bias: bias.as_ref().map_or(0, Buffer::address),
            q_stride: width,
            k_stride: self.kv_heads * self.dim,
            v_stride: self.kv_heads * self.dim,
            heads: self.heads as u32,
            kv_heads: self.kv_heads as u32,
            head_dim: self.dim as u32,
            block_size: self.block_size as u32,
            num_seqs: which.len() as u32,
            left: limit(self.window),
            right: limit(self.right),
            scale: self.scale(),
            softcap: self.softcap,
            bias_stride: if reach > 0 { Self::bias_stride(reach) as u32 } else { 0 },
            bias_reach: reach as u32,
        };
        let group = self.heads / self.kv_heads;
        match grid_x {
            Some(x) => {
                let y = self.kv_heads * group.div_ceil(16);
                let grid = [x as u32, y as u32, which.len() as u32];
                launch(&self.name("attention_decode"), Grid::new(grid, 128), seed, args![p]);
                let join = format!("attention_join_{}", self.format.name());
                launch(&join, Grid::new([self.heads as u32, which.len() as u32, 1], 128), seed, args![p]);
            }
            None => {
                let longest = which.iter().map(|seq| self.seqs[*seq].0).max().unwrap_or(0);
                let grid = [(longest * group).div_ceil(64) as u32, self.kv_heads as u32, which.len() as u32];
                let dim = self.width();
                let keys = if dim == 256 { 32 } else { 64 };
                let shared = (64 + 4 * keys) * (dim + 8) * 2;
                let grid = Grid::new(grid, 128).shared(shared as u32);
                let kernel = if bias.is_some() { "attention_biased" } else { "attention_prefill" };
                launch(&self.name(kernel), grid, seed, args![p]);
            }
        }
        part_out.read();
        part_stats.read();
        k.read();
        out.read()
    }

    fn check(&self, grid_x: Option<usize>, seeds: &[u32], what: &str) {
        let all: Vec<usize> = (0..self.seqs.len()).collect();
        let wanted = self.wanted();
        let mut bits = None;
        for seed in seeds {
            let found = self.run(&all, grid_x, *seed);
            // Weights are rounded to the format of products before they meet the values, the result once more.
            let step = if self.cache == Format::Fp8 { Format::F16.epsilon() } else { self.format.epsilon() };
            let tolerance = self.format.epsilon() + step;
            assert_close(&self.format.decode(&found), &wanted, tolerance, tolerance, what);
            assert_eq!(
                *bits.get_or_insert_with(|| found.clone()),
                found,
                "{what}: the order of threads shows"
            );
        }
    }
}

const FORMATS: [(Format, Format); 4] = [
    (Format::Bf16, Format::Bf16),
    (Format::F16, Format::F16),
    (Format::Bf16, Format::Fp8),
    (Format::F16, Format::Fp8),
];

/// Groups of 1 to 20 heads, every width of heads.
const HEADS: [((usize, usize), usize); 7] =
    [((2, 2), 64), ((4, 1), 80), ((6, 2), 96), ((7, 1), 128), ((20, 1), 64), ((2, 1), 256), ((3, 1), 24)];

#[test]
fn decode_equals_the_formula() {
    if !available() {
        return;
    }
    let mut rng = rng(20);
    for (n, (heads, dim)) in HEADS.into_iter().enumerate() {
        for (i, formats) in FORMATS.into_iter().enumerate() {
            let seqs = [(1, 1), (1, 129), (1, [128, 300, 33, 517][i])];
            let case = Case::new(&mut rng, &Shape { formats, heads, dim }, &seqs);
            let seeds = if n == i { &SEEDS[..] } else { &SEEDS[..1] };
            case.check(Some(2), seeds, &format!("{formats:?}, {heads:?} heads of {dim}"));
        }
    }
}

#[test]
fn decode_keeps_to_its_window_and_cap() {
    if !available() {
        return;
    }
    let mut rng = rng(21);
    for window in [1, 15, 64, 130, 260] {
        let shape = Shape { formats: FORMATS[0], heads: (4, 2), dim: 64 };
        let mut case = Case::new(&mut rng, &shape, &[(1, 7), (1, 128), (1, 129), (1, 300)]);
        (case.window, case.softcap) = (Some(window), 5.0);
        // What lies before the window may have been given to others.
        case.check(Some(3), &SEEDS[..2], &format!("window of {window}"));
    }
}

#[test]
fn decode_depends_on_neither_batch_nor_grid() {
    if !available() {
        return;
    }
    let mut rng = rng(22);
    for window in [None, Some(200)] {
        let shape = Shape { formats: FORMATS[0], heads: (5, 1), dim: 64 };
        let mut case = Case::new(&mut rng, &shape, &[(1, 400), (1, 3), (1, 129)]);
        case.window = window;
        let all = case.run(&[0, 1, 2], Some(1), 0);
        for grid_x in [2, 5] {
            assert_eq!(case.run(&[0, 1, 2], Some(grid_x), 0), all);
        }
        let size = all.len() / 3;
        for seq in 0..3 {
            let alone = case.run(&[seq], Some(2), 0);
            assert_eq!(alone[seq * size..][..size], all[seq * size..][..size], "sequence {seq}");
        }
    }
}

#[test]
fn rows_without_keys_are_zeros() {
    if !available() {
        return;
    }
    let shape = Shape { formats: FORMATS[0], heads: (2, 1), dim: 64 };
    let mut case = Case::new(&mut rng(23), &shape, &[(1, 40), (1, 0)]);
    let found = case.format.decode(&case.run(&[0, 1], Some(1), 0));
    assert_eq!(found[128..], [0.0; 128]);
    // A batch of a captured step: the same bits as without the padding.
    case.seqs.truncate(1);
    case.tables.truncate(1);
    case.q.truncate(128);
    assert_eq!(case.format.decode(&case.run(&[0], Some(1), 0)), found[..128]);
}

#[test]
fn prefill_equals_the_formula() {
    if !available() {
        return;
    }
    let mut rng = rng(24);
    for (n, (heads, dim)) in HEADS.into_iter().enumerate() {
        for (i, formats) in FORMATS.into_iter().enumerate() {
            let seqs = [(2, 2), (5, 70), ([33, 9, 65, 17][i], [33, 140, 65, 100][i])];
            let case = Case::new(&mut rng, &Shape { formats, heads, dim }, &seqs);
            let seeds = if n == i { &SEEDS[..] } else { &SEEDS[..1] };
            case.check(None, seeds, &format!("{formats:?}, {heads:?} heads of {dim}"));
        }
    }
}

#[test]
fn prefill_keeps_to_its_window_and_cap() {
    if !available() {
        return;
    }
    let mut rng = rng(25);
    for window in [1, 16, 70] {
        let shape = Shape { formats: FORMATS[0], heads: (3, 1), dim: 64 };
        let mut case = Case::new(&mut rng, &shape, &[(7, 7), (40, 150), (3, 129)]);
        (case.window, case.softcap) = (Some(window), 5.0);
        case.check(None, &SEEDS[..2], &format!("window of {window}"));
    }
}

#[test]
fn prefill_of_a_sequence_alone_has_the_same_bits() {
    if !available() {
        return;
    }
    let shape = Shape { formats: FORMATS[0], heads: (4, 2), dim: 64 };
    let case = Case::new(&mut rng(26), &shape, &[(30, 90), (5, 5), (18, 66)]);
    let all = case.run(&[0, 1, 2], None, 0);
    let row = 4 * 64 * 2;
    for (seq, tokens) in [(0, 0..30), (1, 30..35), (2, 35..53)] {
        let alone = case.run(&[seq], None, 0);
        let bytes = tokens.start * row..tokens.end * row;
        assert_eq!(alone[bytes.clone()], all[bytes], "sequence {seq}");
    }
}

#[test]
fn whole_sequences_are_attended_without_a_cache() {
    if !available() {
        return;
    }
    let mut rng = rng(27);
    for (left, right) in [(None, None), (Some(9), Some(4)), (None, Some(0))] {
        let shape = Shape { formats: FORMATS[0], heads: (2, 2), dim: 64 };
        let mut case = Case::of_the_step(&mut rng, &shape, &[3, 70, 17]);
        (case.window, case.right) = (left, right);
        case.check(None, &SEEDS[..2], &format!("{left:?} to {right:?}"));
    }
}

/// Query and key heads, their width: every width there is an instance for, some between, heads in groups.
const ENCODER_HEADS: [((usize, usize), usize); 6] =
    [((2, 2), 32), ((3, 3), 64), ((2, 2), 24), ((1, 1), 80), ((1, 1), 128), ((4, 2), 32)];

#[test]
fn a_bias_by_distance_is_added_to_scores() {
    if !available() {
        return;
    }
    let mut rng = rng(28);
    let lens: [&[usize]; 3] = [&[1, 5], &[33, 1, 70], &[129]];
    for (n, (heads, dim)) in ENCODER_HEADS.into_iter().enumerate() {
        for format in [Format::Bf16, Format::F16] {
            let shape = Shape { formats: (format, format), heads, dim };
            let lens = lens[n % lens.len()];
            for biased in [true, false] {
                let mut case = Case::of_the_step(&mut rng, &shape, lens);
                // Far enough for the longest, or much further.
                let reach = lens.iter().max().expect("sequences") + [0, 40][n % 2];
                case.right = None;
                if n >= 3 {
                    (case.window, case.right, case.softcap) = (Some(12), Some(30), 6.0);
                }
                if biased {
                    let values = random(&mut rng, heads.0 * Case::bias_stride(reach));
                    case.bias = Some((reach, values.into_iter().map(|x| x * 3.0).collect()));
                }
                let seeds = if n < 2 { &SEEDS[..] } else { &SEEDS[..1] };
                case.check(None, seeds, &format!("{format:?}, {heads:?} heads of {dim}, biased: {biased}"));
            }
        }
    }
}

#[test]
fn a_biased_sequence_alone_has_the_same_bits() {
    if !available() {
        return;
    }
    let mut rng = rng(29);
    let shape = Shape { formats: FORMATS[0], heads: (2, 2), dim: 64 };
    let mut case = Case::of_the_step(&mut rng, &shape, &[30, 5, 66]);
    (case.right, case.bias) = (None, Some((100, random(&mut rng, 2 * Case::bias_stride(100)))));
    let all = case.run(&[0, 1, 2], None, 0);
    let row = 2 * 64 * 2;
    for (seq, tokens) in [(0, 0..30), (1, 30..35), (2, 35..101)] {
        let bytes = tokens.start * row..tokens.end * row;
        assert_eq!(case.run(&[seq], None, 0)[bytes.clone()], all[bytes], "sequence {seq}");
    }
}
