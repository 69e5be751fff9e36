//! A tokenizer of any size for models that have none: byte-level BPE whose merges spell words letter by letter.
//!
//! Ids: five special tokens, the 256 bytes, then " a", " b" ... " z", " aa" and so on, as many as there is room for. Each
//! is the one before it and a letter, so a short word with its space is one token.

use anyhow::bail;
use serde_json::{Map, Value, json};

const SPECIAL: [&str; 5] = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"];
/// Id of the token that begins a text.
pub(super) const BOS: u32 = 1;
/// Id of the token that ends a text.
pub(super) const EOS: u32 = 2;

const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// How a byte-level vocabulary writes each byte: itself if it can be printed, else a letter from 256 on.
fn byte_letters() -> Vec<char> {
    let mut next = 255_u32;
    (0..=255_u8)
        .map(|byte| match byte {
            33..=126 | 161..=172 | 174..=255 => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next).unwrap_or('\u{100}')
            }
        })
        .collect()
}

/// `tokenizer.json` with `size` tokens.
pub(super) fn tokenizer(size: usize) -> anyhow::Result<Value> {
    let mut tokens: Vec<String> = SPECIAL.iter().map(ToString::to_string).collect();
    tokens.extend(byte_letters().into_iter().map(String::from));
    if tokens.len() > size {
        bail!("a vocabulary of {size} has no room for the {} tokens of a tokenizer", tokens.len());
    }
    let mut merges = Vec::new();
    // The letter that stands for a space.
    let mut level = vec!["\u{120}".to_owned()];
    'full: loop {
        let mut longer = Vec::new();
        for word in &level {
            for letter in 'a'..='z' {
                if tokens.len() == size {
                    break 'full;
                }
                merges.push(json!([word, letter.to_string()]));
                tokens.push(format!("{word}{letter}"));
                longer.push(format!("{word}{letter}"));
            }
        }
        level = longer;
    }
    let vocab: Map<String, Value> =
        tokens.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added = |(id, content)| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": SPECIAL.iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges,
        },
    }))
}

/// `tokenizer_config.json`
pub(super) fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "add_bos_token": false, "clean_up_tokenization_spaces": false, "chat_template": CHAT_TEMPLATE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vocabulary_is_full_and_every_merge_is_in_it() {
        for size in [261, 300, 5000] {
            let tokenizer = tokenizer(size).unwrap();
            let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
            assert_eq!(vocab.len(), size, "no token twice");
            for merge in tokenizer["model"]["merges"].as_array().unwrap() {
                let joined = format!("{}{}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap());
                assert!(vocab.contains_key(&joined) && vocab.contains_key(merge[0].as_str().unwrap()));
            }
        }
        assert!(tokenizer(260).is_err());
    }
}
