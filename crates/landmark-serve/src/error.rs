//! What can go wrong: with the server, and with one request.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why a server does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model cannot be opened, or is not one that can be served.
    #[error(transparent)]
    Model(anyhow::Error),
    /// The folder of the sessions cannot be used.
    #[error("--sessions {}: {reason}", path.display())]
    Sessions {
        /// The folder.
        path: PathBuf,
        /// Why not.
        reason: std::io::Error,
    },
    /// A file of keys cannot be used.
    #[error("--api_key_file {}: {reason}", path.display())]
    Keys {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The address is taken, or not one of this machine's.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        reason: std::io::Error,
    },
    /// A thread, or the watch for signals, cannot be set up.
    #[error("cannot start the server: {0}")]
    Start(std::io::Error),
    /// A document has no text for us.
    #[error("the document cannot be read: {reason}")]
    Document {
        /// Why not.
        reason: String,
    },
    /// The thread that has the model is gone.
    #[error("the thread that has the model ended")]
    ModelThread,
}

/// What a client is told, in the shape of OpenAI's errors. A message never repeats what the client sent.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// The status.
    pub status: StatusCode,
    /// A word for programs.
    pub code: &'static str,
    /// The field that is wrong.
    pub param: Option<&'static str>,
    /// A sentence for people.
    pub message: String,
}

impl ApiError {
    /// With a status.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into() }
    }

    /// A field's value is not one that it can have: 400.
    pub fn value(param: &'static str, message: impl Into<String>) -> Self {
        let message = format!("{param}: {}", message.into());
        Self { status: StatusCode::BAD_REQUEST, code: "invalid_value", param: Some(param), message }
    }

    /// A field that is not supported, by name: 400.
    pub fn unsupported(param: &'static str) -> Self {
        let message = format!("{param} is not supported by this server; leave it out");
        Self { status: StatusCode::BAD_REQUEST, code: "unsupported_parameter", param: Some(param), message }
    }

    /// A mistake of the server's own. The client is told that there was one, the log which.
    pub fn internal(error: &anyhow::Error) -> Self {
        eprintln!("landmark serve: error: {error:#}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "the server failed; its log says at what")
    }

    /// The server is told to end.
    pub fn ending() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "the server is shutting down")
    }

    /// As JSON.
    pub fn json(&self) -> serde_json::Value {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}

impl From<anyhow::Error> for ApiError {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast_ref::<landmark_memory::Error>() {
            Some(landmark_memory::Error::Full { .. }) => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "no_room",
                "there is no room on the disk, or the session has what it may take of it; it holds what it did before the last chunk",
            ),
            _ => Self::internal(&error),
        }
    }
}

impl From<landmark_memory::Error> for ApiError {
    fn from(error: landmark_memory::Error) -> Self {
        anyhow::Error::from(error).into()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = self.json().to_string();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}
