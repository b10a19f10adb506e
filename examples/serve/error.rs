//! Errors in the shape of the OpenAI API: `{"error": {"message", "type", "param", "code"}}` and its status codes.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

/// An answer that is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// `type` in JSON.
    pub(crate) kind: &'static str,
    /// The parameter that is wrong.
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
    pub(crate) retry_after_s: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), kind, param: None, code: None, retry_after_s: None }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A parameter that is wrong.
    pub(crate) fn invalid(message: impl Into<String>, param: &str, code: &'static str) -> Self {
        ApiError { param: Some(param.to_owned()), code: Some(code), ..ApiError::bad_request(message) }
    }

    pub(crate) fn unknown_model(model: &str) -> Self {
        let message = format!("The model `{model}` does not exist or you do not have access to it.");
        let error = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        ApiError { param: Some("model".into()), code: Some("model_not_found"), ..error }
    }

    /// More tokens than a sequence may have: `prompt` of the prompt and `completion` that were asked for.
    pub(crate) fn context_length(limit: u32, prompt: u64, completion: u64, param: &str) -> Self {
        let message = format!(
            "This model's maximum context length is {limit} tokens. However, you requested {} tokens ({prompt} in the \
             prompt, {completion} in the completion). Please reduce the length of either one.",
            prompt.saturating_add(completion)
        );
        ApiError::invalid(message, param, "context_length_exceeded")
    }

    pub(crate) fn unknown_url(method: &str, path: &str) -> Self {
        let error = ApiError::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("Invalid URL ({method} {path})"),
        );
        ApiError { code: Some("unknown_url"), ..error }
    }

    pub(crate) fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!(
            "Not allowed to {method} on {path}. (HINT: Perhaps you meant to use a different HTTP method?)"
        );
        let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message);
        ApiError { code: Some("method_not_supported"), ..error }
    }

    pub(crate) fn body_too_large(bytes_max: usize) -> Self {
        let message = format!("The request body is larger than {bytes_max} bytes.");
        let error = ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message);
        ApiError { code: Some("request_too_large"), ..error }
    }

    pub(crate) fn body_too_slow() -> Self {
        let message = "The request body did not arrive in time.";
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    /// Everything that may wait does.
    pub(crate) fn overloaded() -> Self {
        let message = "The server has as many requests as it can hold. Please retry after a moment.";
        let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "requests", message);
        ApiError { code: Some("rate_limit_exceeded"), retry_after_s: Some(1), ..error }
    }

    pub(crate) fn shutting_down() -> Self {
        let message = "The server is shutting down.";
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        ApiError { code: Some("shutting_down"), ..error }
    }

    /// The request alone takes more than the cache has.
    pub(crate) fn does_not_fit(tokens: usize) -> Self {
        let message =
            format!("The cache has no room for a sequence of {tokens} tokens, even with nobody else in it.");
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        ApiError { code: Some("cache_capacity_exceeded"), ..error }
    }

    /// Something that is the server's fault. What exactly is in its log.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::json!({ "error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.json().to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}
