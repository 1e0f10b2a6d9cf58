//! Files that clients of `landmark serve` append: what is in them is read, and what they are not is told.

#![cfg(unix)]

mod support;

use serde_json::json;
use std::path::Path;
use support::http::{Reply, Server, serve};

/// Appends a file to a session of its own.
fn append(server: &Server, name: &str, kind: &str, file: &[u8]) -> Reply {
    server.post("/v1/sessions", json!({ "name": name }), 201);
    server.upload(&format!("/v1/sessions/{name}/append"), &format!("content-type: {kind}\r\n"), file)
}

fn text_of(server: &Server, name: &str) -> String {
    let tokens = server.get(&format!("/v1/sessions/{name}"))["tokens"].as_u64().unwrap();
    let text = server.get(&format!("/v1/sessions/{name}/text?first_token=0&end_token={tokens}"));
    text["text"].as_str().unwrap().to_string()
}

/// A form with these fields, each with its headers.
fn form(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut form = Vec::new();
    for (head, value) in fields {
        form.extend(format!("--frontier\r\nContent-Disposition: form-data; {head}\r\n\r\n").bytes());
        form.extend(*value);
        form.extend(b"\r\n");
    }
    form.extend(b"--frontier--\r\n");
    form
}

const FORM: &str = "multipart/form-data; boundary=frontier";

/// A document of one page, as simple as they are.
fn pdf(line: &str) -> Vec<u8> {
    let page = format!("BT /F1 12 Tf 72 700 Td ({line}) Tj ET");
    let objects = [
        "<< /Type /Catalog /Pages 2 0 R >>".to_string(),
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>".into(),
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 5 0 R /Resources << /Font << /F1 4 0 R >> >> >>".into(),
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>".into(),
        format!("<< /Length {} >>\nstream\n{page}\nendstream", page.len()),
    ];
    let (mut file, mut places) = ("%PDF-1.4\n".to_string(), Vec::new());
    for (i, object) in objects.iter().enumerate() {
        places.push(format!("{:010} 00000 n \n", file.len()));
        file += &format!("{} 0 obj\n{object}\nendobj\n", i + 1);
    }
    let start = file.len();
    file += &format!("xref\n0 6\n0000000000 65535 f \n{}", places.concat());
    file += &format!("trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n");
    file.into_bytes()
}

const HTML: &str = "<!doctype html><title>T</title><style>p { color: red }</style><script>alert('no')</script>\
    <h1>The <em>garden</em> key</h1><p>It is 31415 &amp; no other.<p>Remember\n  it.";

#[test]
fn files_are_read_whatever_they_come_as() {
    let server = serve("one", "");
    let markdown = "# The garden key\n\nIt is *31415*.";
    for (name, kind, file, expected) in [
        ("plain", "text/plain", "It is 31415.".as_bytes().to_vec(), "It is 31415."),
        ("marked", "text/plain; charset=UTF-8", "\u{feff}It is 31415, né.".into(), "It is 31415, né."),
        ("markdown", "text/markdown", markdown.into(), markdown),
        ("html", "text/html", HTML.into(), "The garden key\n\nIt is 31415 & no other.\n\nRemember it."),
        ("pdf", "application/pdf", pdf("The garden key is 31415."), "The garden key is 31415."),
    ] {
        let reply = append(&server, name, kind, &file);
        assert_eq!(reply.status, 200, "{name}: {reply:?}");
        assert_eq!(reply.json()["tokens"], expected.len(), "{name}");
        assert_eq!(text_of(&server, name), expected);
        // The same in a form, as pages and curl -F send it.
        let file: &[u8] = &file;
        let head = format!("name=\"file\"; filename=\"a.txt\"\r\nContent-Type: {kind}");
        let reply =
            append(&server, &format!("{name}-form"), FORM, &form(&[(&head, file), ("name=\"new_text\"", b"true")]));
        assert_eq!(reply.status, 200, "{name}: {reply:?}");
        assert_eq!(text_of(&server, &format!("{name}-form")), expected);
    }
}

#[test]
fn files_that_are_not_what_they_say_are_refused() {
    let server = serve("two", "--max_body 60kB");
    let head = "name=\"file\"\r\nContent-Type: text/plain";
    let deep = "<div>".repeat(2000);
    for (kind, file, status, code) in [
        ("application/zip", b"PK\x03\x04secret".to_vec(), 415, "unsupported_type"),
        ("", b"secret".to_vec(), 415, "unsupported_type"),
        ("text/plain; charset=latin1", b"secret".to_vec(), 415, "unsupported_type"),
        ("text/plain", b"secret \xff\xfe".to_vec(), 422, "not_utf8"),
        ("text/plain", b"secret\0".to_vec(), 422, "not_utf8"),
        ("text/html", b"<p>secret \xe9".to_vec(), 422, "not_utf8"),
        ("text/plain", pdf("secret"), 422, "wrong_type"),
        ("text/html", pdf("secret"), 422, "wrong_type"),
        ("application/pdf", b"secret".to_vec(), 422, "wrong_type"),
        ("application/pdf", b"%PDF-1.4\nsecret".to_vec(), 422, "unreadable_document"),
        ("application/pdf", pdf(""), 422, "no_text"),
        ("text/html", deep.into_bytes(), 422, "no_text"),
        ("text/plain", b" \n ".to_vec(), 422, "no_text"),
        ("text/plain", vec![b'a'; 70_000], 413, "body_too_long"),
        ("multipart/form-data", b"secret".to_vec(), 400, "invalid_form"),
        (FORM, b"secret".to_vec(), 400, "invalid_form"),
        (FORM, form(&[]), 400, "invalid_value"),
        (FORM, form(&[("name=\"secret\"", b"secret")]), 400, "unknown_parameter"),
        (FORM, form(&[(head, b"secret"), (head, b"secret")]), 400, "unknown_parameter"),
        (FORM, form(&[("name=\"new_text\"", b"secret"), (head, b"a")]), 400, "invalid_value"),
        (FORM, form(&[("name=\"file\"\r\nContent-Type: image/png", b"secret")]), 415, "unsupported_type"),
        (FORM, form(&[("name=\"file\"", b"secret")]), 415, "unsupported_type"),
    ] {
        server.post("/v1/sessions", json!({ "name": "a" }), 201);
        let reply = server.upload("/v1/sessions/a/append", &format!("content-type: {kind}\r\n"), &file);
        let told = reply.json();
        assert_eq!((reply.status, told["error"]["code"].as_str()), (status, Some(code)), "{kind}: {reply:?}");
        assert!(!reply.body.contains("secret"), "{kind}: {reply:?}");
        assert_eq!(server.get("/v1/sessions/a")["tokens"], 0);
        assert_eq!(server.ask("DELETE", "/v1/sessions/a", "", None).status, 200);
    }
    // A page of another site can send these without asking, and is told apart.
    server.post("/v1/sessions", json!({ "name": "a" }), 201);
    let from = |origin: &str| {
        let headers = format!("content-type: text/plain\r\nhost: localhost\r\norigin: {origin}\r\n");
        server.upload("/v1/sessions/a/append", &headers, b"a").status
    };
    assert_eq!([from("http://evil.example"), from("null"), from("http://localhost")], [403, 403, 200]);
}

/// Damaged documents end the process that reads them, at most.
#[test]
fn damaged_documents_harm_nobody() {
    let server = serve("three", "");
    let whole = pdf("The garden key is 31415.");
    let mut random = support::random();
    let mut refused = 0;
    for i in 0..60 {
        let mut file = whole.clone();
        if i % 2 == 0 {
            file.truncate(9 + (random() * (file.len() - 9) as f64) as usize);
        } else {
            for _ in 0..20 {
                let at = 9 + (random() * (file.len() - 9) as f64) as usize;
                file[at] = (random() * 256.) as u8;
            }
        }
        let reply = append(&server, &format!("a{i}"), "application/pdf", &file);
        assert!(reply.status == 200 || reply.status == 422, "{reply:?}");
        refused += usize::from(reply.status == 422);
    }
    assert!(refused > 10, "{refused} of 60 were refused");
    assert_eq!(append(&server, "whole", "application/pdf", &whole).status, 200);
}

#[test]
fn the_converter_says_what_it_cannot_read() {
    let error = support::error(Path::new("."), "document zip");
    assert!(error.contains("expected html or pdf"), "{error}");
}
