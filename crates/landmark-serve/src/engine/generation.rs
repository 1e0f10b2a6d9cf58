//! A request for text, worked on step by step: a chunk that is read, or a token that is drawn, and read with those of the others.

use super::kept::Text;
use super::sessions::Open;
use super::{Step, Ticket, World};
use crate::ApiError;
use crate::logprobs::{TokenLogprob, logprob};
use crate::request::{Wanted, Written};
use crate::stop::Stops;
use axum::http::StatusCode;
use landmark_data::Decoder;
use landmark_inference::{Mark, Reader, Sampler, SamplingFlags};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;
use tokio::sync::mpsc::UnboundedSender;

/// What happens to a request for text.
#[derive(Clone, Debug)]
pub enum Event {
    /// It is worked on: what could be refused was not.
    Started,
    /// More of a choice's text.
    Text {
        /// The choice.
        choice: usize,
        /// What follows.
        text: String,
        /// The tokens that were drawn (or echoed) for it, if they are asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// The end of a choice.
    Finished {
        /// The choice.
        choice: usize,
        /// `stop` or `length`.
        reason: &'static str,
        /// The blocks that were read most, if they are asked for.
        blocks: Option<Vec<BlockShown>>,
    },
    /// The end.
    Done(Usage),
    /// It cannot be worked on.
    Failed(ApiError),
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Of its prompts and the session's text.
    pub prompt: usize,
    /// Of these, those that had been read before.
    pub cached: usize,
    /// That were written.
    pub completion: usize,
}

/// A block that was read.
#[derive(Clone, Debug)]
pub struct BlockShown {
    /// The block, counted from the beginning of the text.
    pub block: usize,
    /// Its tokens.
    pub tokens: Range<usize>,
    /// Its share of a token's attention.
    pub weight: f64,
    /// The same of the first, the middle and the last third of the layers.
    pub by_layers: [f64; 3],
    /// Where its text begins, in characters.
    pub text_offset: usize,
    /// Its text.
    pub text: String,
}

/// A request for text.
pub struct Generation<'m> {
    ticket: Ticket,
    wanted: Wanted,
    prompts: Vec<Written>,
    events: UnboundedSender<Event>,
    /// The prompt that is worked on, and the choice of it.
    prompt: usize,
    choice: usize,
    usage: Usage,
    state: State<'m>,
}

enum State<'m> {
    /// The prompt is not begun.
    New,
    /// It is read.
    Reading(Box<Reading>),
    /// A choice is written.
    Writing(Box<Reading>, Box<Writing<'m>>),
}

/// A prompt on its way into the model.
struct Reading {
    text: Text,
    /// Tokens that were read, and the first token of the prompt itself.
    at: usize,
    prompt_from: usize,
    /// The session that it is read into, which stays as it is.
    session: Option<Rc<Open>>,
    /// Of the prompt's tokens, if they are asked for.
    logprobs: Vec<(f64, Vec<(u32, f64)>)>,
    first_has_logprob: bool,
    /// The end of the prompt.
    end: Option<Mark>,
}

impl Reading {
    fn new(text: Text, at: usize, prompt_from: usize, session: Option<Rc<Open>>) -> Self {
        Self { text, at, prompt_from, session, logprobs: Vec::new(), first_has_logprob: prompt_from > 0, end: None }
    }
}

/// A choice.
struct Writing<'m> {
    sampler: Sampler,
    decoder: Decoder<'m>,
    stops: Stops,
    /// Tokens that were drawn.
    drawn: Vec<u32>,
    /// Characters of the choice's text before the next token.
    characters: usize,
    /// What was drawn and is not told yet.
    pending: Vec<TokenLogprob>,
    /// What the next token is drawn by, if it came with the token before.
    logits: Option<Vec<f32>>,
    /// What was drawn and is not read yet.
    next: Option<u32>,
    last_at: Instant,
}

impl<'m> Generation<'m> {
    /// One that was asked for.
    pub fn new(ticket: Ticket, wanted: Wanted, prompts: Vec<Written>, events: UnboundedSender<Event>) -> Self {
        Self { ticket, wanted, prompts, events, prompt: 0, choice: 0, usage: Usage::default(), state: State::New }
    }

    /// Who asked.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// Whether the client has left.
    pub fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Tells the client that it cannot be worked on any more.
    pub fn fail(&self, error: ApiError) {
        // Who has left is not told.
        let _ = self.events.send(Event::Failed(error));
    }

    /// One step.
    pub fn step(&mut self, world: &mut World<'m>) -> Result<Step, ApiError> {
        match std::mem::replace(&mut self.state, State::New) {
            State::New => {
                let reading = Box::new(self.open(world)?);
                if self.prompt == 0 && self.choice == 0 {
                    self.send(Event::Started);
                }
                self.read_or_write(world, reading)
            }
            State::Reading(mut reading) => {
                self.read_chunk(world, &mut reading)?;
                self.read_or_write(world, reading)
            }
            State::Writing(reading, writing) => self.draw(world, reading, writing),
        }
    }

    /// Gives back what can be gone on with.
    pub fn close(self, world: &mut World<'m>) {
        match self.state {
            State::New => {}
            State::Reading(reading) => leave(world, &self.ticket, *reading),
            State::Writing(reading, _) => leave(world, &self.ticket, *reading),
        }
    }

    fn send(&self, event: Event) {
        // Whether the client is still there is asked before each step.
        let _ = self.events.send(event);
    }

    /// Begins the prompt: after the session's text, or after what is kept of it.
    fn open(&mut self, world: &mut World<'m>) -> Result<Reading, ApiError> {
        let Written { tokens, begins } = &self.prompts[self.prompt];
        let begin = if *begins { world.opened.pretrained.begin.clone() } else { Vec::new() };
        let is_first = self.choice == 0;
        let reading = if let Some(name) = &self.wanted.session {
            let open = world.sessions.open(&self.ticket.owner, name)?;
            let (reader, before) = {
                let session = open.session.borrow();
                (world.reader_of(&open, &session)?, session.tokens().to_vec())
            };
            let prompt_from = before.len();
            let begin = if before.is_empty() { begin } else { Vec::new() };
            let text = Text { reader, tokens: [before, begin, tokens.clone()].concat(), marks: Vec::new() };
            Reading::new(text, prompt_from, prompt_from, Some(open))
        } else {
            let tokens = [begin, tokens.clone()].concat();
            // Probabilities of a prompt are there when it is read, and not later.
            let may_go_on = is_first && !(self.wanted.echo && self.wanted.logprobs.is_some());
            let kept = if may_go_on { world.kept.take(&self.ticket.owner, &tokens)? } else { None };
            let mut text = match kept {
                Some(kept) => Text { tokens, ..kept },
                None => {
                    let (model, pretrained) = (world.opened.model.clone(), &world.opened.pretrained);
                    Text { reader: Reader::of_pretrained(model, pretrained, &world.flags)?, tokens, marks: Vec::new() }
                }
            };
            if text.tokens.is_empty() {
                // As a new document begins.
                let end = world.tokenizer.end_of_text();
                text.tokens.push(end.ok_or_else(|| ApiError::value("prompt", "it is empty"))?);
            }
            let length = text.tokens.len();
            text.reader.reserve(length).map_err(|error| {
                eprintln!("landmark serve: a prompt is refused: {error:#}");
                let message = format!("prompt: there is not enough memory for the blocks of its {length} tokens");
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "prompt_too_long", message)
            })?;
            let at = text.marks.last().map_or(0, |(read, _)| *read);
            Reading::new(text, at, 0, None)
        };
        if reading.text.tokens.is_empty() {
            return Err(ApiError::value("prompt", "it is empty, and so is the session"));
        }
        if is_first {
            self.usage.prompt += reading.text.tokens.len();
            self.usage.cached += reading.at;
            world.metrics.cached_tokens.add(reading.at as u64);
        }
        Ok(reading)
    }

    /// Goes on with the prompt, or begins a choice if it is read.
    fn read_or_write(&mut self, world: &mut World<'m>, mut reading: Box<Reading>) -> Result<Step, ApiError> {
        if reading.at < reading.text.tokens.len() {
            self.state = State::Reading(reading);
            return Ok(Step::GoesOn);
        }
        if self.choice == 0 && self.wanted.choices > 1 {
            reading.end = reading.text.reader.mark()?;
        }
        let writing = self.begin_choice(world, &mut reading)?;
        self.state = State::Writing(reading, Box::new(writing));
        Ok(Step::GoesOn)
    }

    fn read_chunk(&mut self, world: &mut World<'m>, reading: &mut Reading) -> Result<(), ApiError> {
        let begun = Instant::now();
        let Reading { text: Text { reader, tokens, marks }, at, session, logprobs, .. } = reading;
        let chunk = reader.chunk();
        let next = &tokens[*at..tokens.len().min(*at + chunk)];
        match self.wanted.logprobs.filter(|_| self.wanted.echo) {
            Some(most) => {
                let allowed = reader.drawable();
                for (row, &token) in reader.read_with_logits(next)?.iter().zip(next) {
                    if let Some(logits) = row {
                        logprobs.push(logprob(logits, token, most, &allowed));
                    }
                }
            }
            None => reader.read(next, |_| true)?,
        }
        *at += next.len();
        world.metrics.reading.add(begun.elapsed());
        world.metrics.read_tokens.add(next.len() as u64);
        if session.is_none() && world.kept.is_on() && at.is_multiple_of(chunk) {
            marks.extend(reader.mark()?.map(|mark| (*at, mark)));
        }
        Ok(())
    }

    fn begin_choice(&mut self, world: &World<'m>, reading: &mut Reading) -> Result<Writing<'m>, ApiError> {
        let SamplingFlags { seed, .. } = self.wanted.sampling;
        let sampling = SamplingFlags { seed: seed.wrapping_add(self.choice as u64), ..self.wanted.sampling.clone() };
        let mut writing = Writing {
            sampler: Sampler::new(&sampling, reading.text.reader.sampling())?,
            decoder: world.tokenizer.decoder(),
            stops: Stops::new(&self.wanted.stop),
            drawn: Vec::new(),
            characters: 0,
            pending: Vec::new(),
            logits: None,
            next: None,
            last_at: Instant::now(),
        };
        if self.wanted.show_blocks.is_some() {
            reading.text.reader.trace_reads();
        }
        if self.wanted.echo {
            self.echo(world, reading, &mut writing)?;
        }
        Ok(writing)
    }

    /// The prompt, as the beginning of the choice's text.
    fn echo(&self, world: &World<'m>, reading: &Reading, writing: &mut Writing<'m>) -> Result<(), ApiError> {
        let (mut text, mut logprobs) = (String::new(), Vec::new());
        let mut known = reading.logprobs.iter();
        for (place, &token) in reading.text.tokens[reading.prompt_from..].iter().enumerate() {
            if self.wanted.logprobs.is_some() {
                let known = if place == 0 && !reading.first_has_logprob { None } else { known.next() };
                logprobs.push(TokenLogprob::new(world.tokenizer, token, known.cloned(), writing.characters)?);
            }
            let piece = writing.decoder.push(token).map_err(anyhow::Error::from)?;
            writing.characters += piece.chars().count();
            text += &piece;
        }
        self.send(Event::Text { choice: self.index(), text, logprobs });
        Ok(())
    }

    /// The choice among those of all prompts.
    fn index(&self) -> usize {
        self.prompt * self.wanted.choices + self.choice
    }

    /// Draws the next token, which is to be read then, or ends the choice.
    fn draw(
        &mut self,
        world: &mut World<'m>,
        reading: Box<Reading>,
        mut writing: Box<Writing<'m>>,
    ) -> Result<Step, ApiError> {
        if writing.drawn.len() == self.wanted.max_tokens {
            return self.end_choice(world, reading, *writing, "length", false);
        }
        let reader = &reading.text.reader;
        let logits = match writing.logits.take() {
            Some(logits) => logits,
            None => reader.logits()?,
        };
        let token = writing.sampler.sample(&logits, reader.drawable())?;
        if reader.is_end(token) {
            return self.end_choice(world, reading, *writing, "stop", false);
        }
        if let Some(most) = self.wanted.logprobs {
            let known = logprob(&logits, token, most, reader.drawable());
            let told = TokenLogprob::new(world.tokenizer, token, Some(known), writing.characters)?;
            writing.pending.push(told);
        }
        writing.next = Some(token);
        self.state = State::Writing(reading, writing);
        Ok(Step::GoesOn)
    }

    /// What the prompt is read with, once it is begun.
    pub fn reader(&self) -> Option<&Reader> {
        match &self.state {
            State::New => None,
            State::Reading(reading) | State::Writing(reading, _) => Some(&reading.text.reader),
        }
    }

    /// The text, and the token that was drawn and is to be read.
    pub fn drawn(&mut self) -> Option<(&mut Reader, u32)> {
        let State::Writing(reading, writing) = &mut self.state else { return None };
        Some((&mut reading.text.reader, writing.next?))
    }

    /// Tells the client of what [`Self::drawn`] gave, which now is read; the next token is drawn by `logits`.
    pub fn tell(&mut self, world: &mut World<'m>, logits: Vec<f32>) -> Result<Step, ApiError> {
        let State::Writing(reading, mut writing) = std::mem::replace(&mut self.state, State::New) else {
            unreachable!("who has drawn is writing");
        };
        let token = writing.next.take().expect("a token that was drawn");
        writing.logits = Some(logits);
        if writing.drawn.is_empty() && self.usage.completion == 0 {
            world.metrics.first_token.add(self.ticket.arrived.elapsed());
        } else if !writing.drawn.is_empty() {
            world.metrics.between_tokens.add(writing.last_at.elapsed());
        }
        writing.last_at = Instant::now();
        writing.drawn.push(token);
        self.usage.completion += 1;
        world.metrics.written_tokens.add(1);
        let piece = writing.decoder.push(token).map_err(anyhow::Error::from)?;
        writing.characters += piece.chars().count();
        let (text, stopped) = writing.stops.push(&piece);
        if !text.is_empty() {
            let logprobs = std::mem::take(&mut writing.pending);
            self.send(Event::Text { choice: self.index(), text, logprobs });
        }
        if stopped {
            return self.end_choice(world, reading, *writing, "stop", true);
        }
        self.state = State::Writing(reading, writing);
        Ok(Step::GoesOn)
    }

    /// Ends a choice, and goes on with the next one, or the next prompt. `stopped`: by a stop string, after which nothing is shown.
    fn end_choice(
        &mut self,
        world: &mut World<'m>,
        mut reading: Box<Reading>,
        writing: Writing<'m>,
        reason: &'static str,
        stopped: bool,
    ) -> Result<Step, ApiError> {
        let Writing { decoder, mut stops, drawn, pending, .. } = writing;
        let rest = decoder.finish().map_err(anyhow::Error::from)?;
        let mut reason = reason;
        if !stopped {
            let (mut text, ends) = stops.push(&rest);
            if ends {
                reason = "stop";
            } else {
                text += &stops.finish();
            }
            if !text.is_empty() || !pending.is_empty() {
                self.send(Event::Text { choice: self.index(), text, logprobs: pending });
            }
        } else if !pending.is_empty() {
            self.send(Event::Text { choice: self.index(), text: String::new(), logprobs: pending });
        }
        let blocks = match self.wanted.show_blocks {
            Some(count) => Some(most_read(world, &reading, &drawn, count)?),
            None => None,
        };
        self.send(Event::Finished { choice: self.index(), reason, blocks });
        self.choice += 1;
        if self.choice < self.wanted.choices {
            // From the end of the prompt, or, where there is no way back, from the beginning.
            if let Some(end) = &reading.end {
                reading.text.reader.rewind(end)?;
                let writing = self.begin_choice(world, &mut reading)?;
                self.state = State::Writing(reading, Box::new(writing));
            }
            return Ok(Step::GoesOn);
        }
        leave(world, &self.ticket, *reading);
        (self.prompt, self.choice) = (self.prompt + 1, 0);
        if self.prompt < self.prompts.len() {
            return Ok(Step::GoesOn);
        }
        self.send(Event::Done(self.usage));
        Ok(Step::Ends)
    }
}

/// What was read of a prompt is kept, if it can be gone on with.
fn leave(world: &mut World, ticket: &Ticket, reading: Reading) {
    let Reading { text, session, .. } = reading;
    if session.is_some() {
        world.count_units(&text.reader);
    } else if let Err(error) = world.kept.keep(&ticket.owner, text) {
        // The reply is as it is; the prompt is read again if it is asked for again.
        eprintln!("landmark serve: a prompt is not kept: {error:#}");
    }
}

/// The blocks that the choice read most, with their text.
fn most_read(world: &World, reading: &Reading, drawn: &[u32], count: usize) -> Result<Vec<BlockShown>, ApiError> {
    let all = [&reading.text.tokens, drawn].concat();
    let mut reads = reading.text.reader.reads();
    reads.truncate(count);
    // Characters before each block, in one pass over the text.
    let mut starts: Vec<usize> = reads.iter().map(|read| read.tokens.start).collect();
    starts.sort_unstable();
    let (mut decoder, mut characters, mut at) = (world.tokenizer.decoder(), 0, 0);
    let mut offsets = HashMap::with_capacity(starts.len());
    for start in starts {
        for &token in &all[at..start] {
            characters += decoder.push(token).map_err(anyhow::Error::from)?.chars().count();
        }
        at = start;
        offsets.insert(start, characters);
    }
    let shown = |read: landmark_memory::BlockRead| -> Result<BlockShown, ApiError> {
        let text_offset = offsets[&read.tokens.start];
        let text = world.tokenizer.decode(&all[read.tokens.clone()]).map_err(anyhow::Error::from)?;
        Ok(BlockShown {
            block: read.block,
            weight: read.weight,
            by_layers: read.by_layers,
            tokens: read.tokens,
            text_offset,
            text,
        })
    };
    reads.into_iter().map(shown).collect()
}
