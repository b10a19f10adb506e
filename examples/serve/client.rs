//! A small HTTP client for the load generator and the tests: a connection per request, so that dropping an answer is a disconnect.

use anyhow::{Context, bail};
use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::net::SocketAddr;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// Where to ask, and with which key.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub(crate) addr: SocketAddr,
    pub(crate) key: Option<String>,
}

/// A whole answer.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: hyper::HeaderMap,
    pub(crate) body: Bytes,
}

#[cfg(test)]
impl Reply {
    /// The body, which has to be JSON.
    pub(crate) fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| String::from_utf8_lossy(&self.body).into_owned())
    }
}

/// Ends its connection when it is dropped.
#[derive(Debug)]
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Client {
    pub(crate) fn new(addr: SocketAddr) -> Self {
        Client { addr, key: None }
    }

    async fn send_over(
        &self,
        stream: TcpStream,
        method: &str,
        path: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<(Connection, Response<Incoming>)> {
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = Connection(tokio::spawn(async move { drop(connection.await) }));
        let mut request = Request::builder().method(method).uri(path).header("host", self.addr.to_string());
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let request =
            request.header("content-type", "application/json").body(Full::new(Bytes::from(body)))?;
        Ok((connection, sender.send_request(request).await?))
    }

    /// Sends a request with `stream` set, and returns when its answer begins.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> anyhow::Result<Events> {
        self.stream_over(TcpStream::connect(self.addr).await?, path, body).await
    }

    /// [`Client::stream`] over a connection of the caller's.
    pub(crate) async fn stream_over(
        &self,
        stream: TcpStream,
        path: &str,
        body: &Value,
    ) -> anyhow::Result<Events> {
        let (connection, response) =
            self.send_over(stream, "POST", path, body.to_string().into_bytes()).await?;
        if response.status() != StatusCode::OK {
            let (status, body) = (response.status(), response.into_body().collect().await?.to_bytes());
            bail!("{status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(Events { body: response.into_body(), buffer: String::new(), _connection: connection })
    }
}

#[cfg(test)]
impl Client {
    /// Sends a request and reads all of its answer.
    pub(crate) async fn ask(
        &self,
        method: &str,
        path: &str,
        body: impl Into<Vec<u8>>,
    ) -> anyhow::Result<Reply> {
        let stream = TcpStream::connect(self.addr).await?;
        let (_connection, response) = self.send_over(stream, method, path, body.into()).await?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Reply { status: parts.status, headers: parts.headers, body })
    }

    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Reply> {
        self.ask("GET", path, Vec::new()).await
    }
}

/// The events of a streamed answer. Dropping it closes the connection.
#[derive(Debug)]
pub(crate) struct Events {
    body: Incoming,
    buffer: String,
    _connection: Connection,
}

impl Events {
    /// The data of the next event; none at the end of the body.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            if let Some(end) = self.buffer.find("\n\n") {
                let event: String = self.buffer.drain(..end + 2).collect();
                let data = event.trim_end().strip_prefix("data: ").context("an event without data")?;
                return Ok(Some(data.to_owned()));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            if let Ok(data) = frame?.into_data() {
                // The server writes whole events, and JSON escapes what is not.
                self.buffer.push_str(std::str::from_utf8(&data)?);
            }
        }
    }
}
