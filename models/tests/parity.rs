//! Every family against what transformers computed for its fixture, and every way to cut the same work into steps
//! against every other. The latter agree to the bit: no kernel's sums depend on how many tokens share the call.

mod common;

use common::{Driver, Prompt, argmax, distance, fixture, load, load_over, logprob, prompts};
use ingle_models::CausalLm;

/// Logits, a row a token.
type Rows = Vec<Vec<f32>>;

/// Against transformers, whose sums run in another order.
const REFERENCE_TOLERANCE: f32 = 1e-4;

macro_rules! max_len {
    () => {
        None
    };
    ($len:expr) => {
        Some($len)
    };
}

macro_rules! parity {
    ($($name:ident $(($max_model_len:expr))?),+ $(,)?) => {
        $(#[test]
        fn $name() {
            #[allow(unused_mut, unused_assignments)]
            let mut max_model_len = None;
            $(max_model_len = Some($max_model_len);)?
            check(stringify!($name), stringify!($name), &*load(stringify!($name), max_model_len));
        })+

        /// Every fixture, with the longest sequence that it is loaded for.
        const FIXTURES: &[(&str, Option<usize>)] = &[$((stringify!($name), max_len!($($max_model_len)?))),+];

        #[test]
        fn every_fixture_has_its_test() {
            let mut names = vec![$(stringify!($name).to_owned()),+];
            let mut folders: Vec<_> = std::fs::read_dir(fixture("")).expect("fixtures")
                .map(|entry| entry.expect("an entry"))
                .filter(|entry| entry.path().join("reference.json").exists())
                .map(|entry| entry.file_name().into_string().expect("a plain name"))
                .collect();
            names.sort();
            folders.sort();
            assert_eq!(names, folders);
        }
    };
}

parity! {
    gemma2,
    gemma3,
    gemma3_legacy,
    granite,
    llama,
    llama_awq,
    llama_dynamic,
    llama_f16_head_dim,
    llama_fp8,
    llama_fp8_channel,
    llama_gptq,
    llama_gptq_act_order,
    llama_gptq_v2_int8_asym,
    llama_linear,
    llama_llama3,
    llama_mha_bias,
    llama_sharded,
    llama_tied,
    llama_yarn,
    mistral,
    mistral_gptq_int8,
    mixtral,
    mixtral_fused,
    olmo2,
    phi3,
    phi3_longrope,
    phi3_shortrope(32),
    qwen2,
    qwen2_gptq_asym,
    qwen2_sliding,
    qwen3,
    qwen3_fp8_block,
    qwen3_moe,
    qwen3_moe_fused,
    smollm3,
}

/// Divided over ranks, sums run in yet another order; how work is cut into steps still changes no bit.
fn check_over(ranks: usize) {
    for (name, max_model_len) in FIXTURES {
        let model = load_over(name, *max_model_len, ranks);
        let whole = load(name, *max_model_len);
        assert_eq!(model.info().num_parameters, whole.info().num_parameters);
        check(&format!("{name} over {ranks} ranks"), name, &*model);
    }
}

#[test]
fn every_fixture_over_two_ranks() {
    check_over(2);
}

/// More ranks than key/value heads: most fixtures have two.
#[test]
fn every_fixture_over_four_ranks() {
    check_over(4);
}

/// Steps of so many tokens that threads take blocks of rows, against chunks of too few for that.
#[test]
fn long_steps_equal_short_ones() {
    for (name, _) in FIXTURES.iter().filter(|(_, max_model_len)| max_model_len.is_none()) {
        let model = load(name, None);
        let len = 200;
        let count = 1 + 64 * ingle_kernels::num_threads() / len;
        let vocab = model.info().vocab_size as u32;
        let prompts: Vec<Vec<u32>> = (0..count as u32)
            .map(|seq| (0..len as u32).map(|i| (7 + 31 * seq + 13 * i + i * i) % vocab).collect())
            .collect();
        let mut driver = Driver::new(&*model, 16, 2 * count * (len + 16));
        let mut seqs: Vec<_> = prompts.iter().map(|_| driver.seq()).collect();
        let mut parts: Vec<_> = seqs.iter_mut().zip(&prompts).map(|(s, p)| (s, p.as_slice())).collect();
        let long = driver.step(&mut parts, false);
        for (prompt, want) in prompts.iter().zip(&long) {
            let mut seq = driver.seq();
            let mut last = Vec::new();
            for chunk in prompt.chunks(31) {
                last = driver.step(&mut [(&mut seq, chunk)], false).remove(0);
            }
            let off = distance(&last, want);
            assert!(off == 0.0, "{name}: a long step is {off} off");
        }
    }
}

fn check(what: &str, name: &str, model: &dyn CausalLm) {
    let prompts = prompts(name);
    assert!(prompts.len() >= 2);
    let total: usize = prompts.iter().map(|p| p.input_ids.len() + p.greedy.len()).sum();
    // Room for a partly filled block a sequence.
    let slots = total + 16 * prompts.len();

    let mut decoded = Vec::new();
    for prompt in &prompts {
        let (rows, decode_rows) = check_alone(what, model, prompt, slots);
        check_chunks(what, model, prompt, &rows, slots);
        decoded.push(decode_rows);
    }
    check_together(what, model, &prompts, &decoded, slots);
}

/// The whole prompt at once, then token by token, against the reference. Returns the logits of every prompt token, and
/// those that each decoded token was chosen by.
fn check_alone(name: &str, model: &dyn CausalLm, prompt: &Prompt, slots: usize) -> (Rows, Rows) {
    let mut driver = Driver::new(model, 16, slots);
    let mut seq = driver.seq();
    let rows = driver.step(&mut [(&mut seq, &prompt.input_ids)], true);
    let mut row = rows.last().expect("a row").clone();
    let off = distance(&row, &prompt.last_logits);
    assert!(off <= REFERENCE_TOLERANCE, "{name}: last logits are {off} off");
    assert_eq!(prompt.logprobs.len(), prompt.input_ids.len() - 1);
    for (i, want) in prompt.logprobs.iter().enumerate() {
        let have = logprob(&rows[i], prompt.input_ids[i + 1]);
        assert!((have - want).abs() <= REFERENCE_TOLERANCE, "{name}: logprob {i} is {have}, not {want}");
    }
    let (mut tokens, mut decode_rows) = (Vec::new(), Vec::new());
    for _ in 0..prompt.greedy.len() {
        let next = argmax(&row);
        tokens.push(next);
        decode_rows.push(row);
        row = driver.step(&mut [(&mut seq, &[next])], false).remove(0);
    }
    assert_eq!(tokens, prompt.greedy, "{name}");
    (rows, decode_rows)
}

/// The prompt in chunks of several sizes, and token by token, against `rows`.
fn check_chunks(name: &str, model: &dyn CausalLm, prompt: &Prompt, rows: &[Vec<f32>], slots: usize) {
    for (block_size, chunks) in [(3, [1, 7, 11].as_slice()), (1, &[1]), (16, &[5]), (3, &[16, 1])] {
        let mut driver = Driver::new(model, block_size, slots);
        let mut seq = driver.seq();
        let mut rest = prompt.input_ids.as_slice();
        let mut chunked = Vec::new();
        for len in chunks.iter().cycle() {
            let (chunk, tail) = rest.split_at((*len).min(rest.len()));
            chunked.extend(driver.step(&mut [(&mut seq, chunk)], true));
            rest = tail;
            if rest.is_empty() {
                break;
            }
        }
        assert_eq!(chunked.len(), rows.len());
        for (i, (have, want)) in chunked.iter().zip(rows).enumerate() {
            let off = distance(have, want);
            assert!(off == 0.0, "{name}: token {i} in chunks {chunks:?} is {off} off");
        }
    }
}

/// All prompts in one batch, the first joining late, then decoding together, against `alone`.
fn check_together(name: &str, model: &dyn CausalLm, prompts: &[Prompt], alone: &[Rows], slots: usize) {
    for block_size in [1, 3, 16] {
        let mut driver = Driver::new(model, block_size, slots);
        let mut seqs: Vec<_> = prompts.iter().map(|_| driver.seq()).collect();
        let (head, tail) = seqs.split_at_mut(1);
        let (first, others) = (&prompts[0].input_ids, &prompts[1..]);
        let mut early: Vec<_> = tail.iter_mut().zip(others).map(|(s, p)| (s, &p.input_ids[..2])).collect();
        driver.step(&mut early, false);
        let mut parts = vec![(&mut head[0], first.as_slice())];
        parts.extend(tail.iter_mut().zip(others).map(|(s, p)| (s, &p.input_ids[2..])));
        let mut rows = driver.step(&mut parts, false);
        for (step, _) in alone[0].iter().enumerate() {
            for (seq, row) in rows.iter().enumerate() {
                let off = distance(row, &alone[seq][step]);
                assert!(off == 0.0, "{name}: sequence {seq}, step {step} is {off} off among others");
            }
            let next: Vec<_> = prompts.iter().map(|p| [p.greedy[step]]).collect();
            let mut parts: Vec<_> = seqs.iter_mut().zip(&next).map(|(s, t)| (s, t.as_slice())).collect();
            rows = driver.step(&mut parts, false);
        }
    }
}
