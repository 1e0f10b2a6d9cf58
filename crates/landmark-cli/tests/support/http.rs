//! `landmark serve` as a process of its own, and a client that speaks just enough HTTP.

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

/// A folder with a trained model in `exps/text/landmark/e` and a chat template.
pub static MODEL: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("book.txt"), book()).unwrap();
    let template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:";
    fs::write(folder.path().join("template.jinja"), template).unwrap();
    fs::write(folder.path().join("keys"), "first\nsecond\n").unwrap();
    let prepare = "prepare --dataset text --data_dir book.txt --tokenizer bytes --out data/text";
    let train = "train --dataset text --model landmark --n_embd 32 --n_head 2 --n_layer 2 --batch_size 4 --acc_steps 1 \
        --sequence_length 64 --mem_freq 7 --device cpu --iterations 30 --exp_name e";
    [prepare, train].iter().for_each(|arguments| drop(super::succeed(folder.path(), arguments)));
    folder
});

/// Tokens that are read at once: with a window of 64 a token reads 3 blocks of 8 beside the unfinished one.
pub const CHUNK: usize = 28;

/// A text.
pub fn book() -> String {
    (0..400).map(|i| format!("Chapter {i}. It was a dark and stormy night. ")).collect()
}

/// A server with sessions in a folder.
pub fn serve(sessions: &str, flags: &str) -> Server {
    Server::start(MODEL.path(), &format!("--checkpoint exps/text/landmark/e --sessions {sessions} {flags}"))
}

/// A server that ends with its test.
pub struct Server {
    pub child: Child,
    address: String,
}

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    /// Header lines, in lower case.
    pub headers: String,
    pub body: String,
}

impl Server {
    /// Starts one on a free port.
    pub fn start(folder: &Path, arguments: &str) -> Self {
        let mut command = super::command(folder, &format!("serve --port 0 --device cpu {arguments}"));
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit_once("http://").unwrap_or_else(|| panic!("{arguments}: {line:?}")).1;
        Self { child, address: address.strip_suffix("/v1").unwrap().into() }
    }

    /// The address of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Sends the head of a request, and a body if there is one; what comes back is for the caller to read.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: Option<&str>) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        let length = body.map_or(String::new(), |body| format!("content-length: {}\r\n", body.len()));
        let host = if headers.contains("host: ") { "" } else { "host: localhost\r\n" };
        let kind = if headers.contains("content-type") { "" } else { "content-type: application/json\r\n" };
        let head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n{host}{kind}{length}{headers}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses a body need not read it.
        let _ = stream.write_all(body.unwrap_or_default().as_bytes());
        stream
    }

    /// A request and its reply.
    pub fn ask(&self, method: &str, path: &str, headers: &str, body: Option<&str>) -> Reply {
        let mut stream = self.send(method, path, headers, body);
        let mut bytes = Vec::new();
        // A server that refused a body may close before it is all sent.
        let _ = stream.read_to_end(&mut bytes);
        Reply::parse(&bytes)
    }

    /// Posts a file, whose headers say what it is.
    pub fn upload(&self, path: &str, headers: &str, file: &[u8]) -> Reply {
        let mut stream = self.send("POST", path, &format!("{headers}content-length: {}\r\n", file.len()), None);
        let mut bytes = Vec::new();
        // A server that refuses a file may close before it is all sent.
        let _ = stream.write_all(file);
        let _ = stream.read_to_end(&mut bytes);
        Reply::parse(&bytes)
    }

    /// Posts JSON, and gives what comes back with this status.
    pub fn post(&self, path: &str, body: Value, status: u16) -> Value {
        let reply = self.ask("POST", path, "", Some(&body.to_string()));
        assert_eq!(reply.status, status, "{path} {body:.200}: {reply:?}");
        reply.json()
    }

    /// Posts JSON, and gives the events of the stream that comes back.
    pub fn stream(&self, path: &str, body: Value) -> Vec<String> {
        let reply = self.ask("POST", path, "", Some(&body.to_string()));
        assert!(reply.status == 200 && reply.headers.contains("content-type: text/event-stream"), "{reply:?}");
        reply.body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).map(str::to_string).collect()
    }

    /// Gets JSON.
    pub fn get(&self, path: &str) -> Value {
        let reply = self.ask("GET", path, "", None);
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        reply.json()
    }

    /// The number in a line of the metrics.
    pub fn metric(&self, name: &str) -> f64 {
        let reply = self.ask("GET", "/metrics", "", None);
        let line = reply.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is not in {}", reply.body)).parse().unwrap()
    }

    /// Ends it as kill -9 does.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Reply {
    fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("no reply: {:?}", String::from_utf8_lossy(bytes)));
        let headers = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
        let status = headers[9..12].parse().unwrap();
        let rest = &bytes[end + 4..];
        let body = if headers.contains("transfer-encoding: chunked") { joined(rest) } else { rest.to_vec() };
        Self { status, headers, body: String::from_utf8(body).unwrap() }
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// The chunks of a body, joined.
fn joined(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|two| two == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if length == 0 {
            break;
        }
        body.extend_from_slice(&rest[end + 2..][..length]);
        rest = &rest[end + 2 + length + 2..];
    }
    body
}
