//! The server as a whole: a cache that is full, queues that are, health, metrics, faults, the end.

use std::sync::Arc;
use std::time::Duration;

use kv_cache::{BlockingCache, OpenOptions};
use serde_json::json;
use tokio::task::JoinSet;

use super::{DEADLINE, TestServer, completion, expected, start};
use crate::model::{Chunk, Decoder, Landed, Model};
use crate::server::{Server, Settings};
use crate::toy::Toy;

/// Many answers at once, each with a prompt and a text of its own; all have to be right.
async fn all_at_once(server: &TestServer, requests: usize, prompt_tokens: usize, tokens: usize) {
    let mut answers = JoinSet::new();
    for at in 0..requests {
        let prompt: String = format!("{at:04} ").chars().cycle().take(prompt_tokens).collect();
        let (client, body) = (server.client.clone(), completion(&prompt, json!({ "max_tokens": tokens })));
        answers.spawn(async move {
            let reply = client.ask("POST", "/v1/completions", body.to_string()).await.unwrap();
            (prompt, reply.json().unwrap())
        });
    }
    while let Some(answer) = answers.join_next().await {
        let (prompt, answer) = answer.unwrap();
        assert_eq!(answer["choices"][0]["text"], expected(&prompt, tokens), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_cache_preempts_and_everybody_gets_the_right_text() {
    // A block is a KiB: room for a hundred or so, where 24 answers of 13 blocks each want 312.
    let server = start(Toy::default(), |settings| settings.memory_bytes_per_device = 128 << 10).await;
    all_at_once(&server, 24, 100, 300).await;
    let preemptions = server.server.app.figures.lock().preemptions;
    assert!(preemptions > 0);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_shards_serve_as_one() {
    let server = start(Toy::default(), |settings| {
        settings.devices = kv_cache::Devices::cpu(2);
        settings.memory_bytes_per_device = 96 << 10;
    })
    .await;
    all_at_once(&server, 24, 100, 200).await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_sequence_is_what_the_cache_holds() {
    let server = start(Toy::default(), |settings| settings.memory_bytes_per_device = 64 << 10).await;
    let limit = server.server.app.context_tokens as usize;
    assert!((1024..=2048).contains(&limit), "{limit} tokens in 64 blocks");
    let over = server.post("/v1/completions", &completion("a", json!({ "max_tokens": limit }))).await;
    assert_eq!(over.json().unwrap()["error"]["code"], "context_length_exceeded");
    // The longest that is let in does get through.
    let answer = server.complete("a", json!({ "max_tokens": limit - 1 })).await;
    assert_eq!(answer["choices"][0]["text"], expected("a", limit - 1));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_alone_gets_an_error() {
    let server = start(Toy::default(), |settings| settings.memory_bytes_per_device = 64 << 10).await;
    let limit = server.server.app.context_tokens;
    // Somebody else uses the same cache.
    let others = OpenOptions::default().reserve_tokens(limit - 64);
    let others = server.server.app.cache.open("others", others).await.unwrap();
    let prompt = "a".repeat(200);
    let reply = server.post("/v1/completions", &completion(&prompt, json!({}))).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json().unwrap()["error"]["code"]),
        (503, &json!("cache_capacity_exceeded"))
    );
    // One whose prompt fits and whose answer does not.
    let grows = server.post("/v1/completions", &completion("a", json!({ "max_tokens": 300 }))).await;
    assert_eq!(grows.status, 503, "{grows:?}");
    others.close().await.unwrap();
    assert_eq!(server.complete(&prompt, json!({})).await["choices"][0]["text"], expected(&prompt, 16));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_finds_all_places_taken_is_told_when_to_come_back() {
    let change = |settings: &mut Settings| (settings.running_max, settings.waiting_max) = (1, 2);
    let server = start(Toy::default(), change).await;
    server.gate.close();
    let mut answers = JoinSet::new();
    for _ in 0..3 {
        let (client, body) = (server.client.clone(), completion("wait", json!({})));
        answers.spawn(async move { client.ask("POST", "/v1/completions", body.to_string()).await });
    }
    while server.server.app.requests() < 3 {
        assert_eq!(server.get("/health").await.status, 200);
    }
    let refused = server.post("/v1/completions", &completion("me too", json!({}))).await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.json().unwrap()["error"]["code"], "rate_limit_exceeded");
    server.gate.open();
    while let Some(answer) = answers.join_next().await {
        assert_eq!(answer.unwrap().unwrap().json().unwrap()["choices"][0]["text"], expected("wait", 16));
    }
    server.is_clean().await;
    assert_eq!(server.complete("me too", json!({})).await["choices"][0]["text"], expected("me too", 16));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_asks_for_progress() {
    let server = start(Toy::default(), |settings| settings.stalled_after = Duration::ZERO).await;
    assert_eq!(server.get("/health").await.status, 200);
    server.gate.close();
    let (client, body) = (server.client.clone(), completion("stuck", json!({})));
    let stuck = tokio::spawn(async move { client.ask("POST", "/v1/completions", body.to_string()).await });
    let gate = server.gate.clone();
    tokio::task::spawn_blocking(move || gate.wait_for_step()).await.unwrap();
    let health = server.get("/health").await;
    assert_eq!(health.status, 503);
    assert!(health.json().unwrap()["complaints"][0].as_str().unwrap().contains("no step has ended"));
    server.gate.open();
    assert_eq!(stuck.await.unwrap().unwrap().status, 200);
    server.is_clean().await;
    assert_eq!(server.get("/health").await.status, 200);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_shard_shows_and_the_other_serves_on() {
    let server = start(Toy::default(), |settings| settings.devices = kv_cache::Devices::cpu(2)).await;
    server.complete("before", json!({})).await;
    server.server.app.cache.faults().panic_device(0);
    let health = async { while server.get("/health").await.status == 200 {} };
    tokio::time::timeout(DEADLINE, health).await.expect("health knows");
    assert_eq!(server.complete("after", json!({})).await["choices"][0]["text"], expected("after", 16));
    let metrics = String::from_utf8(server.get("/metrics").await.body.to_vec()).unwrap();
    assert!(metrics.contains("kv_cache_shard_lost"));
    server.is_clean().await;
    let ended = server.server.shutdown(DEADLINE).await.unwrap();
    assert!(ended.drained);
}

/// Fails, and then panics.
struct Broken(u32);

impl Decoder for Broken {
    fn step(&mut self, _: &BlockingCache, _: &[Chunk<'_>]) -> anyhow::Result<Vec<Landed>> {
        self.0 += 1;
        match self.0 {
            1 => anyhow::bail!("weights are gone"),
            2 => Ok(Vec::new()),
            _ => panic!("a defect of the model, as this test wants it"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_fails_fails_its_requests_and_one_that_panics_shows_in_health() {
    let settings = Settings {
        listen: ([127, 0, 0, 1], 0).into(),
        memory_bytes_per_device: 1 << 20,
        ..Settings::default()
    };
    let model = Model { decoder: Box::new(Broken(0)), ..Toy::default().model() };
    let server = Server::start(settings, model).await.unwrap();
    let client = crate::client::Client::new(server.addr);
    let server = TestServer { server, client, gate: Arc::default() };
    for healthy in [true, true, false, false] {
        let reply = server.post("/v1/completions", &completion("a", json!({}))).await;
        assert_eq!(reply.status, 500);
        assert_eq!(reply.json().unwrap()["error"]["type"], "server_error");
        let health = async { while (server.get("/health").await.status == 200) != healthy {} };
        tokio::time::timeout(DEADLINE, health).await.expect("health knows");
    }
    // A thread that unwinds drops its sequences, and these close in their own time.
    let cache = &server.server.app.cache;
    let closed = async {
        while cache.stats().sequences_open > 0 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(DEADLINE, closed).await.expect("the dropped sequence closes");
    server.is_clean().await;
    assert!(server.server.shutdown(DEADLINE).await.is_err(), "the panic is told");
}

/// Its answer is done long before it has read it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_client_reads_its_answer_to_the_end_while_the_server_shuts_down() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = start(Toy::default(), |settings| settings.send_buffer_bytes = 4096).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(2048).unwrap();
    let mut stream = socket.connect(server.server.addr).await.unwrap();
    let body = completion("a long story", json!({ "max_tokens": 500, "stream": true })).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    let mut answer = vec![0; 100];
    stream.read_exact(&mut answer).await.unwrap();
    let shutdown = tokio::spawn(server.server.shutdown(DEADLINE));
    let reading = async {
        while stream.read_buf(&mut answer).await.unwrap() > 0 {
            // Slower than the model.
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    };
    tokio::time::timeout(DEADLINE, reading).await.expect("the stream ends");
    assert!(String::from_utf8_lossy(&answer).contains("[DONE]"), "the end is missing");
    let ended = shutdown.await.unwrap().unwrap();
    assert!(ended.drained && ended.cache.drained, "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_lets_streams_end_and_takes_no_more() {
    let server = start(Toy::default(), |_| {}).await;
    // So many that the end is far off when the gate closes.
    let body = completion("last words", json!({ "max_tokens": 2000, "stream": true }));
    let mut events = server.client.stream("/v1/completions", &body).await.unwrap();
    server.gate.close();
    let (app, client) = (server.server.app.clone(), server.client.clone());
    let end = tokio::spawn(server.server.shutdown(DEADLINE));
    let drains = async {
        while !app.is_draining.load(std::sync::atomic::Ordering::Relaxed) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, drains).await.unwrap();
    let late =
        client.ask("POST", "/v1/completions", completion("late", json!({})).to_string()).await.unwrap();
    assert_eq!(
        (late.status.as_u16(), &late.json().unwrap()["error"]["code"]),
        (503, &json!("shutting_down"))
    );
    assert_eq!(client.get("/health").await.unwrap().status, 503);
    server.gate.open();
    let mut last = String::new();
    while let Some(event) = events.next().await.unwrap() {
        last = event;
    }
    assert_eq!(last, "[DONE]");
    let ended = end.await.unwrap().unwrap();
    assert!(ended.drained && ended.cache.drained, "{ended:?}");
    assert!(client.get("/health").await.is_err(), "the port is closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_does_not_end_in_time_is_told() {
    let server = start(Toy::default(), |_| {}).await;
    let body = completion("on and on", json!({ "max_tokens": 4000, "stream": true }));
    let mut events = server.client.stream("/v1/completions", &body).await.unwrap();
    let ended = server.server.shutdown(Duration::ZERO).await.unwrap();
    assert!(!ended.drained && ended.cache.drained, "{ended:?}");
    let mut last = String::new();
    while let Ok(Some(event)) = events.next().await {
        last = event;
    }
    assert!(last.contains("shutting_down"), "{last}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_count_what_happens() {
    let server = start(Toy::default(), |_| {}).await;
    server.complete(&"count me ".repeat(20), json!({ "max_tokens": 50 })).await;
    server.complete(&"count me ".repeat(20), json!({ "max_tokens": 50 })).await;
    // What the second one held is told as cached once the device has heard that it has ended, which is after its answer.
    let cached = async {
        while server.server.app.cache.stats().total.blocks_cached == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, cached).await.unwrap();
    let reply = server.get("/metrics").await;
    assert!(reply.headers["content-type"].to_str().unwrap().starts_with("text/plain"));
    let text = String::from_utf8(reply.body.to_vec()).unwrap();
    // Other tests of this process count, too.
    let at_least = |name: &str, least: f64| {
        let line = text.lines().find(|line| line.starts_with(name) && !line.starts_with('#'));
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        assert!(value.is_some_and(|value| value >= least), "{name}: {line:?}");
    };
    at_least("serve_requests_total ", 2.0);
    at_least("serve_requests_ended_total{how=\"finished\"} ", 2.0);
    at_least("serve_prompt_tokens_total ", 360.0);
    at_least("serve_prompt_tokens_cached_total ", 160.0);
    at_least("serve_generated_tokens_total ", 100.0);
    at_least("serve_time_to_first_token_seconds_count ", 2.0);
    at_least("serve_inter_token_seconds_count ", 98.0);
    at_least("serve_step_sequences_count ", 100.0);
    at_least("serve_requests_waiting ", 0.0);
    at_least("serve_requests_running ", 0.0);
    at_least("kv_cache_prefix_blocks_hit_total{shard=\"0\"} ", 5.0);
    at_least("kv_cache_blocks{shard=\"0\",state=\"cached\"} ", 1.0);
    at_least("kv_cache_jobs_in_flight ", 0.0);
    server.end().await;
}
