//! HTTP: who is let in, what a body may be, and which route does what.

mod generate;
mod page;
mod sessions;
mod upload;

use crate::engine::{Command, Ticket};
use crate::fields::Fields;
use crate::metrics::Metrics;
use crate::request::encode;
use crate::{ApiError, Keys, Limits, Owner};
use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::StreamExt;
use landmark_data::Pretrained;
use landmark_inference::Template;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

/// How long a client may take for a body.
const BODY_TIME: Duration = Duration::from_secs(30);

/// What requests are answered with.
pub struct App {
    /// Tells the thread of the model what to do.
    pub commands: Sender<Command>,
    /// The tokenizer and its conventions.
    pub pretrained: Pretrained,
    /// How a conversation is written.
    pub template: Option<Template>,
    /// What clients call the model.
    pub name: String,
    /// When the server began, in seconds since 1970.
    pub since: u64,
    /// Who may ask.
    pub keys: Keys,
    /// Whether this machine's own clients are let in, and all of them.
    pub is_local: bool,
    /// What one client cannot take from the others.
    pub limits: Limits,
    /// Places of requests that are worked on or wait.
    pub slots: Arc<Semaphore>,
    /// Places of bodies that are looked into: JSON takes many times its bytes of memory.
    pub parsers: Semaphore,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// The command that has the text of a document.
    pub converter: Vec<OsString>,
}

/// All routes.
pub fn router(app: App) -> Router {
    let app = Arc::new(app);
    page::routes()
        .route("/health", get(|| async { in_json(&json!({ "status": "ok" })) }))
        .route("/metrics", get(metrics))
        .route("/tokenize", post(tokenize))
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/sessions", get(sessions::list).post(sessions::create))
        .route("/v1/sessions/{name}", get(sessions::show).delete(sessions::delete))
        .route("/v1/sessions/{name}/text", get(sessions::text))
        .route("/v1/sessions/{name}/export", get(sessions::export))
        .route("/v1/sessions/{name}/append", post(sessions::append))
        .route("/v1/sessions/{name}/fork", post(sessions::fork))
        .fallback(|| async { ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is no such route") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "the route does not have this method")
        })
        .layer(from_fn_with_state(app.clone(), let_in))
        .with_state(app)
}

/// Lets in who has a key, and counts what comes of it.
async fn let_in(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).map(|host| host.as_bytes());
    if app.is_local && !host.is_none_or(is_of_this_machine) {
        let message =
            "expected this machine by its address, or as localhost: another name may be a page's of another site";
        return ApiError::new(StatusCode::FORBIDDEN, "foreign_host", message).into_response();
    }
    let key = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let response = match app.keys.owner(key) {
        Some(owner) => {
            request.extensions_mut().insert(owner);
            next.run(request).await
        }
        None if is_open(request.uri().path()) => next.run(request).await,
        None => {
            let message = "expected one of this server's keys: Authorization: Bearer KEY";
            ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message).into_response()
        }
    };
    app.metrics.statuses[usize::from(response.status().as_u16() / 100).min(5)].add(1);
    response
}

/// Whether a route needs no key: it tells nothing of anybody.
fn is_open(path: &str) -> bool {
    path == "/health" || page::is_part(path)
}

/// Whether a `Host` header has an address, or `localhost`. A page whose name leads to this machine's address sends its name.
fn is_of_this_machine(host: &[u8]) -> bool {
    let host = std::str::from_utf8(host).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.contains(']') { host } else { name });
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    address.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.text()).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Response {
    in_json(&json!({ "object": "list", "data": [app.model()] }))
}

async fn model(State(app): State<Arc<App>>, name: Result<Path<String>, PathRejection>) -> Result<Response, ApiError> {
    match name {
        Ok(Path(name)) if name == app.name => Ok(in_json(&app.model())),
        _ => Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "model_not_found",
            format!("the model of this server is {}", app.name),
        )),
    }
}

/// The tokens of a text, without a mark for its beginning.
async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let _slot = app.slot()?;
    let (mut fields, _parser) = app.fields(request).await?;
    let text = fields.required_text("prompt")?;
    fields.end("prompt")?;
    let worker = app.clone();
    let tokens = aside(move || encode(&worker.pretrained.tokenizer, &text)).await??;
    Ok(in_json(&json!({ "tokens": tokens, "count": tokens.len() })))
}

impl App {
    fn model(&self) -> Value {
        json!({
            "id": self.name, "object": "model", "created": self.since, "owned_by": "landmark",
            "landmark": { "chat": self.template.is_some(), "max_body": self.limits.body },
        })
    }

    /// A place among the requests, if there is one left.
    fn slot(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.slots.clone().try_acquire_owned().map_err(|_| {
            let message = format!(
                "{} requests are worked on and {} wait, which is what this server takes; ask again soon",
                self.limits.parallel, self.limits.queue
            );
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
        })
    }

    /// The same with who asks and since when.
    fn ticket(&self, owner: Owner) -> Result<Ticket, ApiError> {
        Ok(Ticket { owner, arrived: Instant::now(), _slot: self.slot()? })
    }

    fn tell(&self, command: Command) -> Result<(), ApiError> {
        self.commands.send(command).map_err(|_| ApiError::ending())
    }

    /// The fields of a request's body, and a place to look into them. A page of another site cannot send one: browsers ask before they send JSON.
    async fn fields(&self, request: Request) -> Result<(Fields, SemaphorePermit<'_>), ApiError> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
            let message = "expected a body of JSON: Content-Type: application/json";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "not_json", message));
        }
        let body = self.bytes(request).await?;
        let place = self.place().await?;
        Ok((Fields::parse(&body)?, place))
    }

    /// A place to look into a body.
    async fn place(&self) -> Result<SemaphorePermit<'_>, ApiError> {
        self.parsers.acquire().await.map_err(|_| ApiError::ending())
    }

    /// The whole body, if it is not too long and does not take too long.
    async fn bytes(&self, request: Request) -> Result<Vec<u8>, ApiError> {
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        if length.and_then(|length| length.parse().ok()).is_some_and(|length: u64| length > self.limits.body) {
            return Err(self.too_long());
        }
        let body = tokio::time::timeout(BODY_TIME, self.body(request.into_body())).await;
        let message = || format!("the body did not come in {} seconds", BODY_TIME.as_secs());
        body.map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "slow_body", message()))?
    }

    async fn body(&self, body: Body) -> Result<Vec<u8>, ApiError> {
        let (mut parts, mut bytes) = (body.into_data_stream(), Vec::new());
        while let Some(part) = parts.next().await {
            let part =
                part.map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "cut_body", "the body came to no end"))?;
            if (bytes.len() + part.len()) as u64 > self.limits.body {
                return Err(self.too_long());
            }
            bytes.extend_from_slice(&part);
        }
        Ok(bytes)
    }

    fn too_long(&self) -> ApiError {
        let message = format!("the body is too long: expected at most {} bytes (--max_body)", self.limits.body);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_long", message)
    }

    /// Refuses more tokens than may come at once.
    fn check_length(&self, tokens: usize, param: &'static str) -> Result<(), ApiError> {
        let most = self.limits.prompt_tokens;
        if tokens <= most {
            return Ok(());
        }
        let message = format!("{tokens} tokens, expected at most {most} (--max_prompt_tokens)");
        Err(ApiError { code: "context_length_exceeded", ..ApiError::value(param, message) })
    }
}

/// Work that takes its time, on a thread for that.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| ApiError::internal(&error.into()))
}

/// Now, in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn in_json(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_not_of_this_machine() {
        for good in ["127.0.0.1", "127.0.0.1:8080", "localhost", "LocalHost:80", "[::1]", "[::1]:8080"] {
            assert!(is_of_this_machine(good.as_bytes()), "{good}");
        }
        for bad in
            ["", "example.com", "example.com:8080", "localhost.example.com", "127.0.0.1.example.com:80", "\u{e9}"]
        {
            assert!(!is_of_this_machine(bad.as_bytes()), "{bad}");
        }
        assert!(!is_of_this_machine(b"\xff"));
    }
}
