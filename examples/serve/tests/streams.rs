//! Answers: what they say, as a stream and whole, and what clients may do to them meanwhile.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

use super::{DEADLINE, TestServer, completion, expected, start};
use crate::client::Events;
use crate::toy::{Bytes, Toy, answer};

/// Text, finish reason and usage of a stream, up to `[DONE]`.
async fn read(mut events: Events) -> (String, String, Value) {
    let (mut text, mut finish, mut usage) = (String::new(), None, Value::Null);
    loop {
        let data = events.next().await.unwrap().expect("a stream ends with [DONE]");
        if data == "[DONE]" {
            assert!(events.next().await.unwrap().is_none());
            return (text, finish.expect("a reason"), usage);
        }
        let event: Value = serde_json::from_str(&data).unwrap();
        let choice = &event["choices"][0];
        let piece = choice["text"].as_str().or(choice["delta"]["content"].as_str());
        text.push_str(piece.unwrap_or_default());
        finish = finish.or(choice["finish_reason"].as_str().map(str::to_owned));
        if event["usage"].is_object() {
            usage = event["usage"].clone();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_and_a_whole_answer_say_the_same() {
    let server = start(Toy::default(), |_| {}).await;
    let prompt = "Once upon a time ".repeat(10);
    let whole = server.complete(&prompt, json!({ "max_tokens": 100 })).await;
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["choices"][0]["text"], expected(&prompt, 100));
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["prompt_tokens"], 170);
    assert_eq!(whole["usage"]["total_tokens"], 270);

    let body = completion(
        &prompt,
        json!({ "max_tokens": 100, "stream": true, "stream_options": { "include_usage": true } }),
    );
    let (text, finish, usage) = read(server.client.stream("/v1/completions", &body).await.unwrap()).await;
    assert_eq!((text, finish.as_str()), (expected(&prompt, 100), "length"));
    assert_eq!(usage["completion_tokens"], 100);
    // The first request has left its prompt in the cache.
    assert!(usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 160, "{usage}");
    // A completion without `max_tokens` has 16; token ids are as good as text.
    let tokens: Vec<u32> = prompt.bytes().map(u32::from).collect();
    let short =
        server.post("/v1/completions", &json!({ "model": "toy", "prompt": tokens, "temperature": 0 })).await;
    assert_eq!(short.json().unwrap()["choices"][0]["text"], expected(&prompt, 16));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_speaks_in_its_role() {
    let server = start(Toy::default(), |_| {}).await;
    let parts = json!([{ "type": "text", "text": "Be " }, { "type": "text", "text": "brief." }]);
    let messages = json!([{ "role": "developer", "content": parts }, { "role": "user", "content": "Hello" }]);
    let prompt = crate::model::Codec::encode_chat(
        &Bytes,
        &[(crate::api::Role::System, "Be brief.".into()), (crate::api::Role::User, "Hello".into())],
    );
    let (text, _) = answer(&prompt.unwrap(), 20, 0);
    let mut body =
        json!({ "model": "toy", "messages": messages, "temperature": 0, "max_completion_tokens": 20 });
    let whole = server.post("/v1/chat/completions", &body).await.json().unwrap();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    body["stream"] = true.into();
    let mut events = server.client.stream("/v1/chat/completions", &body).await.unwrap();
    let first: Value = serde_json::from_str(&events.next().await.unwrap().unwrap()).unwrap();
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    let begin = first["choices"][0]["delta"]["content"].as_str().unwrap().to_owned();
    let (rest, _, usage) = read(events).await;
    assert_eq!((begin + &rest, usage), (text, Value::Null));
    // An answer is history as it came, and one without a text too.
    let mut history = messages.as_array().unwrap().clone();
    history.push(whole["choices"][0]["message"].clone());
    history.push(json!({ "role": "assistant", "content": null, "refusal": null, "annotations": [], "tool_calls": null }));
    history.push(json!({ "role": "user", "content": "And then?", "name": "u" }));
    let go_on = json!({ "model": "toy", "messages": history, "max_tokens": 4, "parallel_tool_calls": false });
    assert_eq!(server.post("/v1/chat/completions", &go_on).await.status, 200);
    history.push(json!({ "role": "user", "content": null }));
    let empty = json!({ "model": "toy", "messages": history });
    assert_eq!(server.post("/v1/chat/completions", &empty).await.status, 400);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_end_where_the_model_or_a_stop_string_says() {
    let server = start(Toy { end_every: 40, ..Toy::default() }, |_| {}).await;
    let prompt = "how long is this?";
    let tokens: Vec<u32> = prompt.bytes().map(u32::from).collect();
    let (text, ended) = answer(&tokens, 1000, 40);
    assert!(ended, "the toy ends one answer in forty tokens");
    let whole = server.complete(prompt, json!({ "max_tokens": 1000 })).await;
    assert_eq!(
        (&whole["choices"][0]["text"], &whole["choices"][0]["finish_reason"]),
        (&json!(text), &json!("stop"))
    );

    // Three characters that no single token holds.
    let stop: String = text.chars().skip(5).take(3).collect();
    let until = text.split(&stop).next().unwrap();
    for stream in [false, true] {
        let body = completion(prompt, json!({ "max_tokens": 1000, "stop": [stop, "#"], "stream": stream }));
        let (got, finish) = if stream {
            let (text, finish, _) = read(server.client.stream("/v1/completions", &body).await.unwrap()).await;
            (text, finish)
        } else {
            let choice = server.post("/v1/completions", &body).await.json().unwrap()["choices"][0].clone();
            (
                choice["text"].as_str().unwrap().to_owned(),
                choice["finish_reason"].as_str().unwrap().to_owned(),
            )
        };
        assert_eq!((got.as_str(), finish.as_str()), (until, "stop"));
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seed_repeats_an_answer() {
    let server = start(Toy::default(), |_| {}).await;
    let ask = async |seed: i64| {
        let more = json!({ "max_tokens": 40, "temperature": 2.0, "seed": seed });
        server.complete("dice", more).await["choices"][0]["text"].clone()
    };
    assert_eq!(ask(-5).await, ask(-5).await);
    assert_ne!(ask(1).await, ask(2).await);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_do_not_share_what_they_have_asked() {
    let server = start(Toy::default(), |_| {}).await;
    let prompt = "the same long secret of somebody ".repeat(8);
    let ask = async |key: Option<&str>| {
        let client = crate::client::Client { key: key.map(str::to_owned), ..server.client.clone() };
        let body = completion(&prompt, json!({ "max_tokens": 4 })).to_string();
        let answer = client.ask("POST", "/v1/completions", body).await.unwrap().json().unwrap();
        assert_eq!(answer["choices"][0]["text"], expected(&prompt, 4));
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(ask(Some("alice")).await, 0);
    assert_eq!(ask(Some("bob")).await, 0);
    assert_eq!(ask(None).await, 0);
    assert!(ask(Some("alice")).await >= 224);
    assert!(ask(None).await >= 224);
    server.end().await;
}

/// An answer far longer than what fits between a server and a client that has stopped reading.
fn endless() -> Value {
    completion("on and on", json!({ "max_tokens": 4000, "stream": true }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_frees_its_sequence() {
    let server = start(Toy::default(), |_| {}).await;
    let mut events = server.client.stream("/v1/completions", &endless()).await.unwrap();
    for _ in 0..3 {
        events.next().await.unwrap().unwrap();
    }
    drop(events);
    server.is_clean().await;
    assert_eq!(server.ended(), (0, 1));
    server.end().await;
}

/// Also one that has not got its first token yet, and one that waits for a whole answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_while_it_waits_frees_its_place() {
    let server = start(Toy::default(), |settings| settings.running_max = 1).await;
    server.gate.close();
    let mut waiting = tokio::task::JoinSet::new();
    for at in 0..4 {
        let (client, body) =
            (server.client.clone(), completion("never mind", json!({ "max_tokens": 3000, "seed": at })));
        waiting.spawn(async move { client.ask("POST", "/v1/completions", body.to_string()).await.map(drop) });
    }
    let gate = server.gate.clone();
    tokio::task::spawn_blocking(move || gate.wait_for_step()).await.unwrap();
    while server.server.app.requests() < 4 {
        // Each turn is a request to the server, which has to get through it.
        assert_eq!(server.get("/health").await.status, 200);
    }
    waiting.shutdown().await;
    server.gate.open();
    server.end().await;
}

/// A connection with little room in it, on which a request was sent and nothing is read.
async fn silent(server: &TestServer) -> tokio::net::TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(server.server.addr).await.unwrap();
    let body = endless().to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    stream
}

/// Serves others until `holds` does.
async fn serve_until(server: &TestServer, holds: impl Fn(&crate::figures::State) -> bool) {
    let serve = async {
        while !holds(&server.server.app.figures.lock().clone()) {
            let answer = server.complete("me too", json!({ "max_tokens": 20 })).await;
            assert_eq!(answer["choices"][0]["text"], expected("me too", 20));
        }
    };
    tokio::time::timeout(DEADLINE, serve).await.expect("it comes to hold");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_parked_and_goes_on_where_it_was() {
    let server = start(Toy::default(), |settings| settings.send_buffer_bytes = 4096).await;
    let stream = silent(&server).await;
    serve_until(&server, |state| state.parked == 1).await;
    // The others have their answers a moment before their sequences are closed, and what it does not read may still go on to where the
    // kernel keeps it: then it runs for a while and is parked again.
    let alone = async {
        let app = &server.server.app;
        let parked = || app.figures.lock().parked == 1;
        while !(app.requests() == 1 && parked() && app.cache.stats().sequences_open == 0) {
            assert_eq!(server.get("/health").await.status, 200);
        }
    };
    tokio::time::timeout(DEADLINE, alone).await.expect("the others leave, and who is parked holds nothing");
    // Then it reads after all, and nothing is missing.
    let answer = tokio::time::timeout(DEADLINE, read_raw(stream)).await.unwrap();
    let text: String = pieces(&answer).collect();
    assert_eq!(text, expected("on and on", 4000));
    assert!(answer.contains("data: [DONE]"));
    assert!(server.server.app.figures.lock().parkings >= 1);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_reads_is_cut() {
    let change = |settings: &mut crate::server::Settings| {
        settings.send_buffer_bytes = 4096;
        settings.cut_after = Duration::ZERO;
    };
    let server = start(Toy::default(), change).await;
    let stream = silent(&server).await;
    serve_until(&server, |state| state.ended_otherwise == 1).await;
    server.is_clean().await;
    let answer = tokio::time::timeout(DEADLINE, read_raw(stream)).await.unwrap();
    assert!(!answer.contains("[DONE]") && answer.contains("given this answer up"), "{answer}");
    server.end().await;
}

/// All of a chunked answer, to its last chunk.
async fn read_raw(mut stream: tokio::net::TcpStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n0\r\n\r\n") {
        let read = tokio::io::AsyncReadExt::read_buf(&mut stream, &mut bytes).await.unwrap();
        assert!(read > 0, "the connection ended in the middle");
    }
    String::from_utf8(bytes).unwrap()
}

/// The pieces of text in raw events.
fn pieces(answer: &str) -> impl Iterator<Item = String> {
    let events = answer.lines().filter_map(|line| line.strip_prefix("data: {"));
    events.map(|event| {
        let event: Value = serde_json::from_str(&format!("{{{event}")).unwrap();
        event["choices"][0]["text"].as_str().unwrap().to_owned()
    })
}
