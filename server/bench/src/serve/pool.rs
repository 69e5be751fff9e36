//! Prompts of an exact number of tokens.

use futures::stream::{self, StreamExt};
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::target::{Api, Target};
use crate::codec::Codec;

/// Common words: most tokenizers know each, with a space before it, as one token. Short ones stand first, for
/// tokenizers with few whole words.
const WORDS: &str = "a i he we it in on at to of by or as is be do go no so up us me my an if the and for you are was not but all any \
can had her him his how its may new now old one our out own run saw say see set she six ten too two use way who why yes day \
man men big boy end eye far few get got air arm art ask bad bed bit box bus buy car cut dog door down each even every face \
fact feel find first five food form four from full game gave give good great group grow half hand hard have head hear heart \
help here high hold home hope hour house idea into just keep kind king knew know land large last late lay lead learn leave \
left less life light like line list little live long look made make many mean might mind more most move much must name near \
need never next night north note number often once only open order other over page paper part people place plan plant play \
point power question rain reach read real right river road rock room round same school sea second seem self sentence several \
short show side since small snow some song soon sound south space stand star start state still stop story street strong study \
such sun sure table take talk tell test than that their them then there these they thing think this those though thought three \
through time told took town travel tree true turn under unit until very voice wait walk want warm watch water week well went \
were west what wheel when where which while white whole will wind with without wood word work world would write year young";

/// For tokenizers of letters or bytes.
const LETTERS: &str = "a b c d e f g h i j k l m n o p q r s t u v w x y z";

/// Tokens that may stand in any order, and how to write them.
pub(crate) struct TokenPool {
    codec: Codec,
    /// Words whose text with the separator before is one token, and that token.
    words: Vec<(&'static str, u32)>,
    /// A space; nothing for a tokenizer that knows letters only.
    separator: &'static str,
    /// Tokens that the tokenizer puts around every text.
    num_specials: usize,
}

impl TokenPool {
    /// Asks `codec` which words are one token.
    ///
    /// # Errors
    /// If it does not answer or knows fewer than eight of the words.
    pub(crate) async fn new(codec: Codec) -> Result<Self, String> {
        let (words, separator) = match single_tokens(&codec, WORDS, " ").await? {
            words if words.len() >= FEWEST => (words, " "),
            _ => (single_tokens(&codec, LETTERS, "").await?, ""),
        };
        if words.len() < FEWEST {
            return Err(format!("only {} common words are single tokens of this tokenizer", words.len()));
        }
        let with = codec.encode(" one two", true).await?.len();
        let without = codec.encode(" one two", false).await?.len();
        Ok(Self { codec, words, separator, num_specials: with.saturating_sub(without) })
    }

    /// Who counts.
    pub(crate) fn counted_by(&self) -> &'static str {
        self.codec.name()
    }

    /// The codec behind the pool.
    pub(crate) fn codec(&self) -> &Codec {
        &self.codec
    }

    /// `num_tokens` token ids.
    pub(crate) fn ids(&self, num_tokens: usize, rng: &mut ChaCha8Rng) -> Vec<u32> {
        (0..num_tokens).map(|_| self.words[rng.random_range(0..self.words.len())].1).collect()
    }

    /// Text of exactly `num_tokens` tokens, those that the tokenizer adds included if `specials`.
    ///
    /// # Errors
    /// If the tokenizer does not answer, or joins the words so that the length cannot be met.
    pub(crate) async fn text(
        &self,
        num_tokens: usize,
        specials: bool,
        rng: &mut ChaCha8Rng,
    ) -> Result<String, String> {
        let wanted = num_tokens.saturating_sub(if specials { self.num_specials } else { 0 }).max(1);
        let mut words: Vec<&str> = (0..wanted).map(|_| self.word(rng)).collect();
        for _ in 0..4 {
            let text: String = words.iter().flat_map(|word| [self.separator, word]).collect();
            let count = self.codec.encode(&text, false).await?.len();
            if count == wanted {
                return Ok(text);
            }
            let len = (words.len() + wanted).saturating_sub(count).max(1);
            words.resize_with(len, || self.word(rng));
        }
        Err(format!("no text of {num_tokens} tokens was found: the tokenizer joins words"))
    }

    fn word(&self, rng: &mut ChaCha8Rng) -> &'static str {
        self.words.choose(rng).map_or("a", |(word, _)| word)
    }
}

/// Words of a pool at least.
const FEWEST: usize = 8;

/// The words of `list` that are one token with `separator` before them.
async fn single_tokens(
    codec: &Codec,
    list: &'static str,
    separator: &str,
) -> Result<Vec<(&'static str, u32)>, String> {
    let answers: Vec<_> = stream::iter(list.split_whitespace())
        .map(|word| async move { (word, codec.encode(&format!("{separator}{word}"), false).await) })
        .buffered(8)
        .collect()
        .await;
    let mut single = Vec::new();
    for (word, ids) in answers {
        if let [id] = ids?[..] {
            single.push((word, id));
        }
    }
    Ok(single)
}

/// Words without a tokenizer, their length estimated from what the server counts.
pub(crate) struct WordCount {
    tokens_per_word: f64,
    overhead: f64,
}

impl WordCount {
    /// Lets the server count two texts; a word is a token where it does not count.
    pub(crate) async fn calibrate(target: &Target) -> Self {
        let words: Vec<&str> = WORDS.split_whitespace().take(96).collect();
        let (few, many) = (&words[..32].join(" "), &words.join(" "));
        let counted =
            (target.count_prompt(few.as_str().into()).await, target.count_prompt(many.as_str().into()).await);
        match counted {
            (Some(few), Some(many)) if many > few => {
                let tokens_per_word = (many - few) as f64 / 64.0;
                Self { tokens_per_word, overhead: (few as f64 - 32.0 * tokens_per_word).max(0.0) }
            }
            _ => Self { tokens_per_word: 1.0, overhead: 0.0 },
        }
    }

    /// About `num_tokens` tokens of text.
    pub(crate) fn text(&self, num_tokens: usize, rng: &mut ChaCha8Rng) -> String {
        let count = ((num_tokens as f64 - self.overhead) / self.tokens_per_word).round().max(1.0) as usize;
        random_words(count, rng)
    }
}

/// `count` common words.
pub(crate) fn random_words(count: usize, rng: &mut ChaCha8Rng) -> String {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    (0..count).map(|_| words[rng.random_range(0..words.len())]).collect::<Vec<_>>().join(" ")
}

/// Whether the server takes token ids for a prompt and computes just these.
pub(crate) async fn takes_ids(target: &Target, pool: &TokenPool, rng: &mut ChaCha8Rng) -> bool {
    if target.api != Api::Completions {
        return false;
    }
    let ids = pool.ids(12, rng);
    target.count_prompt(serde_json::json!(ids)).await == Some(12)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rand_chacha::rand_core::SeedableRng;

    use super::*;
    use crate::TextCodec;

    /// One token a word of at most three letters, else one a letter; two tokens around every text.
    struct Short;

    impl TextCodec for Short {
        fn encode(&self, text: &str, specials: bool) -> Result<Vec<u32>, String> {
            let mut ids = vec![1; if specials { 2 } else { 0 }];
            for word in text.split_whitespace() {
                let letters = word.len() as u32;
                ids.extend(vec![100 + letters; if letters <= 3 { 1 } else { word.len() }]);
            }
            Ok(ids)
        }
    }

    #[tokio::test]
    async fn lengths_are_met_exactly() {
        let pool = TokenPool::new(Codec::Local(Arc::new(Short))).await.unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for num_tokens in [1, 2, 17, 300] {
            let text = pool.text(num_tokens, false, &mut rng).await.unwrap();
            assert_eq!(Short.encode(&text, false).unwrap().len(), num_tokens);
            assert_eq!(pool.ids(num_tokens, &mut rng).len(), num_tokens);
        }
        let text = pool.text(17, true, &mut rng).await.unwrap();
        assert_eq!(Short.encode(&text, true).unwrap().len(), 17);
        assert!(pool.words.iter().all(|(word, _)| word.len() <= 3));
    }

    #[tokio::test]
    async fn letters_do_where_words_are_unknown() {
        struct Letters;
        impl TextCodec for Letters {
            fn encode(&self, text: &str, _: bool) -> Result<Vec<u32>, String> {
                Ok(text.chars().map(u32::from).collect())
            }
        }
        let pool = TokenPool::new(Codec::Local(Arc::new(Letters))).await.unwrap();
        assert_eq!(pool.text(9, true, &mut ChaCha8Rng::seed_from_u64(1)).await.unwrap().len(), 9);
        struct Nothing;
        impl TextCodec for Nothing {
            fn encode(&self, _: &str, _: bool) -> Result<Vec<u32>, String> {
                Ok(vec![])
            }
        }
        assert!(TokenPool::new(Codec::Local(Arc::new(Nothing))).await.is_err());
    }
}
