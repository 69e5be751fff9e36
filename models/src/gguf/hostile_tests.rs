//! Files that someone made to do harm, or that are damaged: each must be an error that names the file, without a
//! panic and without memory beyond a small multiple of the file.

use std::fs;

use proptest::prelude::*;

use super::writer::{Writer, tiny};
use super::{open, text_files};

/// Opens the file and returns the message; it must be an error.
fn refused(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("model.gguf");
    fs::write(&path, bytes).expect("write the test file");
    let error = match open(&path) {
        Ok(_) => panic!("the file was accepted"),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("model.gguf") || error.contains("architecture"), "names no file: {error}");
    error
}

#[track_caller]
fn check(change: impl FnOnce(&mut Writer), expected: &str) {
    let mut w = tiny("llama");
    change(&mut w);
    let message = refused(&w.bytes());
    assert!(message.contains(expected), "expected {expected:?} in: {message}");
}

#[test]
fn the_unchanged_file_is_accepted() {
    let dir = tempfile::tempdir().expect("temporary folder");
    open(&tiny("llama").write_to(dir.path())).expect("a good file");
    let mut second = tiny("llama");
    second.version = 2;
    open(&second.write_to(dir.path())).expect("a good file of version 2");
}

#[test]
fn magic_and_version() {
    assert!(refused(b"").contains("offset 0"));
    assert!(refused(b"GGUF").contains("offset 4"));
    assert!(refused(b"PK\x03\x04 not a model").contains("not a GGUF file"));
    check(|w| w.version = 1, "version 1 is not supported");
    check(|w| w.version = 4, "version 4 is not supported");
    check(|w| w.version = 3u32.swap_bytes(), "big-endian");
}

#[test]
fn counts_beyond_the_file() {
    for count in [1 << 32, u64::MAX, 1 << 61, 100_000] {
        check(|w| w.num_tensors = Some(count), "tensor count");
        check(|w| w.num_metadata = Some(count), "metadata count");
    }
    // One more than there are: the reader runs into what follows.
    check(|w| w.num_tensors = Some(w.tensors.len() as u64 + 1), "offset");
}

#[test]
fn tensor_shapes() {
    check(|w| w.tensors[0].dims = vec![1 << 32, 1 << 32], "no valid size");
    check(|w| w.tensors[0].dims = vec![8, 1 << 61], "no valid size");
    check(|w| w.tensors[0].dims = vec![u64::MAX], "no valid size");
    check(|w| w.tensors[0].dims = vec![8, 0], "dimension that is 0");
    check(|w| w.tensors[0].dims = vec![1; 9], "9 dimensions");
    check(|w| w.tensors[0].dims = vec![], "0 dimensions");
    check(|w| w.tensors[0].code = 99, "type 99");
    check(|w| w.tensors[0].code = 8, "no valid size"); // rows of 8 are no whole Q8_0 blocks
}

#[test]
fn tensor_ranges() {
    check(|w| w.tensors[3].offset = 1 << 40, "the file has");
    check(|w| w.tensors[3].offset = u64::MAX - 31, "the file has");
    check(|w| w.tensors[3].offset += 1, "not a multiple of 32");
    check(|w| w.tensors[3].offset = w.tensors[2].offset, "overlap");
    check(|w| w.data.truncate(w.data.len() - 1), "the file has");
    check(|w| w.data.clear(), "the file has");
}

#[test]
fn alignment() {
    for value in [0, 1, 31, 1 << 30, u32::MAX] {
        check(
            |w| {
                w.u32("general.alignment", value);
            },
            "general.alignment",
        );
    }
    check(
        |w| {
            w.text("general.alignment", "32");
        },
        "general.alignment",
    );
}

#[test]
fn names() {
    check(|w| w.tensors[1].name = w.tensors[0].name.clone(), "appears twice");
    check(
        |w| {
            w.duplicate("llama.block_count");
        },
        "appears twice",
    );
    check(|w| w.tensors[0].name = "x".repeat(5000), "longer than allowed");
    check(|w| w.tensors[0].name = "something.else".into(), "token_embd.weight is missing");
    check(|w| w.tensors[5].name = "blk.0.attn_k2.weight".into(), "blk.0.attn_k.weight is missing");
    check(
        |w| {
            w.tensor("blk.1.attn_q.weight", &[8], 0, &[0; 32]);
        },
        "not part of this architecture",
    );
}

#[test]
fn strings_and_arrays() {
    // A length that the file does not have.
    check(
        |w| {
            w.raw("x", 8, &u64::MAX.to_le_bytes());
        },
        "longer than allowed",
    );
    let array = |kind: u32, len: u64| [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
    check(
        |w| {
            w.raw("x", 9, &array(8, u64::MAX));
        },
        "array element count",
    );
    check(
        |w| {
            w.raw("x", 9, &array(0, 1 << 32));
        },
        "array element count",
    );
    check(
        |w| {
            w.raw("x", 9, &array(77, 1));
        },
        "77 is not a metadata value type",
    );
    check(
        |w| {
            w.raw("x", 77, &[]);
        },
        "77 is not a metadata value type",
    );
    // Arrays of arrays, a thousand deep.
    let nested: Vec<u8> = (0..1000).flat_map(|_| array(9, 1)).collect();
    check(
        |w| {
            w.raw("x", 9, &nested);
        },
        "nested deeper",
    );
}

#[test]
fn a_long_string_within_a_large_file() {
    let mut w = tiny("llama");
    w.text("general.license", &"x".repeat((4 << 20) + 1));
    assert!(refused(&w.bytes()).contains("longer than allowed"));
}

#[test]
fn a_file_of_zeros_behind_a_good_start() {
    // 64 MiB of empty metadata would be five million entries; the count is held against the cap.
    let mut bytes = tiny("llama").bytes();
    bytes.truncate(24);
    bytes[16..24].copy_from_slice(&65_537u64.to_le_bytes());
    bytes.resize(2 << 20, 0);
    assert!(refused(&bytes).contains("metadata count 65537"));
}

#[test]
fn sizes_in_metadata() {
    let set = |key: &'static str, value: u32| {
        move |w: &mut Writer| {
            w.u32(key, value);
        }
    };
    check(set("llama.attention.head_count", 0), "llama.attention.head_count is not an integer between 1");
    check(set("llama.attention.head_count", u32::MAX), "llama.attention.head_count is not an integer");
    check(set("llama.attention.head_count_kv", 3), "impossible attention sizes");
    check(set("llama.attention.key_length", 3), "impossible attention sizes");
    check(set("llama.attention.key_length", 1 << 24), "expected");
    check(set("llama.rope.dimension_count", 2), "llama.rope.dimension_count is 2");
    check(set("llama.block_count", 1 << 24), "blk.1.attn_q.weight is missing");
    check(set("llama.vocab_size", 7), "llama.vocab_size is 7");
    check(set("llama.expert_count", 8), "mixture-of-experts");
    check(set("split.count", 3), "one of 3 parts");
    check(
        |w| {
            w.remove("llama.block_count");
        },
        "llama.block_count is missing",
    );
    check(
        |w| {
            w.f32("llama.attention.layer_norm_rms_epsilon", f32::NAN);
        },
        "epsilon",
    );
    check(
        |w| {
            w.f32("llama.rope.freq_base", -1.0);
        },
        "rope.freq_base",
    );
    check(
        |w| {
            w.text("general.architecture", "mamba");
        },
        "known are: llama, qwen2, qwen3",
    );
}

#[test]
fn tokenizers() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let check = |change: &dyn Fn(&mut Writer), expected: &str| {
        let mut w = tiny("llama");
        change(&mut w);
        let message = text_files(&w.write_to(dir.path())).expect_err("the file was accepted").to_string();
        assert!(message.contains(expected), "expected {expected:?} in: {message}");
    };
    check(
        &|w| {
            w.remove("tokenizer.ggml.tokens");
        },
        "tokens is missing",
    );
    check(
        &|w| {
            w.text("tokenizer.ggml.model", "rwkv");
        },
        "known are: gpt2, llama",
    );
    check(
        &|w| {
            w.text("tokenizer.ggml.pre", "unheard-of");
        },
        "known are: gpt-2, smollm",
    );
    check(
        &|w| {
            w.i32s("tokenizer.ggml.token_type", &[1]);
        },
        "1 token types for 15 tokens",
    );
    check(
        &|w| {
            w.i32s("tokenizer.ggml.token_type", &[9; 15]);
        },
        "9 is not a token type",
    );
    check(
        &|w| {
            w.texts("tokenizer.ggml.tokens", &["a"; 15]);
        },
        "same text",
    );
    check(
        &|w| {
            w.u32("tokenizer.ggml.eos_token_id", 15);
        },
        "eos_token_id is 15",
    );
    check(
        &|w| {
            w.bool("tokenizer.ggml.add_bos_token", true).remove("tokenizer.ggml.bos_token_id");
        },
        "start token",
    );
    for merge in ["", " ", "h", "h ", " h", "h x", "h l", "h  e", "hee"] {
        check(
            &|w| {
                w.texts("tokenizer.ggml.merges", &[merge]);
            },
            "merge 0",
        );
    }
    check(
        &|w| {
            w.text("tokenizer.ggml.model", "llama");
        },
        "scores",
    );
    check(
        &|w| {
            w.text("tokenizer.ggml.model", "llama").f32s("tokenizer.ggml.scores", &[f32::NAN; 15]);
        },
        "scores",
    );
}

/// Two letters, every string of them up to 17 long: few bytes, and 4 million ways to cut a piece into two pieces.
#[test]
fn a_vocabulary_whose_merges_explode() {
    let mut tokens = Vec::new();
    for len in 1..=17u32 {
        tokens.extend((0..1u32 << len).map(|bits| -> String {
            (0..len).map(|i| if bits >> i & 1 == 1 { 'a' } else { 'b' }).collect()
        }));
    }
    let mut w = Writer::new();
    w.text("general.architecture", "llama").text("tokenizer.ggml.model", "llama");
    w.texts("tokenizer.ggml.tokens", &tokens).f32s("tokenizer.ggml.scores", &vec![0.0; tokens.len()]);
    let dir = tempfile::tempdir().expect("temporary folder");
    let message = text_files(&w.write_to(dir.path())).expect_err("refused").to_string();
    assert!(message.contains("more than 2097152 merges"), "{message}");
}

#[test]
fn what_is_not_a_file() {
    let dir = tempfile::tempdir().expect("temporary folder");
    assert!(open(dir.path()).err().expect("a folder is refused").to_string().contains("not a regular file"));
    assert!(
        open(&dir.path().join("absent.gguf")).err().expect("refused").to_string().contains("absent.gguf")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any change of a few bytes, any cut: an error or a model whose tensors can all be read, never a panic.
    #[test]
    fn mutations_do_not_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        words in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![
            Just(u64::MAX), Just(1u64 << 63), Just(1 << 32), Just(0), 0..64u64,
        ]), 0..3),
        cut in prop::option::of(any::<prop::sample::Index>()),
        architecture in prop::sample::select(vec!["llama", "qwen2", "qwen3"]),
    ) {
        let mut bytes = tiny(architecture).bytes();
        // Aim at the header; the rest is tensor data, where every byte is valid.
        let header = bytes.len() - tiny(architecture).data.len();
        for (at, value) in changes {
            bytes[at.index(header)] = value;
        }
        for (at, value) in words {
            let at = at.index(header - 8);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.gguf");
        fs::write(&path, &bytes)?;
        if let Ok(model) = open(&path) {
            use crate::TensorSource;
            for name in model.source.names() {
                model.source.load(name)?;
            }
        }
        let _ = text_files(&path);
    }

    #[test]
    fn noise_does_not_panic(noise in prop::collection::vec(any::<u8>(), 0..400)) {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.gguf");
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(noise);
        fs::write(&path, &bytes)?;
        prop_assert!(open(&path).is_err());
        prop_assert!(text_files(&path).is_err());
    }
}
