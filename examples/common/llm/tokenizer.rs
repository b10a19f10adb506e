//! Text to tokens and back: the byte-level BPE that the model's file describes, and its chat format.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, anyhow};
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::tokenizer::TokenizerFromGguf;

/// One message of a chat.
#[derive(Debug, Clone)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

/// What SmolLM2 is told where a chat has no system message.
const SYSTEM: &str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

/// The tokenizer of a model.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    ends: Vec<u32>,
}

impl Tokenizer {
    /// Reads it from a model's file.
    ///
    /// # Errors
    /// If the file cannot be read or describes none.
    pub fn from_gguf(path: &Path) -> anyhow::Result<Tokenizer> {
        let file = File::open(path).with_context(|| format!("cannot open the model {}", path.display()))?;
        let content = Content::read(&mut BufReader::new(file))?;
        let mut bpe = tokenizers::Tokenizer::from_gguf(&content)?;
        // What a user writes never becomes a special token.
        bpe.set_encode_special_tokens(true);
        // Chats end with the one, texts with the other.
        let ends =
            ["<|im_end|>", "<|endoftext|>"].iter().filter_map(|token| bpe.token_to_id(token)).collect();
        Ok(Tokenizer { bpe, ends })
    }

    /// Tokens of a text. What looks like a special token is text.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let encoding = self.bpe.encode_fast(text, false).map_err(|error| anyhow!(error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Tokens of a chat, up to where the assistant is to answer.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_chat(&self, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut put = |role: &str, content: Option<&str>| {
            ids.push(self.special("<|im_start|>")?);
            ids.extend(self.encode(&format!("{role}\n"))?);
            if let Some(content) = content {
                ids.extend(self.encode(content)?);
                ids.push(self.special("<|im_end|>")?);
                ids.extend(self.encode("\n")?);
            }
            anyhow::Ok(())
        };
        if messages.first().is_none_or(|first| first.role != "system") {
            put("system", Some(SYSTEM))?;
        }
        for message in messages {
            put(&message.role, Some(&message.content))?;
        }
        put("assistant", None)?;
        Ok(ids)
    }

    fn special(&self, token: &str) -> anyhow::Result<u32> {
        self.bpe.token_to_id(token).with_context(|| format!("the model has no token {token}"))
    }

    /// Tokens behind which there is nothing more to say.
    pub fn is_end(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// The text of some tokens, special ones left out.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn decode(&self, tokens: &[u32]) -> anyhow::Result<String> {
        self.bpe.decode(tokens, true).map_err(|error| anyhow!(error))
    }

    /// For tokens that come one by one.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, tokens: Vec::new(), given: 0 }
    }
}

/// Text of tokens as they come. A character whose bytes are spread over tokens is held back until it is whole.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    /// Bytes of the held tokens' text that were given out.
    given: usize,
}

impl TextStream<'_> {
    /// The text that `token` completes.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> anyhow::Result<String> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.tokens.len() < 8 {
            return Ok(String::new());
        }
        let new = text.get(self.given..).unwrap_or_default().to_owned();
        // The last token stays, so that the next is decoded as what follows it.
        self.tokens.drain(..self.tokens.len() - 1);
        self.given = self.tokenizer.decode(&self.tokens)?.len();
        Ok(new)
    }
}
