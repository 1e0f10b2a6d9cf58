//! What clients ask for: the bodies of `/v1/completions` and `/v1/chat/completions`, checked field by field.

use crate::fields::Fields;
use crate::{ApiError, Limits};
use landmark_data::Tokenizer;
use landmark_inference::{Message, Role, SamplingFlags, Template};
use serde_json::{Value, json};

/// Prompts of a request, and choices of all of them together.
const MOST_CHOICES: usize = 128;
/// Stop strings of a request, and bytes of one.
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;
/// The likeliest tokens that are told beside each.
const MOST_LOGPROBS: usize = 20;
/// Blocks that are told.
const MOST_BLOCKS: usize = 100;
const MOST_TEMPERATURE: f64 = 100.;

/// The name of a session, which is that of its folder.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionName(String);

impl SessionName {
    /// Up to 64 of `A-Z a-z 0-9 . _ -`, the first of them a letter or a digit: no path, and no hidden folder.
    pub fn parse(name: &str, param: &'static str) -> Result<Self, ApiError> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let is_name = name.bytes().all(is_plain) && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if !is_name || name.len() > 64 {
            let expected =
                "expected the name of a session: 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or a digit";
            return Err(ApiError::value(param, expected));
        }
        Ok(Self(name.into()))
    }

    /// As it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What comes before the text that is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Tokens, which are read as they are.
    Tokens(Vec<u32>),
    /// What was said, as the model's chat template writes it.
    Conversation(Vec<Message>),
}

/// The tokens of a prompt.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Whether the model's mark for the beginning comes before them, where they begin a text.
    pub begins: bool,
}

impl Prompt {
    /// The tokens.
    ///
    /// # Errors
    /// A token that no text has; a conversation that spells out the template's own marks, or that the template refuses.
    pub fn write(self, tokenizer: &Tokenizer, template: Option<&Template>) -> Result<Written, ApiError> {
        match self {
            Self::Text(text) => Ok(Written { tokens: encode(tokenizer, &text)?, begins: true }),
            Self::Tokens(tokens) => {
                let vocabulary = tokenizer.vocab_size();
                let is_known = |token: u32| (token as usize) < vocabulary && Some(token) != tokenizer.landmark_id();
                if !tokens.iter().all(|&token| is_known(token)) {
                    let expected = format!(
                        "expected tokens below {vocabulary}, and no landmark: these are put in where they belong"
                    );
                    return Err(ApiError::value("prompt", expected));
                }
                Ok(Written { tokens, begins: false })
            }
            Self::Conversation(messages) => {
                let template = template.ok_or_else(|| {
                    ApiError::new(
                        axum::http::StatusCode::BAD_REQUEST,
                        "no_chat_template",
                        "the model has no chat template, so it was not made for conversations: use /v1/completions",
                    )
                })?;
                for message in &messages {
                    let with_marks = tokenizer.encode_with_special(&message.content).map_err(anyhow::Error::from)?;
                    if encode(tokenizer, &message.content)? != with_marks {
                        return Err(ApiError::value("messages", "a text spells out one of the model's own marks"));
                    }
                }
                let text = template.render(&messages).map_err(|_| {
                    ApiError::value(
                        "messages",
                        "the model's chat template does not take messages in this order, or of these roles",
                    )
                })?;
                let tokens = tokenizer.encode_with_special(&text).map_err(anyhow::Error::from)?;
                Ok(Written { tokens, begins: false })
            }
        }
    }
}

/// The tokens of a text.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, ApiError> {
    Ok(tokenizer.encode(text).map_err(anyhow::Error::from)?)
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Texts for each prompt.
    pub choices: usize,
    /// Tokens of each at most.
    pub max_tokens: usize,
    /// How they are drawn; the seed is that of the first choice, and each other's is the one before plus 1.
    pub sampling: SamplingFlags,
    /// What ends a text.
    pub stop: Vec<String>,
    /// Whether the prompt comes first in the reply.
    pub echo: bool,
    /// The likeliest tokens to tell beside each, if probabilities are asked for.
    pub logprobs: Option<usize>,
    /// The session whose text comes before the prompt.
    pub session: Option<SessionName>,
    /// Blocks to tell that were read most.
    pub show_blocks: Option<usize>,
}

/// How the reply comes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Streaming {
    /// While it is written.
    pub stream: bool,
    /// With a last chunk that tells what was used.
    pub usage: bool,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    /// What comes before.
    pub prompts: Vec<Prompt>,
    /// What is asked for.
    pub wanted: Wanted,
    /// How the reply comes.
    pub streaming: Streaming,
}

impl Request {
    /// Of `/v1/completions`; `seed` is used if the client names none.
    pub fn completion(mut fields: Fields, model: &str, limits: &Limits, seed: u64) -> Result<Self, ApiError> {
        check_model(&mut fields, model)?;
        let prompts = prompts(fields.take("prompt"))?;
        let echo = fields.boolean("echo")?;
        let logprobs = fields.count("logprobs", 0..=MOST_LOGPROBS)?;
        let max_tokens = fields.count("max_tokens", 0..=limits.new_tokens)?.unwrap_or(16.min(limits.new_tokens));
        let (wanted, streaming) = common(&mut fields, limits, seed, prompts.len())?;
        // As many as are given back.
        let best_of = fields.count("best_of", 1..=MOST_CHOICES)?;
        if best_of.is_some_and(|best_of| best_of != wanted.choices) {
            return Err(ApiError::unsupported("best_of"));
        }
        fields.refuse([("suffix", json!(""))])?;
        fields.end(
            "model, prompt, echo, logprobs, max_tokens, n, seed, stop, stream, stream_options, temperature, top_p, top_k, session and \
             show_blocks",
        )?;
        Ok(Self { prompts, wanted: Wanted { max_tokens, echo, logprobs, ..wanted }, streaming })
    }

    /// Of `/v1/chat/completions`.
    pub fn chat(mut fields: Fields, model: &str, limits: &Limits, seed: u64) -> Result<Self, ApiError> {
        check_model(&mut fields, model)?;
        let messages = messages(fields.take("messages"))?;
        let old = fields.count("max_tokens", 0..=limits.new_tokens)?;
        let new = fields.count("max_completion_tokens", 0..=limits.new_tokens)?;
        let max_tokens = match (old, new) {
            (Some(old), Some(new)) if old != new => {
                return Err(ApiError::value("max_completion_tokens", "max_tokens says something else"));
            }
            (old, new) => new.or(old).unwrap_or(limits.new_tokens),
        };
        let top = fields.count("top_logprobs", 0..=MOST_LOGPROBS)?;
        let logprobs = if fields.boolean("logprobs")? { Some(top.unwrap_or(0)) } else { None };
        if top.is_some_and(|top| top > 0) && logprobs.is_none() {
            return Err(ApiError::value("top_logprobs", "it belongs to logprobs"));
        }
        let (wanted, streaming) = common(&mut fields, limits, seed, 1)?;
        fields.refuse([
            ("audio", Value::Null),
            ("function_call", json!("none")),
            ("functions", json!([])),
            ("metadata", json!({})),
            ("modalities", json!(["text"])),
            ("parallel_tool_calls", json!(true)),
            ("prediction", Value::Null),
            ("prompt_cache_key", Value::Null),
            ("reasoning_effort", Value::Null),
            ("response_format", json!({ "type": "text" })),
            ("safety_identifier", Value::Null),
            ("service_tier", json!("auto")),
            ("store", json!(false)),
            ("tool_choice", json!("none")),
            ("tools", json!([])),
            ("verbosity", Value::Null),
            ("web_search_options", Value::Null),
        ])?;
        fields.end(
            "model, messages, logprobs, top_logprobs, max_tokens, max_completion_tokens, n, seed, stop, stream, stream_options, temperature, top_p, top_k, \
             session and show_blocks",
        )?;
        let prompts = vec![Prompt::Conversation(messages)];
        Ok(Self { prompts, wanted: Wanted { max_tokens, logprobs, ..wanted }, streaming })
    }
}

/// What both have; the number of tokens is the caller's.
fn common(fields: &mut Fields, limits: &Limits, seed: u64, prompts: usize) -> Result<(Wanted, Streaming), ApiError> {
    let choices = fields.count("n", 1..=MOST_CHOICES)?.unwrap_or(1);
    if choices * prompts > MOST_CHOICES {
        let expected = format!("{prompts} prompts and n {choices}: expected at most {MOST_CHOICES} choices in all");
        return Err(ApiError::value("n", expected));
    }
    let seed = match fields.take("seed") {
        None => seed,
        // Clients have signed numbers; each is a seed of its own.
        Some(value) => match value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64)) {
            Some(seed) => seed,
            None => return Err(ApiError::value("seed", "expected a whole number of 64 bits")),
        },
    };
    let sampling = SamplingFlags {
        temperature: fields.number("temperature", 0. ..=MOST_TEMPERATURE)?,
        // 0 leaves the likeliest token, as the smallest share does.
        top_p: fields.number("top_p", 0. ..=1.)?.map(|share| share.max(f64::MIN_POSITIVE)),
        top_k: fields.count("top_k", 0..=usize::MAX)?,
        seed,
    };
    let stream = fields.boolean("stream")?;
    let usage = match fields.take("stream_options") {
        None => false,
        Some(_) if !stream => return Err(ApiError::value("stream_options", "it belongs to stream")),
        Some(options) => {
            let mut options = Fields::of(options, "stream_options")?;
            let usage = options.boolean("include_usage")?;
            options.refuse([("include_obfuscation", json!(false))])?;
            options.end("include_usage in stream_options")?;
            usage
        }
    };
    let session = fields.text("session")?.map(|name| SessionName::parse(&name, "session")).transpose()?;
    let show_blocks = fields.count("show_blocks", 1..=MOST_BLOCKS)?;
    if show_blocks.is_some() && choices * prompts > 1 {
        return Err(ApiError::value("show_blocks", "expected one prompt and n 1"));
    }
    fields.refuse([
        ("frequency_penalty", json!(0)),
        ("presence_penalty", json!(0)),
        ("logit_bias", json!({})),
        ("user", json!("")),
    ])?;
    let stop = stops(fields.take("stop"))?;
    let wanted = Wanted {
        choices,
        max_tokens: limits.new_tokens,
        sampling,
        stop,
        echo: false,
        logprobs: None,
        session,
        show_blocks,
    };
    Ok((wanted, Streaming { stream, usage }))
}

fn check_model(fields: &mut Fields, model: &str) -> Result<(), ApiError> {
    match fields.text("model")? {
        Some(name) if name != model => {
            let message = format!("the model of this server is {model}");
            Err(ApiError {
                param: Some("model"),
                ..ApiError::new(axum::http::StatusCode::NOT_FOUND, "model_not_found", message)
            })
        }
        _ => Ok(()),
    }
}

fn stops(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    let stops: Vec<Value> = match value {
        None => Vec::new(),
        Some(Value::Array(stops)) => stops,
        Some(one) => vec![one],
    };
    let expected = || {
        let expected = format!("expected a string, or up to {MOST_STOPS}, of 1 to {LONGEST_STOP} bytes each");
        ApiError::value("stop", expected)
    };
    if stops.len() > MOST_STOPS {
        return Err(expected());
    }
    let stop = |value: Value| match value {
        Value::String(stop) if (1..=LONGEST_STOP).contains(&stop.len()) => Ok(stop),
        _ => Err(expected()),
    };
    stops.into_iter().map(stop).collect()
}

fn prompts(value: Option<Value>) -> Result<Vec<Prompt>, ApiError> {
    let expected = || ApiError::value("prompt", "expected a string, an array of tokens, or an array of these");
    let one = |value: Value| match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(tokens) if !tokens.is_empty() => {
            let token = |value: &Value| value.as_u64().and_then(|token| u32::try_from(token).ok());
            let tokens: Option<Vec<u32>> = tokens.iter().map(token).collect();
            tokens.map(Prompt::Tokens).ok_or_else(expected)
        }
        _ => Err(expected()),
    };
    let prompts = match value {
        Some(Value::Array(several)) if several.iter().any(|value| !value.is_number()) => {
            several.into_iter().map(one).collect::<Result<Vec<_>, _>>()?
        }
        Some(value) => vec![one(value)?],
        None => return Err(ApiError::value("prompt", "it is missing")),
    };
    if prompts.len() > MOST_CHOICES {
        return Err(ApiError::value("prompt", format!("expected at most {MOST_CHOICES} prompts")));
    }
    Ok(prompts)
}

fn messages(value: Option<Value>) -> Result<Vec<Message>, ApiError> {
    let expected = |what: &str| ApiError::value("messages", what);
    let Some(Value::Array(values)) = value else { return Err(expected("expected an array of messages")) };
    if values.is_empty() {
        return Err(expected("expected at least one message"));
    }
    let message = |value: Value| {
        let mut fields = Fields::of(value, "messages")?;
        let role = match fields.text("role")?.as_deref() {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            _ => return Err(expected("expected a role of system, developer, user or assistant in each")),
        };
        let content = match fields.take("content") {
            Some(Value::String(text)) => text,
            Some(Value::Array(parts)) => parts.into_iter().map(part).collect::<Result<Vec<_>, _>>()?.concat(),
            _ => return Err(expected("expected a string, or an array of parts of type text, as content of each")),
        };
        fields.refuse([
            ("annotations", json!([])),
            ("audio", Value::Null),
            ("function_call", Value::Null),
            ("name", Value::Null),
            ("refusal", Value::Null),
            ("tool_call_id", Value::Null),
            ("tool_calls", json!([])),
        ])?;
        fields.end("role and content in a message")?;
        Ok(Message { role, content })
    };
    values.into_iter().map(message).collect()
}

/// The text of a part of a message.
fn part(value: Value) -> Result<String, ApiError> {
    let mut fields = Fields::of(value, "messages")?;
    if fields.text("type")?.as_deref() != Some("text") {
        return Err(ApiError::value("messages", "expected parts of type text"));
    }
    let text = fields.required_text("text")?;
    fields.end("type and text in a part of a message")?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn limits() -> Limits {
        Limits {
            body: 1 << 20,
            prompt_tokens: 1000,
            new_tokens: 100,
            time: Duration::from_secs(1),
            parallel: 1,
            queue: 1,
            kept: 0,
            session_disk: None,
            key_disk: None,
            connections: 1,
            grace: Duration::ZERO,
        }
    }

    fn completion(body: Value) -> Result<Request, ApiError> {
        Request::completion(Fields::parse(body.to_string().as_bytes()).unwrap(), "m", &limits(), 7)
    }

    fn chat(body: Value) -> Result<Request, ApiError> {
        Request::chat(Fields::parse(body.to_string().as_bytes()).unwrap(), "m", &limits(), 7)
    }

    #[test]
    fn prompts_have_all_of_their_forms() {
        let of = |prompt: Value| completion(json!({ "prompt": prompt })).map(|request| request.prompts);
        let (a, b) = (Prompt::Text("a".into()), Prompt::Text("b".into()));
        assert_eq!(of(json!("a")), Ok(vec![a.clone()]));
        assert_eq!(of(json!(["a", "b"])), Ok(vec![a, b]));
        assert_eq!(of(json!([1, 2])), Ok(vec![Prompt::Tokens(vec![1, 2])]));
        assert_eq!(of(json!([[1], [2, 3]])), Ok(vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]));
        for bad in
            [json!([]), json!([[]]), json!([1, "a"]), json!([-1]), json!([1.5]), json!({}), json!(null), json!(1)]
        {
            assert_eq!(of(bad.clone()).unwrap_err().param, Some("prompt"), "{bad}");
        }
    }

    #[test]
    fn absurd_values_are_refused_by_name() {
        for (name, value) in [
            ("temperature", json!(-0.1)),
            ("temperature", json!(1e300)),
            ("top_p", json!(1.1)),
            ("top_k", json!(-1)),
            ("n", json!(0)),
            ("n", json!(1_000_000)),
            ("max_tokens", json!(101)),
            ("max_tokens", json!(-5)),
            ("seed", json!(1.5)),
            ("seed", json!("x")),
            ("stop", json!("")),
            ("stop", json!([1])),
            ("stop", json!(vec!["x"; 17])),
            ("stream", json!("yes")),
            ("stream_options", json!({ "include_usage": true })),
            ("echo", json!(1)),
            ("logprobs", json!(21)),
            ("best_of", json!(2)),
            ("suffix", json!("x")),
            ("logit_bias", json!({ "5": 1 })),
            ("presence_penalty", json!(0.1)),
            ("session", json!("../x")),
            ("show_blocks", json!(0)),
            ("model", json!("other")),
        ] {
            let error = completion(json!({ "prompt": "a", name: value })).unwrap_err();
            assert_eq!(error.param, Some(name), "{value}: {error:?}");
        }
        let request =
            completion(json!({ "prompt": "a", "n": 2, "best_of": 2, "top_p": 0, "seed": -1, "suffix": null })).unwrap();
        assert_eq!((request.wanted.choices, request.wanted.sampling.seed), (2, u64::MAX));
        assert_eq!(completion(json!({ "prompt": "a" })).unwrap().wanted.sampling.seed, 7);
    }

    #[test]
    fn messages_are_texts_and_parts_of_texts() {
        let said = |content: Value| chat(json!({ "messages": [{ "role": "user", "content": content }] }));
        let parts = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
        let Prompt::Conversation(messages) = said(parts).unwrap().prompts.remove(0) else { panic!("no conversation") };
        assert_eq!(messages[0].content, "ab");
        for bad in [json!(null), json!(1), json!([{ "type": "image_url", "image_url": {} }])] {
            assert_eq!(said(bad).unwrap_err().param, Some("messages"));
        }
        for (name, value, code) in [
            ("tools", json!([{}]), "unsupported_parameter"),
            ("response_format", json!({ "type": "json_object" }), "unsupported_parameter"),
            // Without logprobs there is nothing that it could be of.
            ("top_logprobs", json!(2), "invalid_value"),
        ] {
            let error = chat(json!({ "messages": [{ "role": "user", "content": "a" }], name: value })).unwrap_err();
            assert_eq!((error.param, error.code), (Some(name), code));
        }
        assert!(chat(json!({ "messages": [{ "role": "tool", "content": "a" }] })).is_err());
        assert!(chat(json!({ "messages": [] })).is_err());
        let both =
            json!({ "messages": [{ "role": "user", "content": "a" }], "max_tokens": 5, "max_completion_tokens": 6 });
        assert_eq!(chat(both).unwrap_err().param, Some("max_completion_tokens"));
    }

    #[test]
    fn names_of_sessions_are_no_paths() {
        for good in ["a", "Persuasion-1.txt", "0_9"] {
            assert_eq!(SessionName::parse(good, "name").unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".a", "a/b", "a\\b", "-a", "\u{e9}", "a b", "a\0", &"a".repeat(65)] {
            assert!(SessionName::parse(bad, "name").is_err(), "{bad:?}");
        }
    }
}
