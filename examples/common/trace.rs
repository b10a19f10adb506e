//! Request traces in the Mooncake format (Qin et al., FAST'25): one JSON object a line, checked line by line.
//!
//! `hash_ids` name blocks of 512 input tokens; equal ids mean an equal prefix up to and including that block. The trace
//! holds no text, so each id expands into 512 made-up token ids that depend on nothing but the id.

use std::io::BufRead;
use std::ops::Range;

use serde::Deserialize;

use crate::mix::mix;

/// Input tokens that one hash id stands for.
pub(crate) const HASH_TOKENS: u32 = 512;
/// Made-up token ids lie under this, as in a real vocabulary.
const VOCABULARY: u64 = 128_000;
/// Far above any model's context; a larger number is a broken line.
const LENGTH_MAX: u32 = 16 << 20;

/// One request of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Request {
    /// Arrival, milliseconds from the start of the trace.
    #[serde(rename = "timestamp")]
    pub(crate) timestamp_ms: u64,
    /// Tokens of the prompt.
    #[serde(rename = "input_length")]
    pub(crate) input_tokens: u32,
    /// Tokens that were generated.
    #[serde(rename = "output_length")]
    pub(crate) output_tokens: u32,
    /// One id for each 512 input tokens; the last may be partial.
    pub(crate) hash_ids: Vec<u64>,
}

impl Request {
    /// All tokens of the sequence at its end.
    pub(crate) fn total_tokens(&self) -> u32 {
        self.input_tokens + self.output_tokens
    }

    /// The token ids at `positions`; generated ones depend on `index`, the request's number in the trace.
    pub(crate) fn token_ids(&self, index: usize, positions: Range<u32>) -> Vec<u32> {
        positions.map(|position| self.token_id(index, position)).collect()
    }

    fn token_id(&self, index: usize, position: u32) -> u32 {
        match position.checked_sub(self.input_tokens) {
            None => token_id(self.hash_ids[(position / HASH_TOKENS) as usize], position % HASH_TOKENS),
            // Generated tokens are this request's own: the top bit keeps them apart from every hash id.
            Some(generated) => token_id(1 << 63 | index as u64, generated),
        }
    }

    fn check(&self, previous_ms: u64) -> Result<(), Problem> {
        let expected = self.input_tokens.div_ceil(HASH_TOKENS) as usize;
        if self.input_tokens == 0 {
            Err(Problem::NoInput)
        } else if let Some(tokens) =
            [self.input_tokens, self.output_tokens].into_iter().find(|t| *t > LENGTH_MAX)
        {
            Err(Problem::TooLong { tokens })
        } else if self.hash_ids.len() != expected {
            Err(Problem::HashIds { input_tokens: self.input_tokens, expected, given: self.hash_ids.len() })
        } else if self.timestamp_ms < previous_ms {
            Err(Problem::OutOfOrder { timestamp_ms: self.timestamp_ms, previous_ms })
        } else {
            Ok(())
        }
    }
}

/// The made-up token id at `offset` of the block that `hash_id` names.
pub(crate) fn token_id(hash_id: u64, offset: u32) -> u32 {
    (mix(hash_id.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(offset)) % VOCABULARY) as u32
}

/// A line that is not a request.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {problem}")]
pub(crate) struct TraceError {
    /// Counted from 1.
    pub(crate) line: usize,
    /// What is wrong with it; part of this error's own message.
    pub(crate) problem: Problem,
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    /// The file cannot be read on.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// Not JSON, or a field is missing or of another type.
    #[error("not a request: {0}")]
    Json(#[from] serde_json::Error),
    /// A request without a prompt.
    #[error("input_length is 0; a request has at least one token")]
    NoInput,
    /// A length that no model has.
    #[error("a length of {tokens} tokens; at most {LENGTH_MAX} make sense")]
    TooLong { tokens: u32 },
    /// The ids do not cover the prompt.
    #[error("{given} hash_ids for input_length {input_tokens}; {expected} expected, one for each 512 tokens")]
    HashIds { input_tokens: u32, expected: usize, given: usize },
    /// Requests are in order of arrival.
    #[error("timestamp {timestamp_ms} after {previous_ms}; requests must be in order of arrival")]
    OutOfOrder { timestamp_ms: u64, previous_ms: u64 },
}

/// Reads at most `limit` requests. Empty lines are skipped.
///
/// # Errors
/// [`TraceError`] with the number of the first line that is not a request.
pub(crate) fn parse(reader: impl BufRead, limit: usize) -> Result<Vec<Request>, TraceError> {
    let mut requests: Vec<Request> = Vec::new();
    for (line, text) in (1..).zip(reader.lines()) {
        if requests.len() == limit {
            break;
        }
        let previous_ms = requests.last().map_or(0, |request| request.timestamp_ms);
        let parsed = text.map_err(Problem::from).and_then(|text| parse_line(&text, previous_ms));
        requests.extend(parsed.map_err(|problem| TraceError { line, problem })?);
    }
    Ok(requests)
}

fn parse_line(text: &str, previous_ms: u64) -> Result<Option<Request>, Problem> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let request: Request = serde_json::from_str(text)?;
    request.check(previous_ms)?;
    Ok(Some(request))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIXTURE: &str = include_str!("../../tests/data/mooncake_small.jsonl");

    #[test]
    fn the_fixture_holds_the_edges() {
        let requests = parse(FIXTURE.as_bytes(), usize::MAX).unwrap();
        assert_eq!(requests.len(), 40);
        for edge in [1, 511, 512, 513] {
            assert!(
                requests.iter().any(|request| request.input_tokens == edge),
                "no prompt of {edge} tokens"
            );
        }
        assert!(requests.iter().any(|request| request.output_tokens == 0));
        assert_eq!(parse(FIXTURE.as_bytes(), 3).unwrap().len(), 3);
    }

    #[test]
    fn equal_hash_ids_expand_to_equal_tokens_and_generated_ones_are_their_own() {
        let request = |hash_ids: &[u64]| Request {
            timestamp_ms: 0,
            input_tokens: 700,
            output_tokens: 10,
            hash_ids: hash_ids.to_vec(),
        };
        let (a, b) = (request(&[5, 6]), request(&[5, 7]));
        assert_eq!(a.token_ids(0, 0..512), b.token_ids(1, 0..512));
        assert_ne!(a.token_ids(0, 512..700), b.token_ids(1, 512..700));
        assert_eq!(a.token_ids(0, 690..710)[..10], a.token_ids(0, 690..700));
        assert_ne!(a.token_ids(0, 700..710), a.token_ids(1, 700..710));
        assert!(a.token_ids(0, 0..710).iter().all(|id| u64::from(*id) < VOCABULARY));
    }

    #[test]
    fn a_malformed_line_is_named() {
        let good = r#"{"timestamp": 5, "input_length": 3, "output_length": 0, "hash_ids": [1]}"#;
        let fails = |bad: &str| parse(format!("{good}\n\n{bad}\n").as_bytes(), usize::MAX).unwrap_err();
        let cases = [
            ("{", "not a request"),
            ("[]", "not a request"),
            (r#"{"timestamp": 5, "input_length": 3, "output_length": 0}"#, "hash_ids"),
            (r#"{"timestamp": 5, "input_length": -3, "output_length": 0, "hash_ids": [1]}"#, "not a request"),
            (
                r#"{"timestamp": 5, "input_length": 0, "output_length": 0, "hash_ids": []}"#,
                "at least one token",
            ),
            (r#"{"timestamp": 5, "input_length": 513, "output_length": 0, "hash_ids": [1]}"#, "2 expected"),
            (
                r#"{"timestamp": 4, "input_length": 3, "output_length": 0, "hash_ids": [1]}"#,
                "order of arrival",
            ),
            (
                r#"{"timestamp": 5, "input_length": 3, "output_length": 99999999, "hash_ids": [1]}"#,
                "99999999 tokens",
            ),
        ];
        for (bad, part) in cases {
            let error = fails(bad);
            assert_eq!(error.line, 3, "{bad}");
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
