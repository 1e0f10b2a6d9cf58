//! What one client of `landmark serve` cannot take from the others: connections, long heads, the disk.

#![cfg(unix)]

mod support;

use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use support::http::{book, serve};

#[test]
fn a_head_without_an_end_is_refused() {
    let server = serve("heads", "");
    let long = format!("x-long: {}\r\n", "a".repeat(200 << 10));
    assert_eq!(server.ask("GET", "/health", &long, None).status, 431);
    let many: String = (0..1000).map(|i| format!("x-{i}: a\r\n")).collect();
    assert_eq!(server.ask("GET", "/health", &many, None).status, 431);
    assert_eq!(server.ask("GET", "/health", "x-short: a\r\n", None).status, 200);
}

#[test]
fn connections_beyond_the_limit_wait() {
    let server = serve("connections", "--connections 1");
    let address = server.url("").strip_prefix("http://").unwrap().to_string();
    let get = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    // It is kept open by its client.
    let mut first = TcpStream::connect(&address).unwrap();
    first.write_all(get).unwrap();
    let mut answer = [0; 12];
    first.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    let mut second = TcpStream::connect(&address).unwrap();
    second.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    second.write_all(get).unwrap();
    assert!(second.read_exact(&mut answer).is_err(), "it was answered beside another");
    drop(first);
    second.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    second.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}

#[test]
fn a_key_has_so_much_of_the_disk() {
    let server = serve("full", "--key_disk 300kB --api_key_file keys");
    let ask = |key: &str, path: &str, body: serde_json::Value| {
        server.ask("POST", path, &format!("authorization: Bearer {key}\r\n"), Some(&body.to_string()))
    };
    for name in ["a", "b"] {
        assert_eq!(ask("first", "/v1/sessions", json!({ "name": name })).status, 201);
    }
    assert_eq!(ask("first", "/v1/sessions/a/append", json!({ "text": book()[..300] })).status, 200);
    let full = ask("first", "/v1/sessions/b/append", json!({ "text": book().repeat(3) }));
    assert!(full.status == 507 && full.json()["error"]["code"] == "no_room", "{full:?}");
    for (path, body) in [
        ("/v1/sessions", json!({ "name": "c" })),
        ("/v1/sessions/a/fork", json!({ "name": "c" })),
        ("/v1/sessions/a/append", json!({ "text": "more" })),
    ] {
        assert_eq!(ask("first", path, body).status, 507, "{path}");
    }
    // Sessions are as they were, and another key has room of its own.
    let show =
        |name: &str| server.ask("GET", &format!("/v1/sessions/{name}"), "authorization: Bearer first\r\n", None).json();
    assert_eq!(show("a")["tokens"], 300);
    let bytes = show("a")["bytes"].as_u64().unwrap() + show("b")["bytes"].as_u64().unwrap();
    assert!(show("b")["tokens"].as_u64() > Some(0) && (250_000..360_000).contains(&bytes), "{bytes}");
    assert_eq!(ask("second", "/v1/sessions", json!({ "name": "a" })).status, 201);
    // What is removed makes room.
    let removed = server.ask("DELETE", "/v1/sessions/b", "authorization: Bearer first\r\n", None);
    assert_eq!(removed.status, 200);
    assert_eq!(ask("first", "/v1/sessions/a/append", json!({ "text": "more" })).status, 200);
}
