//! Replies in the shape of OpenAI's: whole, or in the chunks of a stream.

use crate::engine::{BlockShown, Event, Usage};
use crate::logprobs::TokenLogprob;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Which route asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
}

/// A reply on its way.
pub struct Reply {
    /// Which route asks.
    pub kind: Kind,
    /// What the client may call it.
    pub id: String,
    /// When it was begun, in seconds since 1970.
    pub created: u64,
    /// What clients call the model.
    pub model: String,
    /// Whether the likeliest tokens are told beside each.
    pub has_top: bool,
    /// Whether each chunk of the stream has a place for what was used.
    pub tells_usage: bool,
    /// Choices whose first chunk is out.
    begun: BTreeSet<usize>,
}

/// A choice that is put together.
#[derive(Default)]
struct Choice {
    text: String,
    logprobs: Option<Vec<TokenLogprob>>,
    reason: &'static str,
}

impl Reply {
    /// One that is begun.
    pub fn new(kind: Kind, id: String, created: u64, model: String, has_top: bool, tells_usage: bool) -> Self {
        Self { kind, id, created, model, has_top, tells_usage, begun: BTreeSet::new() }
    }

    /// The whole reply, of all events of a request that came to its end; `has_logprobs` says whether they are asked for.
    pub fn whole(&self, events: impl IntoIterator<Item = Event>, has_logprobs: bool) -> Value {
        let (mut choices, mut shown, mut used) = (Vec::<Choice>::new(), None, Usage::default());
        let logprobs_of_none = || has_logprobs.then(Vec::new);
        for event in events {
            match event {
                Event::Text { choice, text, logprobs } => {
                    grow(&mut choices, choice, logprobs_of_none);
                    choices[choice].text += &text;
                    if let Some(all) = &mut choices[choice].logprobs {
                        all.extend(logprobs);
                    }
                }
                Event::Finished { choice, reason, blocks } => {
                    grow(&mut choices, choice, logprobs_of_none);
                    choices[choice].reason = reason;
                    shown = blocks.or(shown);
                }
                Event::Done(usage) => used = usage,
                Event::Started | Event::Failed(_) => {}
            }
        }
        let choice = |(index, choice): (usize, Choice)| match self.kind {
            Kind::Completion => json!({
                "index": index, "text": choice.text, "finish_reason": choice.reason,
                "logprobs": choice.logprobs.map(|logprobs| self.logprobs(&logprobs)),
            }),
            Kind::Chat => json!({
                "index": index, "message": { "role": "assistant", "content": choice.text, "refusal": null },
                "finish_reason": choice.reason, "logprobs": choice.logprobs.map(|logprobs| chat_logprobs(&logprobs)),
            }),
        };
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion",
        };
        let mut reply = self.object(object, choices.into_iter().enumerate().map(choice).collect());
        reply.insert("usage".into(), usage(used));
        if let Some(blocks) = shown {
            reply.insert("landmark".into(), landmark(&blocks));
        }
        reply.into()
    }

    /// What an event adds to a stream.
    pub fn chunks(&mut self, event: Event) -> Vec<Value> {
        match event {
            Event::Started | Event::Failed(_) => Vec::new(),
            Event::Text { choice, text, logprobs } => {
                let mut chunks = self.begin(choice);
                chunks.push(match self.kind {
                    Kind::Completion => {
                        let logprobs = if logprobs.is_empty() { Value::Null } else { self.logprobs(&logprobs) };
                        self.chunk(
                            json!({ "index": choice, "text": text, "logprobs": logprobs, "finish_reason": null }),
                        )
                    }
                    Kind::Chat => {
                        let delta = json!({ "content": text });
                        let logprobs = if logprobs.is_empty() { Value::Null } else { chat_logprobs(&logprobs) };
                        self.chunk(
                            json!({ "index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": null }),
                        )
                    }
                });
                chunks
            }
            Event::Finished { choice, reason, blocks } => {
                let mut chunks = self.begin(choice);
                let mut last =
                    match self.kind {
                        Kind::Completion => self
                            .chunk(json!({ "index": choice, "text": "", "logprobs": null, "finish_reason": reason })),
                        Kind::Chat => self
                            .chunk(json!({ "index": choice, "delta": {}, "logprobs": null, "finish_reason": reason })),
                    };
                if let Some(blocks) = blocks {
                    last["landmark"] = landmark(&blocks);
                }
                chunks.push(last);
                chunks
            }
            Event::Done(_) if !self.tells_usage => Vec::new(),
            Event::Done(used) => {
                let mut last = self.object(self.chunk_object(), Vec::new());
                last.insert("usage".into(), usage(used));
                vec![last.into()]
            }
        }
    }

    /// A chat's choice begins with who speaks.
    fn begin(&mut self, choice: usize) -> Vec<Value> {
        if !self.begun.insert(choice) || self.kind == Kind::Completion {
            return Vec::new();
        }
        let delta = json!({ "role": "assistant", "content": "" });
        vec![self.chunk(json!({ "index": choice, "delta": delta, "logprobs": null, "finish_reason": null }))]
    }

    fn chunk(&self, choice: Value) -> Value {
        let mut chunk = self.object(self.chunk_object(), vec![choice]);
        if self.tells_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        chunk.into()
    }

    fn chunk_object(&self) -> &'static str {
        match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        }
    }

    fn object(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("id".into(), self.id.clone().into());
        map.insert("object".into(), object.into());
        map.insert("created".into(), self.created.into());
        map.insert("model".into(), self.model.clone().into());
        map.insert("choices".into(), choices.into());
        map
    }

    fn logprobs(&self, tokens: &[TokenLogprob]) -> Value {
        let top = |token: &TokenLogprob| {
            let mut likeliest = Map::new();
            for (text, logprob) in token.top.as_ref()? {
                // Two tokens may have the same text: the likelier comes first.
                likeliest.entry(text.clone()).or_insert_with(|| json!(logprob));
            }
            Some(Value::Object(likeliest))
        };
        json!({
            "tokens": tokens.iter().map(|token| &token.token).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
            "top_logprobs": self.has_top.then(|| tokens.iter().map(top).collect::<Vec<_>>()),
            "text_offset": tokens.iter().map(|token| token.offset).collect::<Vec<_>>(),
        })
    }
}

/// As conversations have them.
fn chat_logprobs(tokens: &[TokenLogprob]) -> Value {
    let token =
        |text: &str, logprob: Option<f64>| json!({ "token": text, "logprob": logprob, "bytes": text.as_bytes() });
    let with_top = |told: &TokenLogprob| {
        let mut value = token(&told.token, told.logprob);
        let top = told.top.iter().flatten().map(|(text, logprob)| token(text, Some(*logprob)));
        value["top_logprobs"] = top.collect();
        value
    };
    json!({ "content": tokens.iter().map(with_top).collect::<Vec<_>>(), "refusal": null })
}

fn grow(choices: &mut Vec<Choice>, choice: usize, logprobs: impl Fn() -> Option<Vec<TokenLogprob>>) {
    while choices.len() <= choice {
        choices.push(Choice { logprobs: logprobs(), ..Choice::default() });
    }
}

fn usage(Usage { prompt, cached, completion }: Usage) -> Value {
    json!({
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": { "cached_tokens": cached },
    })
}

/// The field that is ours: what was read.
fn landmark(blocks: &[BlockShown]) -> Value {
    let block = |shown: &BlockShown| {
        json!({
            "block": shown.block, "weight": shown.weight, "weight_by_layers": shown.by_layers, "first_token": shown.tokens.start, "last_token": shown.tokens.end - 1,
            "text_offset": shown.text_offset, "text": shown.text,
        })
    };
    json!({ "blocks": blocks.iter().map(block).collect::<Vec<_>>() })
}
