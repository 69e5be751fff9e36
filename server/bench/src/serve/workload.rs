//! What is asked: conversations of one or more turns.

use serde_json::Value;

use super::client::Role;

/// One message to the server.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    /// Text, and its number of tokens if known.
    Text(String),
    /// Token ids (completions route).
    Tokens(Vec<u32>),
    /// Messages as a data set has them.
    Messages(Vec<Value>),
}

impl Prompt {
    /// Number of tokens where it is certain without asking anybody.
    pub(crate) fn num_tokens(&self) -> Option<u64> {
        match self {
            Self::Tokens(ids) => Some(ids.len() as u64),
            Self::Text(_) | Self::Messages(_) => None,
        }
    }
}

/// A prompt and the length of its answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Turn {
    pub(crate) prompt: Prompt,
    pub(crate) max_tokens: u32,
}

/// Turns that follow each other: each is sent when the answer to the one before has come.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Conversation {
    /// What stands before the first turn.
    pub(crate) opening: Vec<(Role, String)>,
    pub(crate) turns: Vec<Turn>,
}

impl Conversation {
    /// A single question.
    pub(crate) fn single(prompt: Prompt, max_tokens: u32) -> Self {
        Self { opening: Vec::new(), turns: vec![Turn { prompt, max_tokens }] }
    }
}

/// All that a run asks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Workload {
    pub(crate) conversations: Vec<Conversation>,
    /// Do not stop at the end-of-text token.
    pub(crate) ignore_eos: bool,
}

impl Workload {
    /// Requests in all.
    pub(crate) fn num_requests(&self) -> usize {
        self.conversations.iter().map(|conversation| conversation.turns.len()).sum()
    }
}
