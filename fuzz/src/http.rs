//! Requests: a first line with method and path, perhaps with the body's type, then the body. They are answered by all of the server but its sockets, with a small model.

use std::cell::OnceCell;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use landmark_inference::{CacheFlags, Room};
use landmark_serve::{Keys, Limits, Settings, routes};
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::{models, place};

const CHAT: &str = "{% for message in messages %}{% if message.role == 'system' and not loop.first %}{{ raise_exception('order') }}{% endif %}\
                    {{ message.role }}: {{ message.content | trim }}\n{% endfor %}assistant:";

const JSON: HeaderValue = HeaderValue::from_static("application/json");

struct Server {
    runtime: Runtime,
    router: Router,
    /// The folder of the sessions, and a session as it is before every request.
    sessions: PathBuf,
    files: Vec<(String, Vec<u8>)>,
}

impl Server {
    fn start() -> Self {
        let (model, sessions) = (place::folder("request-model"), place::folder("request-sessions"));
        models::write_gpt(&model);
        let limits = Limits {
            body: 1 << 16,
            prompt_tokens: 500,
            new_tokens: 4,
            time: Duration::from_secs(20),
            parallel: 2,
            queue: 2,
            kept: 1 << 20,
            session_disk: Some(1 << 20),
            key_disk: None,
            connections: 1,
            grace: Duration::ZERO,
        };
        let settings = Settings {
            model: models::flags(&model, None, None),
            cache: CacheFlags::default(),
            name: "small".into(),
            chat_template: Some(CHAT.into()),
            sessions: sessions.clone(),
            room: Room { ram: 1 << 16, gpu_memory: 0 },
            // Documents are read by other processes.
            converter: Vec::new(),
            host: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            keys: Keys::none(),
            limits,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let router = routes(settings).expect("a model that was just written");
        let mut server = Self { runtime, router, sessions: sessions.join("local"), files: Vec::new() };
        let post =
            |path: &str, body: &str| server.ask(Method::POST, &path.parse().expect("a path"), &JSON, body.as_bytes());
        assert_eq!(post("/v1/sessions", "{\"name\": \"s\"}"), StatusCode::CREATED);
        assert_eq!(post("/v1/sessions/s/append", "{\"text\": \"Anne was 27 when she read this.\"}"), StatusCode::OK);
        server.files = place::files(&server.sessions.join("s"));
        server
    }

    /// Asks and reads the answer, which is none of a server that failed.
    fn ask(&self, method: Method, path: &Uri, kind: &HeaderValue, body: &[u8]) -> StatusCode {
        let request = Request::builder().method(method).uri(path.clone());
        let request = request.header(header::CONTENT_TYPE, kind).body(Body::from(body.to_vec()));
        let request = request.expect("a request of parts that were checked");
        let answer = async {
            let response = self.router.clone().oneshot(request).await.expect("routes do not fail");
            let status = response.status();
            (status, to_bytes(response.into_body(), usize::MAX).await.expect("the answer comes to its end"))
        };
        let (status, answer) = self.runtime.block_on(answer);
        let answer = String::from_utf8(answer.to_vec()).expect("answers are UTF-8");
        let failed = status.is_server_error() && status != StatusCode::INSUFFICIENT_STORAGE;
        assert!(!failed && !answer.contains("\"server_error\""), "{status}: {answer}");
        status
    }
}

/// See the module.
pub fn run(bytes: &[u8]) -> bool {
    thread_local! {
        static SERVER: OnceCell<Server> = const { OnceCell::new() };
    }
    let Some(end) = bytes.iter().position(|&byte| byte == b'\n') else { return false };
    let body = &bytes[end + 1..];
    let mut words = bytes[..end].splitn(3, |&byte| byte == b' ');
    let method = words.next().and_then(|word| Method::from_bytes(word).ok());
    let path = words.next().and_then(|word| Uri::try_from(word).ok());
    let kind = words.next().map_or(Ok(JSON), HeaderValue::from_bytes);
    let (Some(method), Some(path), Ok(kind)) = (method, path, kind) else { return false };
    SERVER.with(|server| {
        let server = server.get_or_init(Server::start);
        let status = server.ask(method.clone(), &path, &kind, body);
        if method != Method::GET && path.path().starts_with("/v1/sessions") {
            place::fill(&server.sessions, &[]);
            place::fill(&server.sessions.join("s"), &server.files);
        }
        status.is_success()
    })
}

pub fn seeds() -> Vec<Vec<u8>> {
    let requests = [
        "GET /health\n",
        "GET /metrics\n",
        "GET /v1/models/small\n",
        "GET /v1/sessions\n",
        "GET /v1/sessions/s\n",
        "GET /v1/sessions/s/text?first_token=3&end_token=9\n",
        "GET /page.js\n",
        "DELETE /v1/sessions/s\n",
        "POST /tokenize Application/JSON; charset=utf-8\n{\"prompt\": \"Anne \\u00e9\\ud83d\\ude00\"}",
        "POST /v1/sessions\n{\"name\": \"new\", \"block_dtype\": \"int8\"}",
        "POST /v1/sessions/s/append\n{\"text\": \"Once more.\", \"new_text\": true}",
        "POST /v1/sessions/s/append text/markdown; charset=\"utf-8\"\n\u{feff}# Once\n\nmore.",
        "POST /v1/sessions/s/append multipart/form-data; boundary=x\n--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\
         Content-Type: text/plain\r\n\r\nOnce more.\r\n--x\r\nContent-Disposition: form-data; name=\"new_text\"\r\n\r\ntrue\r\n--x--\r\n",
        "POST /v1/sessions/s/fork\n{\"name\": \"other\"}",
        "POST /v1/completions\n{\"model\": \"small\", \"prompt\": \"Anne was\", \"max_tokens\": 3, \"temperature\": 0, \"stop\": [\"x\", \"\\n\"]}",
        "POST /v1/completions\n{\"prompt\": [[1, 2, 3], [65, 256]], \"n\": 2, \"best_of\": 2, \"echo\": true, \"logprobs\": 2, \"max_tokens\": 0, \
         \"seed\": -1, \"top_p\": 0.5, \"top_k\": 3, \"suffix\": \"\", \"logit_bias\": {}, \"frequency_penalty\": 0.0}",
        "POST /v1/completions\n{\"prompt\": \"And\", \"session\": \"s\", \"show_blocks\": 3, \"stream\": true, \"stream_options\": \
         {\"include_usage\": true, \"include_obfuscation\": false}, \"max_tokens\": 2, \"temperature\": 1.5}",
        "POST /v1/chat/completions\n{\"messages\": [{\"role\": \"system\", \"content\": \"Be kind.\"}, {\"role\": \"user\", \"content\": \
         [{\"type\": \"text\", \"text\": \"Hello\"}]}, {\"role\": \"assistant\", \"content\": \"Hi\"}, {\"role\": \"user\", \"content\": \"Who?\"}], \
         \"max_completion_tokens\": 4, \"tools\": [], \"response_format\": {\"type\": \"text\"}, \"session\": \"s\"}",
        "POST /v1/chat/completions\n{\"messages\": [{\"role\": \"user\", \"content\": \"<|end of text|>\"}], \"stream\": true, \"max_tokens\": 1, \
         \"logprobs\": false, \"user\": \"\", \"tool_choice\": \"none\"}",
    ];
    requests.map(|request| request.as_bytes().to_vec()).to_vec()
}
