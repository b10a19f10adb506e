//! Text to tokens and back: the byte-level BPE that the model's file describes, and its chat format.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, anyhow};
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

/// One message of a chat.
#[derive(Debug, Clone)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

/// What models are told where a chat has no system message, by how their texts are split (`tokenizer.ggml.pre`).
fn system(split: &str) -> &'static str {
    match split {
        QWEN2 => "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        _ => "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    }
}

/// How Qwen2 splits texts.
const QWEN2: &str = "qwen2";

/// The tokenizer of a model.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    /// For chats without a system message.
    system: &'static str,
    ends: Vec<u32>,
    bytes: Vec<Vec<u8>>,
}

impl Tokenizer {
    /// Reads it from a model's file.
    ///
    /// # Errors
    /// If the file cannot be read or describes none.
    pub fn from_gguf(path: &Path) -> anyhow::Result<Tokenizer> {
        let file = File::open(path).with_context(|| format!("cannot open the model {}", path.display()))?;
        let content = Content::read(&mut BufReader::new(file))
            .with_context(|| format!("{} is no GGUF file that can be read", path.display()))?;
        let mut bpe = tokenizers::Tokenizer::from_gguf(&content)?;
        let split = content.metadata.get("tokenizer.ggml.pre").and_then(|split| split.to_string().ok());
        let split = split.map_or("", String::as_str);
        // candle knows how Qwen2 splits texts. SmolLM2 splits digits, and puts no space before a text.
        if split != QWEN2 {
            let split: [tokenizers::PreTokenizerWrapper; 2] =
                [Digits::new(true).into(), ByteLevel::new(false, true, true).into()];
            bpe.with_pre_tokenizer(Some(Sequence::new(split.to_vec())));
        }
        // What a user writes never becomes a special token.
        bpe.set_encode_special_tokens(true);
        // Chats end with the one, texts with the other.
        let ends =
            ["<|im_end|>", "<|endoftext|>"].iter().filter_map(|token| bpe.token_to_id(token)).collect();
        let special = bpe.get_added_tokens_decoder();
        let bytes = |token: u32| match bpe.id_to_token(token) {
            Some(written) if !special.contains_key(&token) => bytes_of(&written),
            _ => Vec::new(),
        };
        let bytes = (0..bpe.get_vocab_size(true) as u32).map(bytes).collect();
        Ok(Tokenizer { bpe, system: system(split), ends, bytes })
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
            put("system", Some(self.system))?;
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

    /// The bytes that a token stands for, which may be half a character; none for special tokens.
    pub fn bytes(&self, token: u32) -> &[u8] {
        self.bytes.get(token as usize).map_or(&[], Vec::as_slice)
    }
}

/// Byte-level vocabularies write bytes as characters: the printable ones of Latin-1 as themselves, the others as those from U+0100 on.
fn bytes_of(written: &str) -> Vec<u8> {
    let byte = |character: char| {
        let code = u32::from(character);
        match code {
            0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code as u8,
            _ => (0..=255u8)
                .filter(|byte| !matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF))
                .nth(code.wrapping_sub(0x100) as usize)
                .unwrap_or(b'?'),
        }
    };
    written.chars().map(byte).collect()
}
