//! A text on its way into a session: a chunk a step, each of which stays.

use super::sessions::{Open, Progress, busy};
use super::{Step, Ticket, World};
use crate::ApiError;
use crate::request::SessionName;
use axum::http::StatusCode;
use landmark_inference::Reader;
use serde_json::Value;
use std::rc::Rc;
use std::time::Instant;
use tokio::sync::oneshot;

/// What is to be appended.
pub struct Append {
    /// To which session.
    pub session: SessionName,
    /// The text's tokens, at least one.
    pub tokens: Vec<u32>,
    /// Whether another text that was cut short shall stay as it is.
    pub is_new_text: bool,
}

/// An append that is worked on. The reply goes out when the disk has all of it.
pub struct Appending {
    ticket: Ticket,
    append: Append,
    /// Gone when it was used.
    reply: Option<oneshot::Sender<Result<Value, ApiError>>>,
    begun: Option<Begun>,
}

struct Begun {
    open: Rc<Open>,
    reader: Reader,
    /// The session's token that the text begins with.
    from: usize,
    /// The text's tokens that the session has.
    at: usize,
}

impl Appending {
    /// One that was asked for.
    pub fn new(ticket: Ticket, append: Append, reply: oneshot::Sender<Result<Value, ApiError>>) -> Self {
        Self { ticket, append, reply: Some(reply), begun: None }
    }

    /// Who asked.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// What the text is read with, once it is begun.
    pub fn reader(&self) -> Option<&Reader> {
        self.begun.as_ref().map(|begun| &begun.reader)
    }

    /// Whether the client has left.
    pub fn is_abandoned(&self) -> bool {
        self.reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Tells the client that it cannot be worked on any more.
    pub fn fail(&mut self, error: ApiError) {
        self.answer(Err(error));
    }

    fn answer(&mut self, answer: Result<Value, ApiError>) {
        if let Some(reply) = self.reply.take() {
            // Who has left is not told.
            let _ = reply.send(answer);
        }
    }

    /// One step.
    pub fn step(&mut self, world: &mut World) -> Result<Step, ApiError> {
        let Some(begun) = &mut self.begun else {
            self.begun = Some(self.begin(world)?);
            return Ok(Step::GoesOn);
        };
        let since = Instant::now();
        let Begun { open, reader, from, at } = begun;
        let tokens = &self.append.tokens;
        let next = &tokens[*at..tokens.len().min(*at + reader.chunk())];
        let is_last = *at + next.len() == tokens.len();
        if !next.is_empty() {
            world.sessions.check_room(&self.ticket.owner, 0)?;
            reader.read(next, |_| true)?;
        }
        reader.commit(&mut open.session.borrow_mut(), next, Some(*from).filter(|_| !is_last), is_last)?;
        *at += next.len();
        world.metrics.reading.add(since.elapsed());
        world.metrics.read_tokens.add(next.len() as u64);
        open.appending.set(Some(progress(reader, *at, &self.append)).filter(|_| !is_last));
        if !is_last {
            return Ok(Step::GoesOn);
        }
        let shown = world.sessions.show(&self.ticket.owner, &self.append.session);
        self.answer(shown);
        Ok(Step::Ends)
    }

    /// Opens the session, and finds out what of the text it has.
    fn begin(&mut self, world: &mut World) -> Result<Begun, ApiError> {
        let open = world.sessions.open(&self.ticket.owner, &self.append.session)?;
        if open.appending.get().is_some() {
            return Err(busy("another text is being appended to it"));
        }
        let session = open.session.borrow();
        let cut_short = session.append_from().filter(|_| !self.append.is_new_text);
        let from = cut_short.unwrap_or(session.tokens().len());
        if from == 0 {
            self.append.tokens.splice(0..0, world.opened.pretrained.begin.iter().copied());
        }
        let known = &session.tokens()[from..];
        if !self.append.tokens.starts_with(known) {
            let message = format!(
                "the session stopped {} tokens into a text that is not this one: append that one again, and it goes on; or leave it as it is \
                 with new_text",
                known.len()
            );
            return Err(ApiError::new(StatusCode::CONFLICT, "unfinished_append", message));
        }
        let at = known.len();
        let reader = world.reader_of(&open, &session)?;
        drop(session);
        open.appending.set(Some(progress(&reader, at, &self.append)));
        Ok(Begun { open, reader, from, at })
    }

    /// Lets go of the session.
    pub fn close(self, world: &World) {
        if let Some(Begun { open, reader, .. }) = self.begun {
            open.appending.set(None);
            world.count_units(&reader);
        }
    }
}

fn progress(reader: &Reader, read: usize, append: &Append) -> Progress {
    let gpu = reader.pool_bytes();
    Progress { read, of: append.tokens.len(), ram: reader.cache_bytes() - gpu, gpu }
}
