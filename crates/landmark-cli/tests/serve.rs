//! `landmark serve` as its clients see it, on a model that was trained for a moment; and killed.

#![cfg(unix)]

mod support;

use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::process::Command;
use std::time::{Duration, Instant};
use support::http::{CHUNK, MODEL, Server, book, serve};
use support::succeed;

/// What `landmark generate` goes on with.
fn generated(prompt: &str, tokens: usize, flags: &str) -> String {
    let path = tempfile::NamedTempFile::new().unwrap();
    fs::write(&path, prompt).unwrap();
    let generate = format!(
        "generate --checkpoint exps/text/landmark/e --device cpu --max_new_tokens {tokens} --file {} {flags}",
        path.path().display()
    );
    succeed(MODEL.path(), &generate).0.strip_suffix('\n').unwrap().to_string()
}

const GREEDY: &str = "--temperature 0";

fn text(reply: &Value) -> &str {
    reply["choices"][0]["text"].as_str().unwrap()
}

/// The text, the reasons and the last chunk of a stream that came to its end.
fn put_together(events: &[String]) -> (String, Vec<String>, Value) {
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let choices = || chunks.iter().filter_map(|chunk| chunk["choices"].get(0));
    let text = choices().filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str())).collect();
    let reasons = choices().filter_map(|choice| choice["finish_reason"].as_str()).map(str::to_string).collect();
    (text, reasons, chunks.last().unwrap().clone())
}

#[test]
fn completions_are_those_of_generate_however_they_come() {
    let server = serve("one", "");
    for prompt in ["It was", "", &book()[..5000], &book()[..CHUNK * 20]] {
        let expected = generated(prompt, 40, GREEDY);
        let body = json!({ "model": "e", "prompt": prompt, "max_tokens": 40, "temperature": 0 });
        let reply = server.post("/v1/completions", body.clone(), 200);
        assert_eq!(text(&reply), expected);
        assert_eq!((reply["object"].as_str(), reply["model"].as_str()), (Some("text_completion"), Some("e")));
        let tokens = prompt.len().max(1);
        let usage = &reply["usage"];
        assert_eq!(
            (usage["prompt_tokens"].as_u64(), usage["prompt_tokens_details"]["cached_tokens"].as_u64()),
            (Some(tokens as u64), Some(0))
        );
        assert_eq!(
            usage["total_tokens"].as_u64().unwrap(),
            usage["completion_tokens"].as_u64().unwrap() + tokens as u64
        );
        // What was read is not read again, and the text is the same.
        let again = server.post("/v1/completions", body.clone(), 200);
        assert_eq!(text(&again), expected);
        assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], tokens / CHUNK * CHUNK);
        // Nor is it when the prompt goes on, or is another from some place on.
        if tokens > 1000 {
            for (other, cached) in [
                (format!("{prompt}It was"), tokens / CHUNK * CHUNK),
                (format!("{}x", &prompt[..3000]), 3000 / CHUNK * CHUNK),
            ] {
                let body = json!({ "prompt": other, "max_tokens": 40, "temperature": 0 });
                let reply = server.post("/v1/completions", body, 200);
                assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], cached);
                assert_eq!(text(&reply), generated(&other, 40, GREEDY));
            }
        }
        // As a stream.
        let mut streamed = body;
        streamed["stream"] = json!(true);
        let (text, reasons, last) = put_together(&server.stream("/v1/completions", streamed.clone()));
        assert_eq!((text.as_str(), reasons.len()), (expected.as_str(), 1));
        assert!(last["usage"].is_null() && !last["choices"].as_array().unwrap().is_empty());
        streamed["stream_options"] = json!({ "include_usage": true });
        let (_, _, last) = put_together(&server.stream("/v1/completions", streamed));
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], reply["usage"]["completion_tokens"]);
    }
    assert!(server.metric("landmark_cached_tokens_total") > 5000.);
    assert!(server.metric("landmark_first_token_seconds_count") >= 16.);
    assert_eq!(server.get("/v1/models")["data"][0]["id"], "e");
    assert_eq!(server.get("/v1/models/e")["id"], "e");
    assert_eq!(server.post("/tokenize", json!({ "prompt": "It" }), 200), json!({ "tokens": [73, 116], "count": 2 }));
}

#[test]
fn what_there_is_no_room_for_is_not_kept_and_drives_nothing_out() {
    let server = serve("thirteen", "--kept_prompts 1MB");
    let cached = |prompt: &str| {
        let reply = server.post("/v1/completions", json!({ "prompt": prompt, "max_tokens": 1 }), 200);
        reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() as usize
    };
    let (short, other, long) = (&book()[..1000], &book()[2000..3000], &book()[1000..7000]);
    assert_eq!([cached(short), cached(long), cached(long), cached(short)], [0, 0, 0, 1000 / CHUNK * CHUNK]);
    // With another of its size there is no room for the one that was used before it.
    assert_eq!([cached(other), cached(other)], [0, 1000 / CHUNK * CHUNK]);
    until("one is kept", || server.metric("landmark_kept_prompts") == 1.);
    assert!(server.metric("landmark_kept_bytes") <= 1e6);
    assert_eq!(cached(short), 0);
}

#[test]
fn seeds_choices_and_stop_strings() {
    let server = serve("two", "");
    let ask = |more: Value| {
        let mut body = json!({ "prompt": "It was a", "max_tokens": 30, "temperature": 1.0, "top_p": 1.0, "top_k": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", body, 200)
    };
    let texts = |reply: &Value| -> Vec<String> {
        reply["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_string()).collect()
    };
    let drawn = texts(&ask(json!({ "seed": 5 })));
    assert_eq!(texts(&ask(json!({ "seed": 5 }))), drawn);
    assert_eq!(drawn[0], generated("It was a", 30, "--temperature 1 --top_p 1 --top_k 0 --seed 5"));
    // Without a seed each is another.
    assert_ne!(texts(&ask(json!({}))), texts(&ask(json!({}))));
    let three = texts(&ask(json!({ "seed": 4, "n": 3 })));
    assert_eq!((three.len(), &three[1]), (3, &drawn[0]));
    assert!(three[0] != three[1] && three[1] != three[2]);
    assert_eq!(ask(json!({ "seed": 4, "n": 3 }))["choices"][2]["index"], 2);
    // Prompts as tokens, and several.
    let prompt: Vec<u8> = b"It was a".to_vec();
    assert_eq!(texts(&ask(json!({ "seed": 5, "prompt": prompt }))), drawn);
    let both = ask(json!({ "seed": 5, "prompt": ["Chapter", "It was a"], "n": 2 }));
    assert_eq!((texts(&both).len(), &texts(&both)[2]), (4, &drawn[0]));
    assert_eq!(both["usage"]["prompt_tokens"], 15);

    let greedy = json!({ "temperature": 0, "max_tokens": 60 });
    let whole = texts(&ask(greedy.clone())).remove(0);
    let stop = &whole[10..13];
    let mut stopped = greedy;
    stopped["stop"] = json!([stop, "never there"]);
    let reply = ask(stopped.clone());
    assert_eq!(text(&reply), &whole[..whole.find(stop).unwrap()]);
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    assert!(reply["usage"]["completion_tokens"].as_u64().unwrap() < 60);
    stopped["stream"] = json!(true);
    stopped["prompt"] = json!("It was a");
    let (streamed, reasons, _) = put_together(&server.stream("/v1/completions", stopped));
    assert_eq!((streamed.as_str(), reasons), (text(&reply), vec!["stop".to_string()]));
}

#[test]
fn probabilities_of_what_is_written_and_of_prompts() {
    let server = serve("three", "");
    let prompt = &book()[..200];
    let body = json!({ "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 2 });
    let written = server.post("/v1/completions", body.clone(), 200);
    let logprobs = &written["choices"][0]["logprobs"];
    let (tokens, of) = (logprobs["tokens"].as_array().unwrap(), logprobs["token_logprobs"].as_array().unwrap());
    assert_eq!(tokens.iter().map(|token| token.as_str().unwrap()).collect::<String>(), text(&written));
    for (i, (token, logprob)) in tokens.iter().zip(of).enumerate() {
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        assert!(top.len() <= 2 && top[token.as_str().unwrap()] == *logprob, "{top:?}");
        assert!(top.values().all(|other| other.as_f64() <= logprob.as_f64()) && logprob.as_f64().unwrap() <= 0.);
    }
    // The same as part of a prompt.
    let whole = format!("{prompt}{}", text(&written));
    let echo = json!({ "prompt": whole, "max_tokens": 0, "echo": true, "logprobs": 1 });
    let echoed = server.post("/v1/completions", echo.clone(), 200);
    assert_eq!((text(&echoed), &echoed["choices"][0]["finish_reason"]), (whole.as_str(), &json!("length")));
    let echoed_logprobs = &echoed["choices"][0]["logprobs"];
    assert_eq!(echoed_logprobs["tokens"].as_array().unwrap().len(), 212);
    assert!(echoed_logprobs["token_logprobs"][0].is_null() && echoed_logprobs["top_logprobs"][0].is_null());
    for (i, logprob) in of.iter().enumerate() {
        let (a, b) = (logprob.as_f64().unwrap(), echoed_logprobs["token_logprobs"][200 + i].as_f64().unwrap());
        assert!((a - b).abs() < 0.05, "token {i}: {a} when it was written, {b} when it was read");
    }
    assert_eq!(echoed_logprobs["text_offset"][211], 211);
    // Also when the prompt is kept.
    assert_eq!(server.post("/v1/completions", echo, 200)["choices"], echoed["choices"]);
    // The stream has the same.
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let events = server.stream("/v1/completions", streamed);
    let of_stream: Vec<Value> = events[..events.len() - 1]
        .iter()
        .flat_map(|event| {
            let chunk: Value = serde_json::from_str(event).unwrap();
            chunk["choices"][0]["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default()
        })
        .collect();
    assert_eq!(&of_stream, of);
}

#[test]
fn conversations_are_written_by_the_template() {
    let server = serve("four", "--chat_template template.jinja");
    let said = json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": [{ "type": "text", "text": book()[..300] }] }]);
    let body = json!({ "messages": said, "max_completion_tokens": 20, "temperature": 0, "stop": ["\n"] });
    let reply = server.post("/v1/chat/completions", body.clone(), 200);
    let answer = reply["choices"][0]["message"]["content"].as_str().unwrap();
    let whole = format!("system: Be brief.\nuser: {}\nassistant:", &book()[..300]);
    let expected = generated(&whole, 20, GREEDY);
    assert_eq!(answer, expected.split('\n').next().unwrap());
    assert_eq!(reply["usage"]["prompt_tokens"], whole.len());
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let events = server.stream("/v1/chat/completions", streamed.clone());
    let first: Value = serde_json::from_str(&events[0]).unwrap();
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(put_together(&events).0, answer);
    // With probabilities, whole and as a stream: those that the same text has as a prompt.
    let mut likely = streamed.clone();
    (likely["logprobs"], likely["top_logprobs"], likely["stream"]) = (json!(true), json!(2), json!(false));
    let content = server.post("/v1/chat/completions", likely.clone(), 200)["choices"][0]["logprobs"]["content"].clone();
    let echo = json!({ "prompt": whole, "max_tokens": 20, "temperature": 0, "stop": ["\n"], "logprobs": 2 });
    let echo = &server.post("/v1/completions", echo, 200)["choices"][0]["logprobs"];
    let content = content.as_array().unwrap();
    assert_eq!(content.iter().map(|token| token["logprob"].clone()).collect::<Value>(), echo["token_logprobs"]);
    assert!(content.iter().all(|token| token["top_logprobs"][0]["logprob"] == token["logprob"]));
    assert_eq!(content[0]["bytes"], json!(content[0]["token"].as_str().unwrap().as_bytes()));
    likely["stream"] = json!(true);
    let events = server.stream("/v1/chat/completions", likely);
    let chunks = events[..events.len() - 1].iter().map(|event| serde_json::from_str::<Value>(event).unwrap());
    let streamed_content =
        chunks.flat_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default());
    assert_eq!(streamed_content.collect::<Vec<_>>(), *content);
    let top_alone = json!({ "messages": said, "top_logprobs": 2 });
    assert_eq!(server.post("/v1/chat/completions", top_alone, 400)["error"]["param"], "top_logprobs");
    // The next turn reads what is new.
    let said =
        json!([said[0], said[1], { "role": "assistant", "content": answer }, { "role": "user", "content": "More" }]);
    let next = server.post("/v1/chat/completions", json!({ "messages": said, "max_tokens": 5 }), 200);
    assert_eq!(next["usage"]["prompt_tokens_details"]["cached_tokens"], whole.len() / CHUNK * CHUNK);
    let mark = json!([{ "role": "user", "content": "<|endoftext|>" }]);
    let refused = server.post("/v1/chat/completions", json!({ "messages": mark }), 400);
    assert_eq!(refused["error"]["param"], "messages");
}

#[test]
fn sessions_are_read_once_and_survive_kill_9() {
    let server = serve("five", "");
    let book = book();
    assert_eq!(server.post("/v1/sessions", json!({ "name": "austen" }), 201)["tokens"], 0);
    assert_eq!(server.post("/v1/sessions", json!({ "name": "austen" }), 409)["error"]["code"], "session_exists");
    let append = |server: &Server, name: &str, text: &str| {
        server.post(&format!("/v1/sessions/{name}/append"), json!({ "text": text }), 200)
    };
    assert_eq!(append(&server, "austen", &book[..3000])["tokens"], 3000);
    assert_eq!(append(&server, "austen", &book[3000..5000])["tokens"], 5000);
    // kill -9: what was acknowledged is there.
    server.kill();
    let server = serve("five", "");
    assert_eq!(server.get("/v1/sessions/austen")["tokens"], 5000);
    let ask = |server: &Server, name: &str, prompt: &str| {
        let body = json!({ "session": name, "prompt": prompt, "max_tokens": 12, "temperature": 0, "show_blocks": 2 });
        server.post("/v1/completions", body, 200)
    };
    let exported = server.ask("GET", "/v1/sessions/austen/export", "", None);
    assert!(exported.status == 200 && exported.headers.contains("content-type: text/plain"), "{exported:?}");
    assert_eq!(exported.body, book[..5000]);
    assert_eq!(server.ask("GET", "/v1/sessions/none/export", "", None).status, 404);
    let reply = ask(&server, "austen", "It");
    let at_hand = "session ask five/local/austen --prompt It --temperature 0 --max_new_tokens 12 --json --show_blocks 2 --device cpu";
    let at_hand: Value = serde_json::from_str(&succeed(MODEL.path(), at_hand).0).unwrap();
    assert_eq!(text(&reply), at_hand["answer"].as_str().unwrap());
    assert_eq!(
        (&reply["usage"]["prompt_tokens"], &reply["usage"]["prompt_tokens_details"]["cached_tokens"]),
        (&json!(5002), &json!(5000))
    );
    let blocks = reply["landmark"]["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), 2);
    let whole = format!("{}It{}", &book[..5000], text(&reply));
    for (block, expected) in blocks.iter().zip(at_hand["blocks"].as_array().unwrap()) {
        assert_eq!(
            (&block["block"], &block["first_token"], &block["text"]),
            (&expected["block"], &expected["first_token"], &expected["text"])
        );
        let offset = block["text_offset"].as_u64().unwrap() as usize;
        assert!(whole[offset..].starts_with(block["text"].as_str().unwrap()) && block["weight"].as_f64().unwrap() > 0.);
        // Two layers: the first and the middle third have one each.
        let by_layers = [0, 1, 2].map(|group| block["weight_by_layers"][group].as_f64().unwrap());
        assert!(
            (by_layers.iter().sum::<f64>() / 2. - block["weight"].as_f64().unwrap()).abs() < 1e-6 && by_layers[2] == 0.
        );
    }
    // It stays as it is, also for several choices.
    let several = json!({ "session": "austen", "prompt": "It", "max_tokens": 12, "temperature": 0, "n": 2 });
    let several = server.post("/v1/completions", several, 200);
    assert!((0..2).all(|choice| several["choices"][choice]["text"] == text(&reply)), "{several}");
    assert_eq!(text(&ask(&server, "austen", "It")), text(&reply));
    // A fork goes its own way.
    assert_eq!(server.post("/v1/sessions/austen/fork", json!({ "name": "other" }), 201)["tokens"], 5000);
    append(&server, "other", " And so on.");
    let listed = server.get("/v1/sessions");
    let of = |i: usize| (listed["data"][i]["name"].clone(), listed["data"][i]["tokens"].clone());
    assert_eq!((of(0), of(1)), ((json!("austen"), json!(5000)), (json!("other"), json!(5011))));
    let reply = server.ask("DELETE", "/v1/sessions/other", "", None);
    assert_eq!((reply.status, reply.json()["deleted"].as_bool()), (200, Some(true)));
    for (method, path) in
        [("GET", "/v1/sessions/other"), ("DELETE", "/v1/sessions/other"), ("GET", "/v1/sessions/..%2Fausten")]
    {
        let status = server.ask(method, path, "", None).status;
        assert!(status == if path.contains('%') { 400 } else { 404 }, "{method} {path}: {status}");
    }
    server.post("/v1/sessions/none/append", json!({ "text": "a" }), 404);
    server.post("/v1/completions", json!({ "session": "none", "prompt": "a" }), 404);
    // A session is the same folder for the command line, which is told who has it while it is open.
    drop(server);
    assert_eq!(succeed(MODEL.path(), "session export five/local/austen --out -").0, book[..5000]);
}

/// kill -9 in the middle of appends: what was acknowledged is there, and the same append goes on.
#[test]
fn appends_that_were_cut_short_go_on() {
    let book = book();
    let mut random = support::random();
    let mut cut_short = 0;
    let server = serve("six", "");
    server.post("/v1/sessions", json!({ "name": "whole" }), 201);
    let begun = Instant::now();
    server.post("/v1/sessions/whole/append", json!({ "text": book }), 200);
    let time = begun.elapsed();
    server.post("/v1/sessions", json!({ "name": "killed" }), 201);
    server.post("/v1/sessions/killed/append", json!({ "text": &book[..100] }), 200);
    drop(server);
    for _ in 0..4 {
        let server = serve("six", "");
        let shown = server.get("/v1/sessions/killed");
        assert!(shown["tokens"].as_u64().unwrap() >= 100, "{shown}");
        let body = json!({ "text": &book[100..] }).to_string();
        let stream = server.send("POST", "/v1/sessions/killed/append", "", Some(&body));
        let before = shown["tokens"].as_u64();
        until("more of it is read", || server.get("/v1/sessions/killed")["tokens"].as_u64() > before);
        std::thread::sleep(time.mul_f64(0.1 * random()));
        server.kill();
        drop(stream);
        let server = serve("six", "");
        let shown = server.get("/v1/sessions/killed");
        if shown["tokens"] == book.len() && shown["unfinished_append"] == false {
            break;
        }
        cut_short += usize::from(shown["unfinished_append"] == true);
        if shown["unfinished_append"] == true {
            let other = server.post("/v1/sessions/killed/append", json!({ "text": "Another text" }), 409);
            assert_eq!(other["error"]["code"], "unfinished_append");
        }
    }
    let server = serve("six", "");
    if server.get("/v1/sessions/killed")["tokens"] != book.len() {
        server.post("/v1/sessions/killed/append", json!({ "text": &book[100..] }), 200);
    }
    let shown = server.get("/v1/sessions/killed");
    assert_eq!((&shown["tokens"], &shown["unfinished_append"]), (&json!(book.len()), &json!(false)));
    drop(server);
    assert_eq!(succeed(MODEL.path(), "session export six/local/killed --out -").0, book);
    assert!(
        succeed(MODEL.path(), "session show six/local/killed --verify").0.contains("everything is as it was written")
    );
    println!("{cut_short} appends were cut short");
    assert!(cut_short > 0, "no kill came in the middle of an append");
}

#[test]
fn keys_let_in_and_keep_apart() {
    let server = serve("seven", "--api_key_file keys");
    let with = |key: &str| format!("authorization: Bearer {key}\r\n");
    for headers in [String::new(), with("third"), with(""), "authorization: first\r\n".into()] {
        for (method, path) in [
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/v1/sessions"),
            ("GET", "/none"),
            ("POST", "/v1/completions"),
            ("DELETE", "/v1/sessions/a"),
        ] {
            let reply = server.ask(method, path, &headers, Some("{}"));
            assert!(
                reply.status == 401 && reply.json()["error"]["code"] == "invalid_api_key",
                "{method} {path} {headers}: {reply:?}"
            );
        }
    }
    assert_eq!(server.ask("GET", "/health", "", None).json(), json!({ "status": "ok" }));
    let post = |key: &str, path: &str, body: Value| server.ask("POST", path, &with(key), Some(&body.to_string()));
    assert_eq!(post("first", "/v1/sessions", json!({ "name": "mine" })).status, 201);
    assert_eq!(post("first", "/v1/sessions/mine/append", json!({ "text": &book()[..500] })).status, 200);
    assert_eq!(post("second", "/v1/completions", json!({ "session": "mine", "prompt": "a" })).status, 404);
    assert_eq!(server.ask("GET", "/v1/sessions", &with("second"), None).json()["data"], json!([]));
    assert_eq!(server.ask("GET", "/v1/sessions", &with("first"), None).json()["data"][0]["tokens"], 500);
    // What one has sent is not there for another.
    let body = json!({ "prompt": &book()[..500], "max_tokens": 1 });
    let cached = |key: &str| {
        post(key, "/v1/completions", body.clone()).json()["usage"]["prompt_tokens_details"]["cached_tokens"].clone()
    };
    assert_eq!((cached("first"), cached("second"), cached("first")), (json!(0), json!(0), json!(500 / CHUNK * CHUNK)));
    let reply = server.ask("OPTIONS", "/v1/completions", &(with("first") + "origin: http://elsewhere\r\n"), None);
    assert!(!reply.headers.contains("access-control"), "{reply:?}");
}

#[test]
fn what_is_wrong_is_refused_by_name() {
    let server = serve("eight", "--max_body 20kB --max_prompt_tokens 10000 --max_new_tokens 50");
    let long = "a".repeat(10_001);
    for (body, status, param) in [
        (json!({}), 400, Some("prompt")),
        (json!({ "prompt": 5 }), 400, Some("prompt")),
        (json!({ "prompt": [99999] }), 400, Some("prompt")),
        (json!({ "prompt": [257] }), 400, Some("prompt")),
        (json!({ "prompt": long }), 400, Some("prompt")),
        (json!({ "prompt": "a", "max_tokens": 51 }), 400, Some("max_tokens")),
        (json!({ "prompt": "a", "max_tokens": -1 }), 400, Some("max_tokens")),
        (json!({ "prompt": "a", "temperature": -1 }), 400, Some("temperature")),
        (json!({ "prompt": "a", "top_p": 2 }), 400, Some("top_p")),
        (json!({ "prompt": "a", "n": 1e9 }), 400, Some("n")),
        (json!({ "prompt": "a", "presence_penalty": 1 }), 400, Some("presence_penalty")),
        (json!({ "prompt": "a", "session": "../../etc" }), 400, Some("session")),
        (json!({ "prompt": "a", "model": "gpt-4" }), 404, Some("model")),
        (json!({ "prompt": "a", "secret": 1 }), 400, None),
    ] {
        let reply = server.post("/v1/completions", body.clone(), status);
        let error = &reply["error"];
        assert_eq!(error["param"].as_str(), param, "{body:.100}: {reply}");
        assert!(error["message"].is_string() && error["type"] == "invalid_request_error", "{reply}");
        assert!(
            !error["message"].as_str().unwrap().contains("secret")
                && !error["message"].as_str().unwrap().contains("etc/")
        );
    }
    assert_eq!(
        server.post("/v1/chat/completions", json!({ "messages": [{ "role": "user", "content": "a" }] }), 400)["error"]
            ["code"],
        "no_chat_template"
    );
    let status = |headers: &str, body: &str| server.ask("POST", "/v1/completions", headers, Some(body)).status;
    assert_eq!(status("", "{\"prompt\": "), 400);
    assert_eq!(status("", &"[".repeat(15_000)), 400);
    assert_eq!(status("content-type: text/plain\r\n", "{\"prompt\": \"a\"}"), 415);
    assert_eq!(status("", &format!("{{\"prompt\": \"{}\"}}", "a".repeat(30_000))), 413);
    assert_eq!(server.ask("GET", "/none", "", None).status, 404);
    assert_eq!(server.ask("GET", "/v1/completions", "", None).json()["error"]["code"], "method_not_allowed");
    assert_eq!(server.ask("GET", "/v1/models/other", "", None).status, 404);
    // A page that found a name for this machine.
    let reply = server.ask("POST", "/v1/completions", "host: example.com\r\n", Some("{\"prompt\": \"a\"}"));
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (403, Some("foreign_host")));
    server.post("/v1/sessions", json!({ "name": ".hidden" }), 400);
    server.post("/v1/sessions", json!({ "name": "a", "block_dtype": "int4" }), 400);
    // None of it has done any harm.
    assert_eq!(
        server.post("/v1/completions", json!({ "prompt": "a", "max_tokens": 2 }), 200)["usage"]["prompt_tokens"],
        1
    );
    until("nothing is worked on", || server.metric("landmark_requests_active") == 0.);
}

/// Greedy, the model goes on about dark and stormy nights for as long as it is let.
fn endless() -> Value {
    json!({ "prompt": "It was a dark", "max_tokens": 1_000_000, "temperature": 0, "stream": true })
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_full_queue_is_told_and_a_client_that_leaves_makes_room() {
    let server = serve("nine", "--parallel 1 --queue 1 --max_new_tokens 1000000");
    let send = || server.send("POST", "/v1/completions", "", Some(&endless().to_string()));
    let mut first = send();
    until("one is worked on", || server.metric("landmark_requests_active") == 1.);
    let second = send();
    until("and one waits", || server.metric("landmark_requests_waiting") == 1.);
    let short = json!({ "prompt": "a", "max_tokens": 1 }).to_string();
    let refused = server.ask("POST", "/v1/completions", "", Some(&short));
    assert!(refused.status == 429 && refused.headers.contains("retry-after: 1"), "{refused:?}");
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    assert_eq!(server.ask("GET", "/health", "", None).status, 200);
    // The one that is worked on has begun to write.
    first.read_exact(&mut [0; 500]).unwrap();
    drop((first, second));
    until("both are gone", || server.ask("POST", "/v1/completions", "", Some(&short)).status == 200);
    until("and counted", || server.metric("landmark_requests_cancelled_total") == 2.);
    // A client that wants no stream can leave too.
    let mut whole = endless();
    whole["stream"] = json!(false);
    let stream = server.send("POST", "/v1/completions", "", Some(&whole.to_string()));
    until("it is worked on", || server.metric("landmark_requests_active") == 1.);
    drop(stream);
    until("it is gone", || server.metric("landmark_requests_active") == 0.);
}

#[test]
fn requests_are_worked_on_side_by_side() {
    let server = serve("ten", "--max_new_tokens 1000000 --max_seconds 4");
    let expected = generated("Chapter 7. It", 30, GREEDY);
    let mut long = server.send("POST", "/v1/completions", "", Some(&endless().to_string()));
    until("it is worked on", || server.metric("landmark_requests_active") == 1.);
    let body = json!({ "prompt": "Chapter 7. It", "max_tokens": 30, "temperature": 0 });
    assert_eq!(text(&server.post("/v1/completions", body, 200)), expected);
    until("the long one is left", || server.metric("landmark_requests_active") == 1.);
    // The other one comes to the end of its time, which its stream tells.
    let mut events = String::new();
    long.read_to_string(&mut events).unwrap();
    assert!(events.contains("\"code\":\"timeout\"") && !events.contains("[DONE]"));
}

/// Texts that are written at once are read together, and are what each would be alone.
#[test]
fn several_texts_are_written_in_one_pass() {
    let server = serve("thirteen", "--parallel 6 --kept_prompts 0");
    let prompts: Vec<String> = (0..6).map(|i| format!("{}Chapter {i}. It", &book()[..i * 137])).collect();
    let body = |prompt: &String| json!({ "prompt": prompt, "max_tokens": 300, "temperature": 0 });
    let alone: Vec<Value> = prompts.iter().map(|prompt| server.post("/v1/completions", body(prompt), 200)).collect();
    let counts =
        || ["written_tokens_total", "write_seconds_count"].map(|name| server.metric(&format!("landmark_{name}")));
    let [tokens, passes] = counts();
    assert_eq!(tokens, passes);
    std::thread::scope(|scope| {
        for (prompt, alone) in prompts.iter().zip(&alone) {
            let server = &server;
            scope.spawn(move || assert_eq!(text(&server.post("/v1/completions", body(prompt), 200)), text(alone)));
        }
    });
    let [all_tokens, all_passes] = counts();
    assert_eq!(all_tokens, 2. * tokens);
    assert!(all_passes - passes < 0.7 * tokens, "{tokens} tokens in {} passes", all_passes - passes);
}

#[test]
fn sigterm_waits_for_what_is_worked_on() {
    let mut server = serve("eleven", "--max_new_tokens 1000000");
    let body = json!({ "prompt": "It was a dark", "max_tokens": 2000, "temperature": 0 }).to_string();
    let mut stream = server.send("POST", "/v1/completions", "", Some(&body));
    until("it is worked on", || server.metric("landmark_requests_active") == 1.);
    assert!(Command::new("kill").args(["-TERM", &server.child.id().to_string()]).status().unwrap().success());
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("\"finish_reason\":\"length\""), "{reply:.300}");
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn what_cannot_be_served_is_refused_at_the_start() {
    let error = |arguments: &str| support::error(MODEL.path(), &format!("serve --port 0 --device cpu {arguments}"));
    let of = "--checkpoint exps/text/landmark/e --sessions twelve";
    assert!(error("--checkpoint none --sessions twelve").contains("--checkpoint"));
    assert!(error(&format!("{of} --api_key_file none")).contains("--api_key_file none"));
    assert!(error(&format!("{of} --lm_cache none")).contains("--lm_cache mem"));
    assert!(error(&format!("{of} --mem_cache_size 5")).contains("--mem_cache_size is refused"));
    assert!(error(&format!("{of} --parallel 0")).contains("--parallel 0: expected at least 1"));
    assert!(error("--checkpoint exps/text/landmark/e --sessions book.txt").contains("--sessions book.txt"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    assert!(
        support::error(MODEL.path(), &format!("serve --device cpu {of} --port {port}")).contains("cannot listen on")
    );
}
