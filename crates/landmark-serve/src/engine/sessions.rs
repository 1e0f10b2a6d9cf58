//! The sessions on disk, by owner and name.

use crate::request::SessionName;
use crate::{ApiError, Owner};
use axum::http::StatusCode;
use landmark_inference::About;
use landmark_memory::BlockType;
use landmark_memory::session::{self, Session, Settings, Status};
use landmark_models::Model;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::rc::{Rc, Weak};

/// A session that some request has open.
pub struct Open {
    /// It.
    pub session: RefCell<Session>,
    /// How it is read.
    pub about: About,
    /// How far a text is that is being appended.
    pub appending: Cell<Option<Progress>>,
}

/// How far a text is on its way into a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Its tokens that were read.
    pub read: usize,
    /// All of its tokens.
    pub of: usize,
    /// Bytes of blocks and landmarks in RAM, while it is read.
    pub ram: usize,
    /// The same on the GPU.
    pub gpu: usize,
}

/// What is done with a session as a whole.
pub enum Call {
    /// Makes one.
    Create(SessionName, BlockType),
    /// Tells of all.
    List,
    /// Tells of one.
    Show(SessionName),
    /// Gives some of its tokens.
    Tokens(SessionName, Range<u64>),
    /// Makes another that goes on from here.
    Fork(SessionName, SessionName),
    /// Removes one.
    Delete(SessionName),
}

/// The sessions of all owners.
pub struct Sessions {
    folder: PathBuf,
    /// Bytes that one may take.
    disk_limit: Option<u64>,
    /// Bytes that all of an owner may take.
    key_limit: Option<u64>,
    about: About,
    open: HashMap<(Owner, SessionName), Weak<Open>>,
}

impl Sessions {
    /// Those in a folder, of one model.
    pub fn new(folder: PathBuf, disk_limit: Option<u64>, key_limit: Option<u64>, about: About) -> Self {
        Self { folder, disk_limit, key_limit, about, open: HashMap::new() }
    }

    /// Opens a session, or gives the one that another request has open.
    pub fn open(&mut self, owner: &Owner, name: &SessionName) -> Result<Rc<Open>, ApiError> {
        if let Some(open) = self.is_open(owner, name) {
            return Ok(open);
        }
        let session = Session::open(&self.existing(owner, name)?).map_err(in_use)?;
        for note in session.notes() {
            eprintln!("landmark serve: session {}/{}: {note}", owner.folder(), name.as_str());
        }
        let about = About::of(session.about())?;
        if !about.is_of_same_model(&self.about) {
            let message = "the session's text was read with another model than this server's";
            return Err(ApiError::new(StatusCode::CONFLICT, "other_model", message));
        }
        let open = Rc::new(Open { session: RefCell::new(session), about, appending: Cell::new(None) });
        self.open.insert((owner.clone(), name.clone()), Rc::downgrade(&open));
        Ok(open)
    }

    /// Sessions that are open.
    pub fn count_open(&mut self) -> usize {
        self.open.retain(|_, open| open.strong_count() > 0);
        self.open.len()
    }

    /// Does what is asked.
    pub fn call(&mut self, owner: &Owner, call: Call, model: &Model) -> Result<Value, ApiError> {
        match call {
            Call::Create(name, block_type) => {
                let path = self.free(owner, &name)?;
                self.check_room(owner, 0)?;
                let settings = Settings { block_type, disk_limit: self.disk_limit, blocks_per_segment: None };
                self.about.create_of(&path, model, settings)?;
                self.show(owner, &name)
            }
            Call::List => self.list(owner),
            Call::Show(name) => self.show(owner, &name),
            Call::Tokens(name, tokens) => {
                let path = self.existing(owner, &name)?;
                let count = session::peek(&path)?.tokens;
                if tokens.end > count {
                    return Err(ApiError::value("end_token", format!("the session has {count} tokens")));
                }
                Ok(session::peek_tokens(&path, tokens)?.into())
            }
            Call::Fork(from, to) => {
                let path = self.free(owner, &to)?;
                let open = self.open(owner, &from)?;
                if open.appending.get().is_some() {
                    return Err(busy("a text is being appended to it"));
                }
                self.check_room(owner, open.session.borrow().status().bytes)?;
                open.session.borrow_mut().fork(&path)?;
                self.show(owner, &to)
            }
            Call::Delete(name) => {
                let path = self.existing(owner, &name)?;
                if self.is_open(owner, &name).is_some() {
                    return Err(busy("a request reads it"));
                }
                session::delete(&path).map_err(in_use)?;
                Ok(json!({ "object": "session.deleted", "name": name.as_str(), "deleted": true }))
            }
        }
    }

    fn is_open(&self, owner: &Owner, name: &SessionName) -> Option<Rc<Open>> {
        self.open.get(&(owner.clone(), name.clone())).and_then(Weak::upgrade)
    }

    /// What a session holds.
    pub fn show(&self, owner: &Owner, name: &SessionName) -> Result<Value, ApiError> {
        let path = self.existing(owner, name)?;
        let appending = self.is_open(owner, name).and_then(|open| open.appending.get());
        Ok(as_json(name.as_str(), &session::peek(&path)?, appending))
    }

    /// Whether an owner's sessions may take so many bytes more.
    pub fn check_room(&self, owner: &Owner, more: u64) -> Result<(), ApiError> {
        let Some(limit) = self.key_limit else { return Ok(()) };
        let names = self.names(owner)?;
        let bytes =
            names.iter().filter_map(|name| session::peek(&self.path(owner, name)).ok()).map(|status| status.bytes);
        if bytes.sum::<u64>().saturating_add(more) <= limit {
            return Ok(());
        }
        let message = format!(
            "the sessions of one key may take {limit} bytes of the disk (--key_disk), and there is no room left"
        );
        Err(ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "no_room", message))
    }

    /// The names of an owner's sessions.
    fn names(&self, owner: &Owner) -> Result<Vec<SessionName>, ApiError> {
        let entries = match std::fs::read_dir(self.folder.join(owner.folder())) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(anyhow::Error::from)?,
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<SessionName> = names.filter_map(|name| SessionName::parse(&name, "name").ok()).collect();
        names.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        Ok(names)
    }

    fn list(&self, owner: &Owner) -> Result<Value, ApiError> {
        let names = self.names(owner)?;
        let sessions = names.iter().filter_map(|name| match self.show(owner, name) {
            Ok(shown) => Some(shown),
            Err(error) if error.status == StatusCode::NOT_FOUND => None,
            Err(_) => Some(json!({ "object": "session", "name": name.as_str(), "error": "it cannot be read" })),
        });
        Ok(json!({ "object": "list", "data": sessions.collect::<Vec<Value>>() }))
    }

    fn path(&self, owner: &Owner, name: &SessionName) -> PathBuf {
        self.folder.join(owner.folder()).join(name.as_str())
    }

    fn existing(&self, owner: &Owner, name: &SessionName) -> Result<PathBuf, ApiError> {
        let path = self.path(owner, name);
        if path.join("session.json").exists() {
            return Ok(path);
        }
        Err(ApiError::new(StatusCode::NOT_FOUND, "session_not_found", "there is no session of this name"))
    }

    fn free(&self, owner: &Owner, name: &SessionName) -> Result<PathBuf, ApiError> {
        let path = self.path(owner, name);
        match path.symlink_metadata() {
            Ok(_) => Err(ApiError::new(StatusCode::CONFLICT, "session_exists", "there is a session of this name")),
            Err(_) => Ok(path),
        }
    }
}

/// A session that is in use.
pub fn busy(why: &str) -> ApiError {
    ApiError::new(StatusCode::CONFLICT, "session_busy", format!("the session is in use: {why}"))
}

/// Another process may have a session.
fn in_use(error: landmark_memory::Error) -> ApiError {
    match error {
        landmark_memory::Error::Session { .. } => busy("another process has it"),
        error => error.into(),
    }
}

fn as_json(name: &str, status: &Status, appending: Option<Progress>) -> Value {
    let appending = appending.map(|Progress { read, of, ram, gpu }| {
        json!({ "read_tokens": read, "tokens": of, "ram_bytes": ram, "gpu_bytes": gpu })
    });
    json!({
        "object": "session", "name": name, "tokens": status.tokens, "blocks": status.blocks, "bytes": status.bytes,
        "block_dtype": status.block_type, "changed": status.changed, "unfinished_append": status.append_from.is_some(),
        "appending": appending,
    })
}
