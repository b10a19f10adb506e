//! Every kind of request that cannot be served: its status and its error, and that the server serves on.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{TestServer, completion, expected, start};
use crate::client::Reply;
use crate::toy::Toy;

/// Checks status and code of an error, and returns its message.
fn check(reply: &Reply, status: u16, param: Option<&str>, code: Option<&str>) -> String {
    let body = reply.json().expect("errors are JSON");
    assert_eq!(reply.status, status, "{body}");
    assert_eq!(reply.headers["content-type"], "application/json");
    let error = &body["error"];
    assert_eq!(error["code"].as_str(), code, "{body}");
    assert_eq!(error["param"].as_str(), param, "{body}");
    assert!(error["type"].is_string(), "{body}");
    error["message"].as_str().expect("errors have messages").to_owned()
}

async fn serves(server: &TestServer) {
    let answer = server.complete("still here", json!({ "max_tokens": 8 })).await;
    assert_eq!(answer["choices"][0]["text"], expected("still here", 8));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_are_no_requests() {
    let server = start(Toy::default(), |settings| settings.body_bytes_max = 4096).await;
    let invalid_type = |param| (Some(param), Some("invalid_type"));
    for (body, part, (param, code)) in [
        (r#"{"model": "toy", "#, "could not parse", (None, None)),
        ("", "could not parse", (None, None)),
        ("\u{0}", "could not parse", (None, None)),
        ("[]", "expected an object", (None, None)),
        (r#"{"prompt": "a"}"#, "'model'", (Some("model"), Some("missing_required_parameter"))),
        (r#"{"model": 5}"#, "expected a string, but got 5", invalid_type("model")),
        (r#"{"model": "toy", "prompt": 5}"#, "expected a string or an array", invalid_type("prompt")),
        (r#"{"model": "toy", "messages": [5]}"#, "expected an array of objects", invalid_type("messages")),
        (
            r#"{"model": "toy", "max_tokens": -1}"#,
            "but got -1 instead",
            (Some("max_tokens"), Some("integer_below_min_value")),
        ),
        (r#"{"model": "toy", "max_tokens": "many"}"#, "expected an integer", invalid_type("max_tokens")),
        (r#"{"model": "toy", "max_tokens": 1e40}"#, "expected an integer", invalid_type("max_tokens")),
    ] {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let reply = server.client.ask("POST", path, body).await.unwrap();
            let message = check(&reply, 400, param, code);
            assert!(message.contains(part), "{body}: {message}");
        }
    }
    // What belongs to the other route is not passed over.
    let both = json!({ "model": "toy", "prompt": "a", "messages": [{ "role": "user", "content": "a" }] });
    for (path, other) in [("/v1/completions", "messages"), ("/v1/chat/completions", "prompt")] {
        check(&server.post(path, &both).await, 400, Some(other), None);
    }
    let not_utf8 =
        server.client.ask("POST", "/v1/completions", b"{\"model\": \"\xff\"}".to_vec()).await.unwrap();
    check(&not_utf8, 400, None, None);
    let deep = format!("{{\"model\": {}", "[".repeat(2000));
    check(&server.client.ask("POST", "/v1/completions", deep).await.unwrap(), 400, None, None);
    let long = server.post("/v1/completions", &completion(&"a".repeat(5000), json!({}))).await;
    check(&long, 413, None, Some("request_too_large"));
    serves(&server).await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_out_of_range_or_not_done_here() {
    let server = start(Toy::default(), |_| {}).await;
    let refused: [(Value, &str, Option<&str>); 17] = [
        (json!({ "temperature": 2.5 }), "temperature", Some("decimal_out_of_range")),
        (json!({ "temperature": -0.1 }), "temperature", Some("decimal_out_of_range")),
        (json!({ "top_p": 1.5 }), "top_p", Some("decimal_out_of_range")),
        (json!({ "n": 2 }), "n", Some("unsupported_value")),
        (json!({ "n": 0 }), "n", Some("integer_below_min_value")),
        (json!({ "max_tokens": 0 }), "max_tokens", Some("integer_below_min_value")),
        (json!({ "stop": ["1", "2", "3", "4", "5"] }), "stop", Some("invalid_value")),
        (json!({ "stop": "" }), "stop", Some("invalid_value")),
        (json!({ "stream_options": { "include_usage": true } }), "stream_options", Some("invalid_value")),
        (json!({ "best_of": 3 }), "best_of", Some("unsupported_parameter")),
        (json!({ "logprobs": 5 }), "logprobs", Some("unsupported_parameter")),
        (json!({ "echo": true }), "echo", Some("unsupported_parameter")),
        (json!({ "suffix": "b" }), "suffix", Some("unsupported_parameter")),
        (json!({ "logit_bias": { "5": 100 } }), "logit_bias", Some("unsupported_parameter")),
        (json!({ "tools": [{}] }), "tools", Some("unsupported_parameter")),
        (json!({ "presence_penalty": 0.5 }), "presence_penalty", Some("unsupported_parameter")),
        (json!({ "max_tokenz": 5 }), "max_tokenz", None),
    ];
    for (more, param, code) in refused {
        let reply = server.post("/v1/completions", &completion("a", more)).await;
        check(&reply, 400, Some(param), code);
    }
    // What asks for nothing is no reason to refuse.
    let harmless = json!({ "n": 1, "best_of": 1, "echo": false, "user": "u", "logit_bias": {}, "suffix": null,
        "presence_penalty": 0, "max_tokens": 3, "stop": null, "logprobs": null });
    assert_eq!(server.complete("abc", harmless).await["choices"][0]["text"], expected("abc", 3));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_that_cannot_be_served() {
    let server = start(Toy { context_tokens: 100, ..Toy::default() }, |_| {}).await;
    let ask = async |body: Value| server.post("/v1/completions", &body).await;
    check(
        &ask(json!({ "model": "gpt-7", "prompt": "a" })).await,
        404,
        Some("model"),
        Some("model_not_found"),
    );
    let missing = Some("missing_required_parameter");
    check(&ask(json!({ "model": "toy" })).await, 400, Some("prompt"), missing);
    check(&ask(json!({ "model": "toy", "prompt": "" })).await, 400, Some("prompt"), Some("empty_prompt"));
    check(
        &ask(json!({ "model": "toy", "prompt": [] })).await,
        400,
        Some("prompt"),
        Some("unsupported_value"),
    );
    let two = ask(json!({ "model": "toy", "prompt": ["a", "b"] })).await;
    check(&two, 400, Some("prompt"), Some("unsupported_value"));
    let token = ask(json!({ "model": "toy", "prompt": [1, 70000] })).await;
    assert!(check(&token, 400, Some("prompt"), Some("invalid_value")).contains("70000"));

    let too_long = Some("context_length_exceeded");
    let message = check(&ask(completion(&"a".repeat(100), json!({}))).await, 400, Some("prompt"), too_long);
    assert!(message.contains("maximum context length is 100 tokens"), "{message}");
    let huge = ask(completion("a", json!({ "max_tokens": 1_000_000_000_000u64 }))).await;
    assert!(check(&huge, 400, Some("prompt"), too_long).contains("1000000000001"));
    check(&ask(completion("a", json!({ "max_tokens": u64::MAX }))).await, 400, Some("prompt"), too_long);
    check(&ask(completion("a", json!({ "max_tokens": 100 }))).await, 400, Some("prompt"), too_long);
    assert_eq!(server.complete("a", json!({ "max_tokens": 99 })).await["usage"]["completion_tokens"], 99);

    let chat = async |messages: Value| {
        server.post("/v1/chat/completions", &json!({ "model": "toy", "messages": messages })).await
    };
    check(&chat(Value::Null).await, 400, Some("messages"), missing);
    check(&chat(json!([])).await, 400, Some("messages"), Some("empty_array"));
    check(&chat(json!([{ "role": "king", "content": "a" }])).await, 400, None, None);
    check(
        &chat(json!([{ "role": "user", "content": "a".repeat(200) }])).await,
        400,
        Some("messages"),
        too_long,
    );
    let image =
        json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "x" } }] }]);
    check(&chat(image).await, 400, None, None);
    serves(&server).await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_and_methods_that_are_not_there() {
    let server = start(Toy::default(), |_| {}).await;
    let message = check(&server.get("/v1/nothing").await, 404, None, Some("unknown_url"));
    assert_eq!(message, "Invalid URL (GET /v1/nothing)");
    let get = server.get("/v1/completions").await;
    check(&get, 405, None, Some("method_not_supported"));
    assert_eq!(get.headers["allow"], "POST");
    check(&server.post("/health", &json!({})).await, 405, None, Some("method_not_supported"));
    check(&server.get("/v1/models/gpt-7").await, 404, Some("model"), Some("model_not_found"));
    assert_eq!(server.get("/v1/models/toy").await.json().unwrap()["id"], "toy");
    assert_eq!(server.get("/v1/models").await.json().unwrap()["data"][0]["id"], "toy");
    server.end().await;
}

/// What is not even HTTP, and bodies that stop half way: the connection ends, and nobody else notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_connections() {
    let server = start(Toy::default(), |settings| settings.body_within = std::time::Duration::ZERO).await;
    let send = async |bytes: &[u8]| {
        let mut stream = TcpStream::connect(server.server.addr).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    };
    assert!(send(b"\x16\x03\x01 this is no HTTP\r\n\r\n").await.starts_with("HTTP/1.1 400"));
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 50\r\n\r\n{";
    assert!(send(head.as_bytes()).await.starts_with("HTTP/1.1 408"));
    server.end().await;
    // Pieces that are none are not too much.
    let server = start(Toy::default(), |_| {}).await;
    let mut stream = TcpStream::connect(server.server.addr).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    server.end().await;
}
