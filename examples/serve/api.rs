//! The OpenAI-compatible API as types: what a request may say, what it means here, and how answers and errors look.
//!
//! A parameter that this server does not honour is refused by name rather than ignored: an answer that silently lacks what was asked for is
//! worse than an error. Those that change nothing about an answer (`user`, `metadata`) are taken and forgotten.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Completion tokens where a `/v1/completions` request does not say, as in the OpenAI API.
const COMPLETION_TOKENS_DEFAULT: u64 = 16;
const STOPS_MAX: usize = 4;

/// One value or a list of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// `prompt` of a completion.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum CompletionPrompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// One message of a chat.
#[derive(Debug, Clone, Deserialize)]
struct RawMessage {
    role: Role,
    /// An answer of the assistant may have none.
    content: Option<Content>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// The operator. `developer` is the newer name of the same.
    #[serde(alias = "developer")]
    System,
    User,
    Assistant,
}

impl Role {
    /// As chat templates name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part {
    Text { text: String },
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// A request as it comes. Both routes take it; what only one of them has is checked in [`parse`].
#[derive(Debug, Deserialize)]
struct Raw {
    model: String,
    prompt: Option<CompletionPrompt>,
    messages: Option<Vec<RawMessage>>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    n: Option<u64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    stop: Option<OneOrMany>,
    seed: Option<i64>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Which route it came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Completion,
    Chat,
}

/// What the model is to go on from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Input {
    Text(String),
    Tokens(Vec<u32>),
    Chat(Vec<(Role, String)>),
}

/// A request that makes sense by itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ask {
    pub(crate) kind: Kind,
    pub(crate) model: String,
    pub(crate) input: Input,
    /// None: as many as fit.
    pub(crate) max_tokens: Option<u64>,
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) seed: Option<u64>,
    pub(crate) stops: Vec<String>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

/// Reads the body of a request.
pub(crate) fn parse(kind: Kind, body: &[u8]) -> Result<Ask, ApiError> {
    let body: Value = serde_json::from_slice(body).map_err(|error| unreadable(&error))?;
    check_types(&body)?;
    let raw: Raw = serde_json::from_value(body).map_err(|error| unreadable(&error))?;
    refuse_what_is_not_done(&raw.others)?;
    let of_other_route = match kind {
        Kind::Completion => raw.messages.is_some().then_some("messages"),
        Kind::Chat => raw.prompt.is_some().then_some("prompt"),
    };
    if let Some(name) = of_other_route {
        return Err(unrecognised(name));
    }
    let within = |param, value: Option<f32>, most: f32| match value {
        Some(value) if !(0.0..=most).contains(&value) => {
            let message = format!("Invalid '{param}': {value} is not between 0 and {most}.");
            Err(ApiError::invalid(message, param, "decimal_out_of_range"))
        }
        value => Ok(value.unwrap_or(1.0)),
    };
    let temperature = within("temperature", raw.temperature, 2.0)?;
    let top_p = within("top_p", raw.top_p, 1.0)?;
    if raw.n.is_some_and(|n| n != 1) {
        let message =
            "Invalid 'n': this server gives one choice per request; send the request again for more.";
        return Err(ApiError::invalid(message, "n", "unsupported_value"));
    }
    let max_tokens = raw.max_completion_tokens.or(raw.max_tokens);
    let stream = raw.stream.unwrap_or(false);
    if raw.stream_options.is_some() && !stream {
        let message = "The 'stream_options' parameter is only allowed when 'stream' is enabled.";
        return Err(ApiError::invalid(message, "stream_options", "invalid_value"));
    }
    let input = match kind {
        Kind::Completion => completion_input(raw.prompt)?,
        Kind::Chat => chat_input(raw.messages)?,
    };
    Ok(Ask {
        kind,
        model: raw.model,
        input,
        max_tokens: max_tokens.or((kind == Kind::Completion).then_some(COMPLETION_TOKENS_DEFAULT)),
        temperature,
        top_p,
        seed: raw.seed.map(|seed| seed as u64),
        stops: stops(raw.stop)?,
        stream,
        include_usage: raw.stream_options.unwrap_or_default().include_usage,
    })
}

/// Says of the first field that is missing or of a wrong type which it is, in words for a caller rather than for us.
fn check_types(body: &Value) -> Result<(), ApiError> {
    let Some(fields) = body.as_object() else {
        return Err(ApiError::bad_request(
            "We could not parse the JSON body of your request: expected an object.",
        ));
    };
    if !fields.contains_key("model") {
        return Err(missing("model"));
    }
    type Is = fn(&Value) -> bool;
    let integer: (&str, Is) = ("an integer", |value| value.is_i64() || value.is_u64());
    let number: (&str, Is) = ("a number", Value::is_number);
    let known: [(&str, (&str, Is)); 11] = [
        ("model", ("a string", Value::is_string)),
        ("prompt", ("a string or an array", |value| value.is_string() || value.is_array())),
        (
            "messages",
            ("an array of objects", |value| {
                value.as_array().is_some_and(|messages| messages.iter().all(Value::is_object))
            }),
        ),
        ("max_tokens", integer),
        ("max_completion_tokens", integer),
        ("n", integer),
        ("seed", integer),
        ("temperature", number),
        ("top_p", number),
        ("stream", ("a boolean", Value::is_boolean)),
        ("stop", ("a string or an array", |value| value.is_string() || value.is_array())),
    ];
    for (name, (expected, is)) in known {
        let Some(value) = fields.get(name).filter(|value| !value.is_null()) else { continue };
        if !is(value) {
            let message = format!("Invalid type for '{name}': expected {expected}, but got {value} instead.");
            // Of a value that is long, the beginning says enough.
            let message = message.chars().take(300).collect::<String>();
            return Err(ApiError::invalid(message, name, "invalid_type"));
        }
    }
    for name in ["max_tokens", "max_completion_tokens", "n"] {
        if let Some(value) = fields.get(name).and_then(Value::as_i64).filter(|value| *value < 1) {
            let message = format!(
                "Invalid '{name}': integer below minimum value. Expected a value >= 1, but got {value} instead."
            );
            return Err(ApiError::invalid(message, name, "integer_below_min_value"));
        }
    }
    Ok(())
}

fn unrecognised(name: &str) -> ApiError {
    let message = format!("Unrecognized request argument supplied: {name}");
    ApiError { param: Some(name.to_owned()), ..ApiError::bad_request(message) }
}

fn unreadable(error: &serde_json::Error) -> ApiError {
    match error.classify() {
        serde_json::error::Category::Data => ApiError::bad_request(format!("Invalid request: {error}.")),
        _ => ApiError::bad_request(format!("We could not parse the JSON body of your request: {error}.")),
    }
}

/// Parameters that this server knows of and does not do are harmless where they ask for nothing.
fn refuse_what_is_not_done(others: &Map<String, Value>) -> Result<(), ApiError> {
    for (name, value) in others {
        let nothing = match name.as_str() {
            "user" | "metadata" | "store" | "service_tier" | "safety_identifier" | "prompt_cache_key" => true,
            // There are no tools to call.
            "parallel_tool_calls" => true,
            "presence_penalty" | "frequency_penalty" | "top_logprobs" => value.as_f64() == Some(0.0),
            "echo" | "logprobs" => value == &Value::Bool(false),
            "best_of" => value.as_u64() == Some(1),
            "logit_bias" => value.as_object().is_some_and(Map::is_empty),
            "tools" => value.as_array().is_some_and(Vec::is_empty),
            "response_format" => value.get("type").is_some_and(|kind| kind == "text"),
            "suffix" | "tool_choice" | "functions" | "function_call" => false,
            _ => return Err(unrecognised(name)),
        };
        if !nothing && !value.is_null() {
            let message = format!("Unsupported parameter: this server does not do '{name}' with that value.");
            return Err(ApiError::invalid(message, name, "unsupported_parameter"));
        }
    }
    Ok(())
}

fn missing(param: &str) -> ApiError {
    let message = format!("Missing required parameter: '{param}'.");
    ApiError::invalid(message, param, "missing_required_parameter")
}

fn completion_input(prompt: Option<CompletionPrompt>) -> Result<Input, ApiError> {
    let many = || {
        let message = "Invalid 'prompt': this server takes one prompt per request.";
        ApiError::invalid(message, "prompt", "unsupported_value")
    };
    let single = |list: usize| if list == 1 { Ok(()) } else { Err(many()) };
    Ok(match prompt.ok_or_else(|| missing("prompt"))? {
        CompletionPrompt::Text(text) => Input::Text(text),
        CompletionPrompt::Texts(mut texts) => {
            single(texts.len())?;
            Input::Text(texts.remove(0))
        }
        CompletionPrompt::Tokens(tokens) => Input::Tokens(tokens),
        CompletionPrompt::TokenLists(mut lists) => {
            single(lists.len())?;
            Input::Tokens(lists.remove(0))
        }
    })
}

fn chat_input(messages: Option<Vec<RawMessage>>) -> Result<Input, ApiError> {
    let messages = messages.ok_or_else(|| missing("messages"))?;
    if messages.is_empty() {
        let message = "Invalid 'messages': empty array. Expected an array with minimum length 1.";
        return Err(ApiError::invalid(message, "messages", "empty_array"));
    }
    let text = |(at, message): (usize, RawMessage)| {
        for (name, value) in &message.others {
            // The template has no place for names; answers come back as clients got them, with fields that say nothing.
            let nothing = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
            if name != "name" && !nothing {
                let param = format!("messages[{at}].{name}");
                let message =
                    format!("Unsupported parameter: this server does not do '{param}' with that value.");
                return Err(ApiError::invalid(message, &param, "unsupported_parameter"));
            }
        }
        let content = match message.content {
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => parts.into_iter().map(|Part::Text { text }| text).collect(),
            None if message.role == Role::Assistant => String::new(),
            None => return Err(missing(&format!("messages[{at}].content"))),
        };
        Ok((message.role, content))
    };
    Ok(Input::Chat(messages.into_iter().enumerate().map(text).collect::<Result<_, _>>()?))
}

fn stops(stop: Option<OneOrMany>) -> Result<Vec<String>, ApiError> {
    let stops = match stop {
        None => Vec::new(),
        Some(OneOrMany::One(stop)) => vec![stop],
        Some(OneOrMany::Many(stops)) => stops,
    };
    if stops.len() > STOPS_MAX || stops.iter().any(String::is_empty) {
        let message = format!("Invalid 'stop': expected up to {STOPS_MAX} strings, none of them empty.");
        return Err(ApiError::invalid(message, "stop", "invalid_value"));
    }
    Ok(stops)
}

/// Why an answer has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FinishReason {
    /// The model was done, or a stop string came.
    Stop,
    /// As many tokens as were asked for.
    Length,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    /// Tokens of the prompt that were in the cache when it was opened first.
    pub(crate) cached_tokens: u32,
}

impl Usage {
    pub(crate) fn json(&self) -> Value {
        serde_json::json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": { "cached_tokens": self.cached_tokens },
        })
    }
}

/// What all objects of one answer say.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    /// Unix time.
    pub(crate) created_s: u64,
    pub(crate) model: String,
}

impl Header {
    fn object(&self, object: &str, choices: Value) -> Value {
        serde_json::json!({
            "id": self.id,
            "object": object,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        })
    }

    /// A whole answer.
    pub(crate) fn answer(&self, text: &str, finish: FinishReason, usage: &Usage) -> Value {
        let (object, mut choice) = match self.kind {
            Kind::Completion => ("text_completion", serde_json::json!({ "text": text })),
            Kind::Chat => {
                let message = serde_json::json!({ "role": "assistant", "content": text, "refusal": null });
                ("chat.completion", serde_json::json!({ "message": message }))
            }
        };
        choice["index"] = 0.into();
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = serde_json::json!(finish);
        let mut answer = self.object(object, serde_json::json!([choice]));
        answer["usage"] = usage.json();
        answer
    }

    /// A piece of a stream. The first of a chat names the role.
    pub(crate) fn piece(&self, text: Option<&str>, first: bool, finish: Option<FinishReason>) -> Value {
        let mut choice = serde_json::json!({ "index": 0, "logprobs": null, "finish_reason": finish });
        match self.kind {
            Kind::Completion => choice["text"] = text.unwrap_or_default().into(),
            Kind::Chat => {
                let mut delta = Map::new();
                if first {
                    delta.insert("role".into(), "assistant".into());
                }
                if let Some(text) = text {
                    delta.insert("content".into(), text.into());
                }
                choice["delta"] = delta.into();
            }
        }
        self.object(self.stream_object(), serde_json::json!([choice]))
    }

    /// The last piece of a stream, for those who have asked for it.
    pub(crate) fn usage_piece(&self, usage: &Usage) -> Value {
        let mut piece = self.object(self.stream_object(), serde_json::json!([]));
        piece["usage"] = usage.json();
        piece
    }

    fn stream_object(&self) -> &'static str {
        match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        }
    }
}
