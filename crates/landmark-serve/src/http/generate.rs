//! `/v1/completions` and `/v1/chat/completions`.

use super::{App, aside, in_json, now};
use crate::engine::{Command, Event};
use crate::reply::{Kind, Reply};
use crate::request::{self, Written};
use crate::{ApiError, Owner};
use axum::Extension;
use axum::extract::{Request, State};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use landmark_inference::hex;
use rand_core::{OsRng, TryRngCore};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Goes on with texts.
pub async fn completions(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(app, owner, request, Kind::Completion).await
}

/// Answers in a conversation.
pub async fn chat(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    request: Request,
) -> Result<Response, ApiError> {
    generate(app, owner, request, Kind::Chat).await
}

async fn generate(app: Arc<App>, owner: Owner, request: Request, kind: Kind) -> Result<Response, ApiError> {
    let ticket = app.ticket(owner)?;
    let (fields, parser) = app.fields(request).await?;
    let seed = random().map_err(|error| ApiError::internal(&error))?;
    let request::Request { prompts, wanted, streaming } = match kind {
        Kind::Completion => request::Request::completion(fields, &app.name, &app.limits, seed)?,
        Kind::Chat => request::Request::chat(fields, &app.name, &app.limits, seed)?,
    };
    let writer = app.clone();
    let write = move || {
        let write = |prompt: request::Prompt| prompt.write(&writer.pretrained.tokenizer, writer.template.as_ref());
        prompts.into_iter().map(write).collect::<Result<Vec<Written>, ApiError>>()
    };
    let prompts = aside(write).await??;
    drop(parser);
    let name = if kind == Kind::Chat { "messages" } else { "prompt" };
    prompts.iter().try_for_each(|prompt| app.check_length(prompt.tokens.len(), name))?;

    let has_logprobs = wanted.logprobs.is_some();
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let id = random().map_err(|error| ApiError::internal(&error))?;
    let id = format!("{prefix}-{}", hex(&id.to_be_bytes()));
    let has_top = wanted.logprobs.is_some_and(|most| most > 0);
    let reply = Reply::new(kind, id, now(), app.name.clone(), has_top, streaming.usage);

    let (events, mut receiver) = unbounded_channel();
    app.tell(Command::Generate { ticket, wanted, prompts, events })?;
    // Before the first byte of the reply a request can be refused with a status.
    match receiver.recv().await {
        Some(Event::Started) => {}
        Some(Event::Failed(error)) => return Err(error),
        _ => return Err(ApiError::ending()),
    }
    if streaming.stream {
        return Ok(in_chunks(reply, receiver));
    }
    let mut events = Vec::new();
    loop {
        match receiver.recv().await {
            Some(Event::Failed(error)) => return Err(error),
            None => return Err(ApiError::ending()),
            Some(event) => {
                let is_last = matches!(event, Event::Done(_));
                events.push(event);
                if is_last {
                    return Ok(in_json(&reply.whole(events, has_logprobs)));
                }
            }
        }
    }
}

/// The reply as server-sent events. If the client leaves, the receiver goes with the stream.
fn in_chunks(reply: Reply, receiver: UnboundedReceiver<Event>) -> Response {
    let chunks =
        stream::unfold(Some((reply, receiver)), |state: Option<(Reply, UnboundedReceiver<Event>)>| async move {
            let (mut reply, mut receiver) = state?;
            let (values, goes_on) = match receiver.recv().await {
                Some(Event::Failed(error)) => (vec![error.json().to_string()], false),
                None => (vec![ApiError::ending().json().to_string()], false),
                Some(event) => {
                    let is_last = matches!(event, Event::Done(_));
                    let mut values: Vec<String> = reply.chunks(event).iter().map(ToString::to_string).collect();
                    if is_last {
                        values.push("[DONE]".into());
                    }
                    (values, !is_last)
                }
            };
            Some((stream::iter(values), goes_on.then_some((reply, receiver))))
        });
    let events = chunks.flatten().map(|data| Ok::<_, Infallible>(sse::Event::default().data(data)));
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

/// A number that nobody can foresee.
fn random() -> anyhow::Result<u64> {
    Ok(OsRng.try_next_u64()?)
}
