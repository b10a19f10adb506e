//! The server over HTTP, with the toy model behind it: real connections to port 0 of loopback, real cache, no download.

mod bad_input;
mod lifecycle;
mod load;
mod page;
mod streams;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kv_cache::Devices;
use serde_json::{Value, json};

use crate::client::{Client, Reply};
use crate::server::{Server, Settings};
use crate::toy::{Gate, Toy};

/// Nothing here takes seconds; whatever does not end in this time never will.
const DEADLINE: Duration = Duration::from_secs(60);

/// A server with the toy behind it.
struct TestServer {
    server: Server,
    client: Client,
    gate: Arc<Gate>,
}

async fn start(toy: Toy, change: impl FnOnce(&mut Settings)) -> TestServer {
    let mut settings = Settings {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        devices: Devices::cpu(1),
        memory_bytes_per_device: 16 << 20,
        ..Settings::default()
    };
    change(&mut settings);
    let gate = toy.gate.clone();
    let server = Server::start(settings, toy.model()).await.expect("it starts");
    let client = Client::new(server.addr);
    TestServer { server, client, gate }
}

impl TestServer {
    async fn post(&self, path: &str, body: &Value) -> Reply {
        self.client.ask("POST", path, body.to_string()).await.expect("an answer")
    }

    async fn complete(&self, prompt: &str, more: Value) -> Value {
        let reply = self.post("/v1/completions", &completion(prompt, more)).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json().unwrap()
    }

    async fn get(&self, path: &str) -> Reply {
        self.client.get(path).await.expect("an answer")
    }

    /// Nobody is served, and nothing of anybody is left.
    async fn is_clean(&self) {
        let idle = tokio::time::timeout(DEADLINE, self.server.app.idle()).await;
        drop(idle.expect("every request leaves").expect("places are never closed"));
        let stats = self.server.app.cache.stats();
        assert_eq!((stats.sequences_open, stats.jobs_in_flight, stats.bytes_in_flight), (0, 0, 0));
    }

    /// Requests that were answered to the end, and that ended otherwise.
    fn ended(&self) -> (u64, u64) {
        let state = self.server.app.figures.lock();
        (state.finished, state.ended_otherwise)
    }

    /// Checks that nothing is left, and ends it.
    async fn end(self) {
        self.is_clean().await;
        let ended = self.server.shutdown(DEADLINE).await.expect("the runner ends well");
        assert!(ended.drained && ended.cache.drained, "{ended:?}");
    }
}

/// A request for the most likely completion of `prompt` by the toy, with the fields of `more`.
fn completion(prompt: &str, more: Value) -> Value {
    let mut body = json!({ "model": "toy", "prompt": prompt, "temperature": 0 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The text that the toy gives.
fn expected(prompt: &str, tokens: usize) -> String {
    let prompt: Vec<u32> = prompt.bytes().map(u32::from).collect();
    crate::toy::answer(&prompt, tokens, 0).0
}
