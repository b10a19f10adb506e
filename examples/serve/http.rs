//! Routes: what comes in over HTTP, and how answers go out, whole or as server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, middleware};
use hyper::body::Frame;
use kv_cache::Tenant;
use metrics::counter;
use serde_json::Value;

use crate::api::{FinishReason, Kind, Usage, parse};
use crate::app::{Answer, App};
use crate::error::ApiError;
use crate::outbox::Event;
use crate::{prometheus, status};

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/completions", post(|state, request| answer(state, Kind::Completion, request)))
        .route("/v1/chat/completions", post(|state, request| answer(state, Kind::Chat, request)))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/health", get(health))
        .route("/metrics", get(metrics_text))
        .route("/status", get(status_json))
        .route("/", get(page))
        .fallback(unknown_url)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::map_response(count_refusals))
        .with_state(app)
}

async fn unknown_url(request: Request) -> ApiError {
    ApiError::unknown_url(request.method().as_str(), request.uri().path())
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::wrong_method(request.method().as_str(), request.uri().path())
}

async fn count_refusals(response: Response) -> Response {
    if response.status().is_client_error() || response.status().is_server_error() {
        let status = response.status().as_str().to_owned();
        counter!("serve_refusals_total", "status" => status).increment(1);
    }
    response
}

/// Both kinds of completion.
async fn answer(State(app): State<Arc<App>>, kind: Kind, request: Request) -> Result<Response, ApiError> {
    let tenant = tenant(request.headers());
    let body = read_body(&app, request.into_body()).await?;
    let mut answer = app.submit(parse(kind, &body)?, tenant).await?;
    // Until the first event nothing is sent, so that what goes wrong before it has a status of its own. A client that goes away
    // meanwhile drops this future, and the inbox with it.
    match answer.inbox.next().await {
        Some(Event::Failed(error)) => Err(error),
        None => Err(given_up()),
        Some(first) if answer.stream => Ok(stream(answer, first)),
        Some(first) => whole(answer, first).await,
    }
}

/// Whoever has a key shares prefixes with those who have the same: how long a prompt takes says whether it was asked before, and
/// that is nobody else's business. Keys are names here; checking them is for a gateway in front.
fn tenant(headers: &HeaderMap) -> Tenant {
    let key = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = key.and_then(|value| value.strip_prefix("Bearer ")).map(str::trim);
    key.filter(|key| !key.is_empty()).map_or_else(Tenant::default, |key| Tenant::new(format!("key:{key}")))
}

async fn read_body(app: &App, body: Body) -> Result<Bytes, ApiError> {
    let most = app.body_bytes_max;
    // Its length is known from the header, mostly: no need to read it then.
    if body.size_hint().lower() > most as u64 {
        return Err(ApiError::body_too_large(most));
    }
    let read = tokio::time::timeout(app.body_within, axum::body::to_bytes(body, most));
    read.await.map_err(|_| ApiError::body_too_slow())?.map_err(|error| {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
        while let Some(error) = cause {
            if error.is::<http_body_util::LengthLimitError>() {
                return ApiError::body_too_large(most);
            }
            cause = error.source();
        }
        // Cut off, or in pieces that are none.
        ApiError::bad_request(format!("The body of your request could not be read: {error}."))
    })
}

fn given_up() -> ApiError {
    ApiError::internal("The server has given this answer up.")
}

fn json(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

async fn whole(mut answer: Answer, first: Event) -> Result<Response, ApiError> {
    let (mut text, mut event) = (String::new(), Some(first));
    loop {
        match event {
            Some(Event::Text(piece)) => text.push_str(&piece),
            Some(Event::Done(finish, usage)) => {
                return Ok(json(&answer.header.answer(&text, finish, &usage)));
            }
            Some(Event::Failed(error)) => return Err(error),
            None => return Err(given_up()),
        }
        event = answer.inbox.next().await;
    }
}

fn stream(answer: Answer, first: Event) -> Response {
    let body = EventStream { answer, next: Some(first), pieces: 0, is_over: false };
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// An answer as server-sent events: one for each piece of text, one that says why it ended, `[DONE]`.
struct EventStream {
    answer: Answer,
    next: Option<Event>,
    pieces: u64,
    is_over: bool,
}

impl EventStream {
    fn bytes(&mut self, event: Option<Event>) -> Bytes {
        let header = &self.answer.header;
        let first = self.pieces == 0;
        self.pieces += 1;
        let text = match event {
            Some(Event::Text(text)) => data(&header.piece(Some(&text), first, None)),
            Some(Event::Done(finish, usage)) => {
                self.is_over = true;
                self.end(first, finish, &usage)
            }
            // The status line is long gone: the error takes the place of `[DONE]`.
            failed => {
                self.is_over = true;
                let error = match failed {
                    Some(Event::Failed(error)) => error,
                    _ => given_up(),
                };
                data(&error.json())
            }
        };
        text.into()
    }

    fn end(&self, first: bool, finish: FinishReason, usage: &Usage) -> String {
        let header = &self.answer.header;
        let mut text = data(&header.piece(None, first, Some(finish)));
        if self.answer.include_usage {
            text += &data(&header.usage_piece(usage));
        }
        text + "data: [DONE]\n\n"
    }
}

fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

impl HttpBody for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let event = match self.next.take() {
            Some(event) => Some(event),
            None => std::task::ready!(self.answer.inbox.poll_next(context)),
        };
        Poll::Ready(Some(Ok(Frame::data(self.bytes(event)))))
    }
}

fn model_json(app: &App) -> Value {
    serde_json::json!({ "id": app.model, "object": "model", "created": app.created_s, "owned_by": "kv-cache" })
}

async fn models(State(app): State<Arc<App>>) -> Response {
    json(&serde_json::json!({ "object": "list", "data": [model_json(&app)] }))
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    if id == app.model { Ok(json(&model_json(&app))) } else { Err(ApiError::unknown_model(&id)) }
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let complaints = app.complaints();
    let status = if complaints.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let word = if complaints.is_empty() { "ok" } else { "unavailable" };
    let steps = app.figures.lock().steps;
    let body = serde_json::json!({ "status": word, "steps": steps, "complaints": complaints });
    (status, json(&body)).into_response()
}

async fn metrics_text(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], prometheus::render(&app.cache)).into_response()
}

/// Which samples the page has.
#[derive(Debug, Default, serde::Deserialize)]
struct Since {
    #[serde(default)]
    since: u64,
}

async fn status_json(State(app): State<Arc<App>>, query: Result<Query<Since>, QueryRejection>) -> Response {
    let since = query.map_or(0, |Query(query)| query.since);
    ([(header::CACHE_CONTROL, "no-store")], json(&status::json(&app, since))).into_response()
}

async fn page() -> Response {
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], include_str!("page.html")).into_response()
}
