//! Decoding of ids that arrive one at a time, for text that is shown while it is generated.
//!
//! A token may end in the middle of a character, so text is held back until its characters are complete. There are two
//! ways to know. In a byte-level vocabulary each token is a run of bytes, and UTF-8 itself says what is complete: exact,
//! and constant work a token. Other decoders look at neighbours (a leading space, `<0xC3>` for a byte), so there a short
//! window of ids is decoded with and without the new ones, and the difference is the new text.

use super::Tokenizer;
use crate::Result;

/// No character needs more tokens than it has bytes (4). Past twice that the bytes are no character and are shown as such.
const MAX_HELD_BACK: usize = 8;

/// Turns ids into text piece by piece, each piece complete UTF-8. Made by [`Tokenizer::decoder`].
#[derive(Debug)]
pub struct Decoder<'t> {
    tokenizer: &'t Tokenizer,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The bytes of an unfinished character.
    Bytes(Vec<u8>),
    /// `ids[..shown]` gave the last piece of text and are the context of the rest, which has not been shown.
    Window { ids: Vec<u32>, shown: usize },
}

impl<'t> Decoder<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> Self {
        let state = if tokenizer.is_byte_level() {
            State::Bytes(Vec::new())
        } else {
            State::Window { ids: Vec::new(), shown: 0 }
        };
        Self { tokenizer, state }
    }

    /// Takes the next id; returns the text that is complete now, which is often none.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.tokenizer.check(id)?;
        match &mut self.state {
            State::Bytes(held) => {
                held.extend(self.tokenizer.token_bytes(id));
                Ok(take_complete(held))
            }
            State::Window { ids, shown } => {
                ids.push(id);
                let text = self.tokenizer.decode(ids)?;
                let context = self.tokenizer.decode(&ids[..*shown])?;
                let incomplete = text.ends_with(char::REPLACEMENT_CHARACTER) && ids.len() - *shown < MAX_HELD_BACK;
                if text.len() <= context.len() || incomplete {
                    return Ok(String::new());
                }
                ids.drain(..*shown);
                *shown = ids.len();
                Ok(after(&text, &context))
            }
        }
    }

    /// The rest, at the end of the ids: what was held back, with U+FFFD for an unfinished character.
    pub fn finish(self) -> Result<String> {
        match self.state {
            State::Bytes(held) => Ok(String::from_utf8_lossy(&held).into_owned()),
            State::Window { ids, shown } => {
                Ok(after(&self.tokenizer.decode(&ids)?, &self.tokenizer.decode(&ids[..shown])?))
            }
        }
    }
}

/// What `text` has beyond `context`, counted in characters: a decoder may rewrite the context's last one.
fn after(text: &str, context: &str) -> String {
    text.chars().skip(context.chars().count()).collect()
}

/// Takes all complete characters out of `held`, and U+FFFD for each run of bytes that cannot become one. Leaves at most an
/// unfinished character of 3 bytes.
fn take_complete(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    loop {
        match std::str::from_utf8(&held[done..]) {
            Ok(rest) => {
                text.push_str(rest);
                held.clear();
                return text;
            }
            Err(error) => {
                let valid = done + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&held[done..valid]));
                let Some(bad) = error.error_len() else {
                    held.drain(..valid);
                    return text;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                done = valid + bad;
            }
        }
    }
}
