//! `landmark serve` killed while many clients append: what was acknowledged is there.
//!
//! `LANDMARK_KILLS=50` kills it so often.

#![cfg(unix)]

mod support;

use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::http::{MODEL, Server};

/// Clients that append, each to a session of its own.
const CLIENTS: usize = 4;

/// A client's text so far: whole pieces.
fn piece(client: usize, number: usize) -> String {
    format!("{client}: piece {number} of a long text. ").repeat(1 + (7 * client + number) % 9)
}

/// Asks, and gives nothing if the server is gone before it answers.
fn ask(server: &Server, path: &str, body: &Value) -> Option<(u16, Value)> {
    let reply = std::panic::catch_unwind(|| server.ask("POST", path, "", Some(&body.to_string()))).ok()?;
    Some((reply.status, serde_json::from_str(&reply.body).ok()?))
}

#[test]
fn what_was_acknowledged_survives_kill_9_under_load() {
    let kills: u64 =
        std::env::var("LANDMARK_KILLS").map_or(6, |kills| kills.parse().expect("LANDMARK_KILLS is a number"));
    std::panic::set_hook(Box::new(|panic| {
        // A client whose server is gone is no news.
        if !panic.to_string().contains("tests/support/http.rs") {
            eprintln!("{panic}");
        }
    }));
    let flags = "--checkpoint exps/text/landmark/e --sessions killed";
    let mut server = Server::start(MODEL.path(), flags);
    for client in 0..CLIENTS {
        server.post("/v1/sessions", json!({ "name": format!("s{client}") }), 201);
    }
    // What each has acknowledged, in pieces and in bytes, which are tokens here.
    let mut acknowledged = [(0, 0); CLIENTS];
    let mut state = 7_u64;
    for kill in 0..kills {
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (server, ended) = (&server, &ended);
            for (client, (pieces, bytes)) in acknowledged.iter_mut().enumerate() {
                scope.spawn(move || {
                    while !ended.load(Ordering::Relaxed) {
                        let text = piece(client, *pieces);
                        let append = ask(server, &format!("/v1/sessions/s{client}/append"), &json!({ "text": text }));
                        let Some((status, reply)) = append else { return };
                        assert_eq!(status, 200, "{reply}");
                        (*pieces, *bytes) = (*pieces + 1, *bytes + text.len());
                        assert_eq!(reply["tokens"], *bytes);
                    }
                });
                scope.spawn(move || {
                    while !ended.load(Ordering::Relaxed) {
                        let body = json!({ "session": format!("s{client}"), "prompt": "a", "max_tokens": 20 });
                        if ask(server, "/v1/completions", &body).is_none() {
                            return;
                        }
                    }
                });
            }
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            std::thread::sleep(Duration::from_millis(30 + (state >> 33) % 400));
            let status = std::process::Command::new("kill").args(["-9", &server.child.id().to_string()]).status();
            assert!(status.unwrap().success());
            ended.store(true, Ordering::Relaxed);
        });
        server.kill();
        server = Server::start(MODEL.path(), flags);
        for (client, (pieces, bytes)) in acknowledged.iter_mut().enumerate() {
            let path = format!("/v1/sessions/s{client}");
            let next = piece(client, *pieces);
            let tokens = server.get(&path)["tokens"].as_u64().unwrap() as usize;
            assert!(tokens >= *bytes, "kill {kill}: s{client} has {tokens} tokens, and {bytes} were acknowledged");
            assert!(tokens <= *bytes + next.len(), "kill {kill}: s{client} has {tokens} tokens");
            // All of the piece may be there that nobody was told of; or none or some of it, and the same append goes on.
            if tokens < *bytes + next.len() {
                let reply = server.post(&format!("{path}/append"), json!({ "text": next }), 200);
                assert_eq!(reply["tokens"], *bytes + next.len());
            }
            (*pieces, *bytes) = (*pieces + 1, *bytes + next.len());
        }
    }
    assert!(acknowledged.iter().all(|(pieces, _)| *pieces > kills as usize), "{acknowledged:?}");
    server.kill();
    // And it is the text that was sent, with its blocks whole.
    for (client, (pieces, bytes)) in acknowledged.into_iter().enumerate() {
        let expected: String = (0..pieces).map(|number| piece(client, number)).collect();
        assert_eq!(expected.len(), bytes);
        support::succeed(MODEL.path(), &format!("session export killed/local/s{client} --out s{client}.txt"));
        assert_eq!(std::fs::read_to_string(MODEL.path().join(format!("s{client}.txt"))).unwrap(), expected);
        support::succeed(MODEL.path(), &format!("session show killed/local/s{client} --verify"));
    }
}
