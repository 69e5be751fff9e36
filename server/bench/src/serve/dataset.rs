//! Data sets: where the prompts of a run come from.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::Value;

use super::client::Role;
use super::pool::{TokenPool, WordCount};
use super::target::Api;
use super::workload::{Conversation, Prompt, Turn, Workload};
use crate::codec::Codec;

/// Kinds of data sets, by the names of vLLM's benchmark where it has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DatasetName {
    /// Random prompts of --input-len tokens; nothing in common but --random-prefix-len tokens.
    Random,
    /// --num-prefixes long beginnings shared by many prompts: what a prefix cache is for.
    #[value(name = "prefix_repetition", alias = "shared-prefix")]
    SharedPrefix,
    /// Conversations of --num-turns questions, each sent with all that was said before.
    MultiTurn,
    /// JSON lines with `prompt` or `messages`, and `output_len` if it is to differ.
    #[value(name = "custom", alias = "jsonl")]
    Jsonl,
    /// A file in ShareGPT's form: first question and answer of each conversation.
    #[value(name = "sharegpt")]
    ShareGpt,
}

/// How random prompts are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PromptForm {
    /// As token ids where the server takes them, else as text.
    Auto,
    /// As text.
    Text,
    /// As token ids.
    Tokens,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub(crate) struct DatasetSpec {
    pub(crate) name: DatasetName,
    pub(crate) path: Option<PathBuf>,
    pub(crate) input_len: usize,
    pub(crate) output_len: Option<u32>,
    pub(crate) range_ratio: f64,
    pub(crate) prefix_len: usize,
    pub(crate) num_prefixes: usize,
    pub(crate) num_turns: usize,
    pub(crate) ignore_eos: Option<bool>,
}

/// Tokens of an answer where neither flag nor data set says.
const DEFAULT_OUTPUT_LEN: u32 = 128;

/// Who makes prompts of a length.
pub(crate) enum Writer {
    /// Exactly.
    Pool {
        /// Its tokens.
        pool: Box<TokenPool>,
        /// As ids.
        ids: bool,
    },
    /// About.
    Words(WordCount),
}

impl Writer {
    /// How a report says it.
    pub(crate) fn description(&self) -> String {
        match self {
            Self::Pool { pool, ids: true } => format!("exact, token ids (known from {})", pool.counted_by()),
            Self::Pool { pool, ids: false } => format!("exact, text counted by {}", pool.counted_by()),
            Self::Words(_) => {
                "estimated: no tokenizer here and no /tokenize there; see input_lens".to_owned()
            }
        }
    }

    async fn prompt(&self, num_tokens: usize, api: Api, rng: &mut ChaCha8Rng) -> anyhow::Result<Prompt> {
        Ok(match self {
            Self::Pool { pool, ids: true } => Prompt::Tokens(pool.ids(num_tokens, rng)),
            Self::Pool { pool, ids: false } => {
                // The tokens that a chat template adds are the model's, not the prompt's.
                let specials = api == Api::Completions;
                Prompt::Text(pool.text(num_tokens, specials, rng).await.map_err(anyhow::Error::msg)?)
            }
            Self::Words(words) => Prompt::Text(words.text(num_tokens, rng)),
        })
    }

    fn codec(&self) -> Option<&Codec> {
        match self {
            Self::Pool { pool, .. } => Some(pool.codec()),
            Self::Words(_) => None,
        }
    }
}

/// `first` with `second` behind it.
fn join(first: &Prompt, second: Prompt) -> Prompt {
    match (first, second) {
        (Prompt::Tokens(first), Prompt::Tokens(second)) => Prompt::Tokens([&first[..], &second].concat()),
        (Prompt::Text(first), Prompt::Text(second)) => Prompt::Text(format!("{first}{second}")),
        (_, second) => second,
    }
}

/// What chance decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seeds {
    /// Lengths, order and arrivals: the shape of the load.
    pub(crate) shape: u64,
    /// The words of made-up prompts.
    pub(crate) words: u64,
}

impl Seeds {
    /// Those of step `step` of a command.
    pub(crate) fn step(self, step: u64) -> Self {
        let of = |seed: u64| seed.wrapping_mul(0x9e37_79b9).wrapping_add(step);
        Self { shape: of(self.shape), words: of(self.words) }
    }

    /// Those of the warm-up before a run.
    pub(crate) fn warm_up(self) -> Self {
        Self { shape: self.shape ^ 0x5eed_0000_0000, words: self.words ^ 0x5eed_0000_0000 }
    }
}

/// The generators of [`Seeds`].
struct Chance {
    shape: ChaCha8Rng,
    words: ChaCha8Rng,
}

impl DatasetName {
    /// Whether the prompts are made up, not read from a file.
    pub(crate) fn is_made_up(self) -> bool {
        matches!(self, Self::Random | Self::SharedPrefix | Self::MultiTurn)
    }
}

impl DatasetSpec {
    /// `count` conversations; the same for the same `seeds`.
    ///
    /// # Errors
    /// If a file cannot be read or prompts cannot be made.
    pub(crate) async fn workload(
        &self,
        writer: &Writer,
        api: Api,
        count: usize,
        seeds: Seeds,
    ) -> anyhow::Result<Workload> {
        // Lengths are part of the seed: else a longer prompt of another run would begin like the shorter one of this, and
        // a prefix cache would answer its beginning.
        let lengths = (self.input_len as u64).rotate_left(40) ^ u64::from(self.output_len()).rotate_left(20);
        let mut chance = Chance {
            shape: ChaCha8Rng::seed_from_u64(seeds.shape ^ lengths),
            words: ChaCha8Rng::seed_from_u64(seeds.words ^ lengths.rotate_left(7)),
        };
        let conversations = match self.name {
            DatasetName::Random | DatasetName::SharedPrefix => {
                self.random(writer, api, count, &mut chance).await?
            }
            DatasetName::MultiTurn => self.multi_turn(writer, api, count, &mut chance).await?,
            DatasetName::Jsonl => self.jsonl(count)?,
            DatasetName::ShareGpt => self.sharegpt(writer, count, &mut chance.shape).await?,
        };
        Ok(Workload { conversations, ignore_eos: self.ignore_eos.unwrap_or(self.name.is_made_up()) })
    }

    /// Tokens of an answer, unless the data set says.
    pub(crate) fn output_len(&self) -> u32 {
        self.output_len.unwrap_or(DEFAULT_OUTPUT_LEN).max(1)
    }

    /// `len`, or a number around it if a range is wanted (vLLM's `--random-range-ratio`).
    fn spread(&self, len: usize, rng: &mut ChaCha8Rng) -> usize {
        let ratio = self.range_ratio.clamp(0.0, 0.999);
        let (low, high) = (len as f64 * (1.0 - ratio), len as f64 * (1.0 + ratio));
        rng.random_range(low.floor() as usize..=high.ceil() as usize).max(1)
    }

    async fn random(
        &self,
        writer: &Writer,
        api: Api,
        count: usize,
        chance: &mut Chance,
    ) -> anyhow::Result<Vec<Conversation>> {
        let num_prefixes = match self.name {
            DatasetName::SharedPrefix => self.num_prefixes.max(1),
            _ => usize::from(self.prefix_len > 0),
        };
        let mut prefixes = Vec::with_capacity(num_prefixes);
        for _ in 0..num_prefixes {
            prefixes.push(writer.prompt(self.prefix_len.max(1), api, &mut chance.words).await?);
        }
        let mut conversations = Vec::with_capacity(count);
        for idx in 0..count {
            let mut prompt =
                writer.prompt(self.spread(self.input_len, &mut chance.shape), api, &mut chance.words).await?;
            if let Some(prefix) = prefixes.get(idx % num_prefixes.max(1)) {
                prompt = join(prefix, prompt);
            }
            let output_len = self.spread(self.output_len() as usize, &mut chance.shape);
            conversations.push(Conversation::single(prompt, u32::try_from(output_len).unwrap_or(u32::MAX)));
        }
        // So that the first requests of a prefix do not come in step.
        if self.name == DatasetName::SharedPrefix {
            conversations.shuffle(&mut chance.shape);
        }
        Ok(conversations)
    }

    async fn multi_turn(
        &self,
        writer: &Writer,
        api: Api,
        count: usize,
        chance: &mut Chance,
    ) -> anyhow::Result<Vec<Conversation>> {
        let mut opening = Vec::new();
        if self.prefix_len > 0
            && let Prompt::Text(text) = writer.prompt(self.prefix_len, api, &mut chance.words).await?
        {
            opening.push((Role::System, text));
        }
        let mut conversations = Vec::with_capacity(count);
        for _ in 0..count {
            let mut turns = Vec::with_capacity(self.num_turns.max(1));
            for _ in 0..self.num_turns.max(1) {
                let prompt = writer
                    .prompt(self.spread(self.input_len, &mut chance.shape), api, &mut chance.words)
                    .await?;
                let output_len = self.spread(self.output_len() as usize, &mut chance.shape);
                turns.push(Turn { prompt, max_tokens: u32::try_from(output_len).unwrap_or(u32::MAX) });
            }
            conversations.push(Conversation { opening: opening.clone(), turns });
        }
        Ok(conversations)
    }

    fn file(&self) -> anyhow::Result<(&Path, String)> {
        let path = self.path.as_deref().context("this data set needs --dataset-path FILE")?;
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok((path, text))
    }

    fn jsonl(&self, count: usize) -> anyhow::Result<Vec<Conversation>> {
        let (path, text) = self.file()?;
        let mut conversations = Vec::new();
        for (idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let place = || format!("{}, line {}", path.display(), idx + 1);
            let value: Value = serde_json::from_str(line).with_context(place)?;
            let prompt = match (&value["prompt"], &value["messages"]) {
                (Value::String(text), _) => Prompt::Text(text.clone()),
                (_, Value::Array(messages)) => Prompt::Messages(messages.clone()),
                _ => bail!("{}: neither \"prompt\" nor \"messages\"", place()),
            };
            let own =
                ["output_len", "max_tokens", "output_tokens"].iter().find_map(|name| value[*name].as_u64());
            let own = own.and_then(|len| u32::try_from(len).ok());
            conversations.push(Conversation::single(prompt, own.unwrap_or(self.output_len()).max(1)));
        }
        again(conversations, count, path)
    }

    async fn sharegpt(
        &self,
        writer: &Writer,
        count: usize,
        rng: &mut ChaCha8Rng,
    ) -> anyhow::Result<Vec<Conversation>> {
        let (path, text) = self.file()?;
        let list: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let list = list.as_array().with_context(|| format!("{}: a list is wanted", path.display()))?;
        let mut pairs: Vec<(&str, &str)> = list
            .iter()
            .filter_map(|entry| {
                let turns = entry["conversations"].as_array()?;
                Some((turns.first()?["value"].as_str()?, turns.get(1)?["value"].as_str()?))
            })
            .collect();
        pairs.shuffle(rng);
        let mut conversations = Vec::new();
        for (question, answer) in pairs {
            if conversations.len() == count {
                break;
            }
            let lens = match writer.codec() {
                Some(codec) => {
                    let question = codec.encode(question, true).await.map_err(anyhow::Error::msg)?.len();
                    (question, codec.encode(answer, false).await.map_err(anyhow::Error::msg)?.len())
                }
                // Without a tokenizer: English has about four letters a token.
                None => (question.len() / 4, answer.len() / 4),
            };
            let output_len = self.output_len.map_or(lens.1, |len| len as usize);
            // The limits of vLLM's benchmark: neither trivial nor too long.
            if lens.0 < 4 || output_len < 4 || lens.0 > 1024 || lens.0 + output_len > 2048 {
                continue;
            }
            let output_len = u32::try_from(output_len).unwrap_or(u32::MAX);
            conversations.push(Conversation::single(Prompt::Text(question.to_owned()), output_len));
        }
        again(conversations, count, path)
    }
}

/// `count` of `conversations`, from the beginning again if there are too few.
fn again(conversations: Vec<Conversation>, count: usize, path: &Path) -> anyhow::Result<Vec<Conversation>> {
    if conversations.is_empty() {
        bail!("{} has no prompt that can be used", path.display());
    }
    Ok(conversations.into_iter().cycle().take(count).collect())
}
