//! `/v1/sessions`.

use super::upload::{Upload, upload};
use super::{App, aside, in_json};
use crate::engine::{Append, Call, Command};
use crate::request::{SessionName, encode};
use crate::{ApiError, Owner};
use axum::Extension;
use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use landmark_memory::BlockType;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// Tokens whose text is given at once.
const MOST_SHOWN: u64 = 4096;

type Name = Result<Path<String>, PathRejection>;

/// The session in the path.
fn named(name: Name) -> Result<SessionName, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::value("session", "its name is not UTF-8"))?;
    SessionName::parse(&name, "session")
}

/// Has the thread of the model do it.
async fn value(app: &App, owner: Owner, call: Call) -> Result<Value, ApiError> {
    let (reply, answer) = oneshot::channel();
    app.tell(Command::Session { owner, call, reply })?;
    answer.await.map_err(|_| ApiError::ending())?
}

/// The same, as a response.
async fn call(app: &App, owner: Owner, call: Call) -> Result<Response, ApiError> {
    Ok(in_json(&value(app, owner, call).await?))
}

/// Tells of all.
pub async fn list(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>) -> Result<Response, ApiError> {
    call(&app, owner, Call::List).await
}

/// Tells of one.
pub async fn show(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    name: Name,
) -> Result<Response, ApiError> {
    call(&app, owner, Call::Show(named(name)?)).await
}

/// The text of some of its tokens.
pub async fn text(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    name: Name,
    range: Result<Query<HashMap<String, String>>, QueryRejection>,
) -> Result<Response, ApiError> {
    let name = named(name)?;
    let range = token_range(range.map(|Query(fields)| fields).unwrap_or_default())?;
    let tokens = value(&app, owner, Call::Tokens(name, range)).await?;
    let tokens: Vec<u32> = tokens_of(&tokens).collect();
    let text = app.pretrained.tokenizer.decode(&tokens).map_err(anyhow::Error::from)?;
    Ok(in_json(&json!({ "text": text })))
}

fn tokens_of(value: &Value) -> impl Iterator<Item = u32> {
    value.as_array().into_iter().flatten().filter_map(|token| token.as_u64()?.try_into().ok())
}

/// The tokens that `first_token` and `end_token` (which is not one of them) name, at most so many that they are decoded at once.
fn token_range(mut fields: HashMap<String, String>) -> Result<Range<u64>, ApiError> {
    let mut number = |name: &'static str| {
        let number = fields.remove(name).and_then(|number| number.parse::<u64>().ok());
        number.ok_or_else(|| ApiError::value(name, "expected the number of a token"))
    };
    let range = number("first_token")?..number("end_token")?;
    if range.start > range.end || range.end - range.start > MOST_SHOWN {
        let expected = format!("expected first_token, and up to {MOST_SHOWN} more");
        return Err(ApiError::value("end_token", expected));
    }
    if !fields.is_empty() {
        let message = "the query has a field that is not known; known are first_token and end_token";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "unknown_parameter", message));
    }
    Ok(range)
}

/// All of its text, as it was when it was asked for.
pub async fn export(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    name: Name,
) -> Result<Response, ApiError> {
    let name = named(name)?;
    let count = value(&app, owner.clone(), Call::Show(name.clone())).await?["tokens"].as_u64().unwrap_or(0);
    let (parts, receiver) = mpsc::channel(2);
    tokio::task::spawn_blocking(move || {
        let mut decoder = app.pretrained.tokenizer.decoder();
        let mut part = |from: u64| -> Result<String, ApiError> {
            let (reply, answer) = oneshot::channel();
            let call = Call::Tokens(name.clone(), from..count.min(from + MOST_SHOWN));
            app.tell(Command::Session { owner: owner.clone(), call, reply })?;
            let tokens = answer.blocking_recv().map_err(|_| ApiError::ending())??;
            tokens_of(&tokens)
                .map(|token| decoder.push(token).map_err(|error| anyhow::Error::from(error).into()))
                .collect()
        };
        for from in (0..count).step_by(MOST_SHOWN as usize) {
            // What cannot be read any more ends the connection before its text is whole, which clients notice.
            let part = part(from).map_err(|error| std::io::Error::other(error.message));
            let is_over = part.is_err();
            if parts.blocking_send(part).is_err() || is_over {
                return;
            }
        }
        if let Ok(rest) = decoder.finish() {
            let _ = parts.blocking_send(Ok(rest));
        }
    });
    let text = stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], Body::from_stream(text)).into_response())
}

/// Removes one.
pub async fn delete(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    name: Name,
) -> Result<Response, ApiError> {
    call(&app, owner, Call::Delete(named(name)?)).await
}

/// Makes one.
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    request: Request,
) -> Result<Response, ApiError> {
    let _slot = app.slot()?;
    let (mut fields, parser) = app.fields(request).await?;
    let name = SessionName::parse(&fields.required_text("name")?, "name")?;
    let block_type = match fields.text("block_dtype")? {
        None => BlockType::default(),
        Some(name) => name.parse().map_err(|_| ApiError::value("block_dtype", "expected float32, bfloat16 or int8"))?,
    };
    fields.end("name and block_dtype")?;
    drop(parser);
    let created = call(&app, owner, Call::Create(name, block_type)).await?;
    Ok((StatusCode::CREATED, created).into_response())
}

/// Makes another that goes on from here.
pub async fn fork(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    name: Name,
    request: Request,
) -> Result<Response, ApiError> {
    let from = named(name)?;
    let _slot = app.slot()?;
    let (mut fields, parser) = app.fields(request).await?;
    let to = SessionName::parse(&fields.required_text("name")?, "name")?;
    fields.end("name")?;
    drop(parser);
    let created = call(&app, owner, Call::Fork(from, to)).await?;
    Ok((StatusCode::CREATED, created).into_response())
}

/// Reads a text into one. The answer comes when the disk has it.
pub async fn append(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    name: Name,
    request: Request,
) -> Result<Response, ApiError> {
    let session = named(name)?;
    let ticket = app.ticket(owner)?;
    let Upload { text, is_new_text, place } = upload(&app, request).await?;
    let writer = app.clone();
    let tokens = aside(move || encode(&writer.pretrained.tokenizer, &text)).await??;
    drop(place);
    if tokens.is_empty() {
        return Err(ApiError::value("text", "it is empty"));
    }
    app.check_length(tokens.len(), "text")?;
    let (reply, answer) = oneshot::channel();
    app.tell(Command::Append { ticket, append: Append { session, tokens, is_new_text }, reply })?;
    Ok(in_json(&answer.await.map_err(|_| ApiError::ending())??))
}
