//! The thread that has the model. Requests come to it through a channel and wait for their turn; those that are worked on take steps in turn: a
//! chunk that is read, or a token that is written. The tokens of all that are written are read in one pass of the model.

mod append;
mod generation;
mod kept;
mod sessions;

use crate::metrics::Metrics;
use crate::request::{Wanted, Written};
use crate::{ApiError, Error, Limits, Owner, Settings};
pub use append::Append;
use append::Appending;
use axum::http::StatusCode;
use generation::Generation;
pub use generation::{BlockShown, Event, Usage};
use kept::KeptTexts;
use landmark_data::{Pretrained, Tokenizer};
use landmark_inference::{About, CacheFlags, Opened, Reader, Room};
use landmark_memory::Scoring;
use landmark_memory::session::Session;
use serde_json::Value;
pub use sessions::Call;
use sessions::{Open, Sessions};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// What the thread is told.
pub enum Command {
    /// To write.
    Generate {
        /// Who asks.
        ticket: Ticket,
        /// What is asked for.
        wanted: Wanted,
        /// After these prompts.
        prompts: Vec<Written>,
        /// Where the text goes. Its other end is dropped when the client leaves.
        events: UnboundedSender<Event>,
    },
    /// To append to a session.
    Append {
        /// Who asks.
        ticket: Ticket,
        /// What is asked for.
        append: Append,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Value, ApiError>>,
    },
    /// To do something with a session as a whole.
    Session {
        /// Whose it is.
        owner: Owner,
        /// What.
        call: Call,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Value, ApiError>>,
    },
    /// To end.
    End,
}

/// A request's place among the others.
pub struct Ticket {
    /// Who asks.
    pub owner: Owner,
    /// When it came.
    pub arrived: Instant,
    /// Held as long as the request is here.
    pub _slot: OwnedSemaphorePermit,
}

/// What the rest of the server has to know of the model.
pub struct Served {
    /// Its tokenizer and its conventions.
    pub pretrained: Pretrained,
    /// Tells the thread what to do.
    pub commands: Sender<Command>,
    /// Ends when the thread does.
    pub ended: oneshot::Receiver<()>,
    /// The thread.
    pub thread: std::thread::JoinHandle<()>,
}

/// Starts the thread and opens the model in it.
///
/// # Errors
/// A model that cannot be opened, or that is not read through the landmark cache with all its blocks.
pub fn start(settings: &Settings, metrics: Arc<Metrics>) -> Result<Served, Error> {
    let (commands, receiver) = channel();
    let (opened, is_open) = channel();
    let (ending, ended) = oneshot::channel();
    let Settings { model, cache, sessions, room, limits, .. } = settings;
    let (model, flags, folder) = (model.clone(), cache.clone(), sessions.clone());
    let (room, limits) = (*room, *limits);
    let work = move || {
        // Dropped, and so noticed, however the thread ends.
        let _ending: oneshot::Sender<()> = ending;
        // Where it is opened it computes.
        let found = Opened::open(&model).and_then(|opened| Ok((About::new(&opened, &flags, false)?, opened)));
        let (about, model) = match found {
            Ok(found) => found,
            Err(error) => return drop(opened.send(Err(error))),
        };
        let tokenizer = model.pretrained.tokenizer.clone();
        let told = opened.send(Ok(model.pretrained.clone()));
        if told.is_err() {
            return;
        }
        let world = World {
            opened: model,
            tokenizer: &tokenizer,
            flags,
            kept: KeptTexts::new(limits.kept),
            sessions: Sessions::new(folder, limits.session_disk, limits.key_disk, about),
            room,
            metrics,
        };
        Engine { world, limits, active: Vec::new(), waiting: VecDeque::new() }.run(&receiver);
    };
    let thread = std::thread::Builder::new().name("model".into()).spawn(work).map_err(Error::Start)?;
    let pretrained = is_open.recv().map_err(|_| Error::ModelThread)?.map_err(Error::Model)?;
    Ok(Served { pretrained, commands, ended, thread })
}

/// What requests are worked on with.
pub struct World<'m> {
    opened: Opened,
    tokenizer: &'m Tokenizer,
    flags: CacheFlags,
    kept: KeptTexts,
    sessions: Sessions,
    room: Room,
    metrics: Arc<Metrics>,
}

impl World<'_> {
    /// A reader of a session that is open, as the session is read.
    fn reader_of(&self, open: &Open, session: &Session) -> Result<Reader, ApiError> {
        let (model, pretrained) = (self.opened.model.clone(), &self.opened.pretrained);
        let scoring = if open.about.exact { Scoring::Exact } else { Scoring::Index };
        Ok(Reader::of_session(session, &open.about, model, pretrained, self.room, scoring)?)
    }

    /// Counts the units that a session's reader loaded and found.
    fn count_units(&self, reader: &Reader) {
        let (loaded, found) = reader.loads();
        self.metrics.units_loaded.add(loaded);
        self.metrics.units_found.add(found);
    }
}

/// Whether a request goes on after a step.
pub enum Step {
    /// It does.
    GoesOn,
    /// It has its answer.
    Ends,
}

/// A request.
enum Task<'m> {
    Generation(Box<Generation<'m>>),
    Append(Box<Appending>),
}

impl<'m> Task<'m> {
    fn ticket(&self) -> &Ticket {
        match self {
            Self::Generation(generation) => generation.ticket(),
            Self::Append(append) => append.ticket(),
        }
    }

    fn is_abandoned(&self) -> bool {
        match self {
            Self::Generation(generation) => generation.is_abandoned(),
            Self::Append(append) => append.is_abandoned(),
        }
    }

    fn step(&mut self, world: &mut World<'m>) -> Result<Step, ApiError> {
        match self {
            Self::Generation(generation) => generation.step(world),
            Self::Append(append) => append.step(world),
        }
    }

    /// What it reads with, once it is begun.
    fn reader(&self) -> Option<&Reader> {
        match self {
            Self::Generation(generation) => generation.reader(),
            Self::Append(append) => append.reader(),
        }
    }

    fn generation(&mut self) -> Option<&mut Generation<'m>> {
        match self {
            Self::Generation(generation) => Some(generation),
            Self::Append(_) => None,
        }
    }

    fn fail(&mut self, error: ApiError) {
        match self {
            Self::Generation(generation) => generation.fail(error),
            Self::Append(append) => append.fail(error),
        }
    }

    fn close(self, world: &mut World<'m>) {
        match self {
            Self::Generation(generation) => generation.close(world),
            Self::Append(append) => append.close(world),
        }
    }
}

/// A request and what came of its step.
type Turn<'m> = (Task<'m>, Result<Step, ApiError>);

struct Engine<'m> {
    world: World<'m>,
    limits: Limits,
    active: Vec<Task<'m>>,
    waiting: VecDeque<Task<'m>>,
}

impl<'m> Engine<'m> {
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let is_idle = self.active.is_empty() && self.waiting.is_empty();
            let mut next = if is_idle { commands.recv().ok() } else { commands.try_recv().ok() };
            if is_idle && next.is_none() {
                return;
            }
            while let Some(command) = next {
                if matches!(command, Command::End) {
                    return self.end();
                }
                self.take(command);
                next = commands.try_recv().ok();
            }
            self.drop_waiting();
            self.admit();
            self.take_turns();
            self.measure();
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Generate { ticket, wanted, prompts, events } => {
                let generation = Generation::new(ticket, wanted, prompts, events);
                self.waiting.push_back(Task::Generation(Box::new(generation)));
            }
            Command::Append { ticket, append, reply } => {
                self.waiting.push_back(Task::Append(Box::new(Appending::new(ticket, append, reply))));
            }
            Command::Session { owner, call, reply } => {
                // Who has left is not told.
                let _ = reply.send(self.world.sessions.call(&owner, call, &self.world.opened.model));
            }
            Command::End => {}
        }
    }

    /// Requests that nobody waits for any more, or that waited for too long.
    fn drop_waiting(&mut self) {
        let (limits, metrics) = (self.limits, &self.world.metrics);
        self.waiting.retain_mut(|task| {
            if task.is_abandoned() {
                metrics.cancelled.add(1);
                return false;
            }
            let is_late = task.ticket().arrived.elapsed() > limits.time;
            if is_late {
                task.fail(timed_out(&limits));
            }
            !is_late
        });
    }

    /// The next of those who have the fewest that are worked on, in the order of their coming.
    fn admit(&mut self) {
        while self.active.len() < self.limits.parallel {
            let busy =
                |task: &Task| self.active.iter().filter(|other| other.ticket().owner == task.ticket().owner).count();
            let next = (0..self.waiting.len()).min_by_key(|&place| busy(&self.waiting[place]));
            match next.and_then(|place| self.waiting.remove(place)) {
                Some(task) => self.active.push(task),
                None => return,
            }
        }
    }

    /// A step of each that is worked on.
    fn take_turns(&mut self) {
        let mut turns = Vec::with_capacity(self.active.len());
        for mut task in std::mem::take(&mut self.active) {
            if task.is_abandoned() {
                self.world.metrics.cancelled.add(1);
                task.close(&mut self.world);
                continue;
            }
            if task.ticket().arrived.elapsed() > self.limits.time {
                task.fail(timed_out(&self.limits));
                task.close(&mut self.world);
                continue;
            }
            let step = task.step(&mut self.world);
            turns.push((task, step));
        }
        self.read_drawn(&mut turns);
        for (mut task, step) in turns {
            match step {
                Ok(Step::GoesOn) => self.active.push(task),
                Ok(Step::Ends) => task.close(&mut self.world),
                Err(error) => {
                    task.fail(error);
                    task.close(&mut self.world);
                }
            }
        }
    }

    /// Reads the tokens that were drawn, those of all texts in one pass of the model.
    fn read_drawn(&mut self, turns: &mut [Turn<'m>]) {
        let begun = Instant::now();
        let mut texts: Vec<_> = turns.iter_mut().filter_map(|(task, _)| task.generation()?.drawn()).collect();
        if texts.is_empty() {
            return;
        }
        let logits = Reader::read_together(&mut texts).map_err(ApiError::from);
        self.world.metrics.writing.add(begun.elapsed());
        let mut logits = logits.map(Vec::into_iter);
        for (task, step) in turns {
            let Some(generation) = task.generation() else { continue };
            if generation.drawn().is_none() {
                continue;
            }
            *step = match &mut logits {
                Ok(logits) => generation.tell(&mut self.world, logits.next().unwrap_or_default()),
                Err(error) => Err(error.clone()),
            };
        }
    }

    fn measure(&mut self) {
        let World { metrics, kept, sessions, .. } = &mut self.world;
        metrics.waiting.set(self.waiting.len());
        metrics.active.set(self.active.len());
        metrics.kept_prompts.set(kept.len());
        metrics.kept_bytes.set(kept.used() as usize);
        metrics.open_sessions.set(sessions.count_open());
        let (bytes, pool_bytes) =
            self.active.iter().filter_map(Task::reader).fold((0, 0), |(bytes, pool_bytes), reader| {
                (bytes + reader.cache_bytes(), pool_bytes + reader.pool_bytes())
            });
        metrics.active_bytes.set(bytes - pool_bytes);
        metrics.active_gpu_bytes.set(pool_bytes);
    }

    /// Nothing is worked on any more. What was appended stays as far as it came.
    fn end(mut self) {
        for mut task in self.active.drain(..).chain(self.waiting.drain(..)) {
            task.fail(ApiError::ending());
        }
    }
}

fn timed_out(limits: &Limits) -> ApiError {
    let message = format!("the request took longer than the {} seconds that this server allows", limits.time.as_secs());
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
}
