//! Landmarks at a text's own borders instead of after every `mem_freq` tokens: blocks that are whole sentences, paragraphs, lines or
//! pieces of a program.
//!
//! Whether a landmark follows a token depends on nothing but the tokens of its document up to and including that one. So a
//! text has the same landmarks in training, in whatever chunks it is read, and while it is generated token by token.
//!
//! # The rule
//!
//! A block ends after a token
//!
//! 1. that is an end of text: a block is never of two documents;
//! 2. that ends with a border of the text, if the block has at least a quarter of `mem_freq` tokens;
//! 3. (`code` alone) that ends a line, if the block has at least three quarters of `mem_freq` tokens;
//! 4. in any case when the block has `mem_freq` tokens.
//!
//! | borders | where |
//! | --- | --- |
//! | `sentence` | after `.` `!` `?` and the quotes, brackets and spaces that follow in the same token or later; a `.` after a number, a single letter or a capitalised word of at most three letters ("Mr.", "J.") ends nothing |
//! | `paragraph` | after an empty line |
//! | `line` | after a line end |
//! | `code` | after an empty line, and after a line that begins with a closing bracket at the left margin |
//!
//! Why a least size: a landmark costs a position of the training window and a slot of the cache whatever the size of its block.
//! With a quarter, blocks of single words ("Yes.") are joined to what follows, landmarks take at most a fifth of a window
//! with `mem_freq` 16 and more, and a slot of the cache is at least a quarter full. The rest of a sentence that was cut at
//! `mem_freq` is joined to the next one likewise.
//!
//! A border inside a token is none, for nothing can be put there. A closing quote that is a token of its own comes
//! after the landmark if the block was long enough before it: the rule does not know what follows.

mod automaton;
mod index;

use std::fmt;
use std::sync::Arc;

use crate::{Error, Fingerprint, Result, Tokenizer};
use automaton::Strength;
pub(crate) use index::Index;

/// The borders that landmarks are put at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Border {
    /// Of sentences.
    Sentence,
    /// Of paragraphs: empty lines.
    Paragraph,
    /// Of lines.
    Line,
    /// Of items of a program.
    Code,
}

/// Where landmarks go in the texts of one tokenizer; the [module documentation](self) has the rule. Cheap to clone.
#[derive(Clone)]
pub struct BorderRule {
    border: Border,
    mem_freq: u32,
    tokenizer: Fingerprint,
    end_of_text: Option<u32>,
    /// For each token and each state before it, the state after it: a step is one look-up, however long the token.
    table: Arc<[u8]>,
    /// For each state, the tokens that a block needs to end there.
    least: Arc<[u32]>,
}

/// A place in a text: all that the rule knows of what came before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Tokens of the unfinished block.
    tokens: u32,
    state: u8,
}

impl BorderRule {
    /// The rule for the texts of `tokenizer`, with at most `mem_freq` ordinary tokens in a block.
    pub fn new(border: Border, tokenizer: &Tokenizer, mem_freq: u32) -> Result<Self> {
        let rule = Self::compile(border, &tokenizer.texts(), tokenizer.end_of_text(), mem_freq)?;
        Ok(Self { tokenizer: tokenizer.fingerprint(), ..rule })
    }

    /// From the texts of all tokens.
    fn compile(border: Border, texts: &[Vec<u8>], end_of_text: Option<u32>, mem_freq: u32) -> Result<Self> {
        if mem_freq == 0 {
            return Err(Error::Param { name: "mem_freq", got: "0".into(), expected: "at least 1" });
        }
        let states = automaton::states(border);
        let step = |text: &[u8], state| text.iter().fold(state, |state, &byte| automaton::next(border, state, byte));
        let table = texts.iter().flat_map(|text| (0..states).map(move |state| step(text, state))).collect();
        let least = |state| match automaton::strength(border, state) {
            Strength::Strong => mem_freq.div_ceil(4),
            Strength::Weak => mem_freq - mem_freq / 4,
            Strength::None => mem_freq,
        };
        let least = (0..states).map(least).collect();
        Ok(Self { border, mem_freq, tokenizer: Fingerprint::UNKNOWN, end_of_text, table, least })
    }

    /// The borders.
    pub fn border(&self) -> Border {
        self.border
    }

    /// The most ordinary tokens of a block.
    pub fn mem_freq(&self) -> u32 {
        self.mem_freq
    }

    /// Goes on by one token; whether a landmark follows it.
    #[inline]
    pub(crate) fn step(&self, place: &mut Place, token: u32) -> bool {
        if Some(token) == self.end_of_text {
            *place = Place::default();
            return true;
        }
        let states = self.least.len();
        // An id that the tokenizer does not know has no text.
        if let Some(&state) = self.table.get(token as usize * states + place.state as usize) {
            place.state = state;
        }
        place.tokens += 1;
        let ends = place.tokens >= self.least[place.state as usize];
        if ends {
            place.tokens = 0;
        }
        ends
    }
}

impl PartialEq for BorderRule {
    fn eq(&self, other: &Self) -> bool {
        (self.border, self.mem_freq, self.tokenizer) == (other.border, other.mem_freq, other.tokenizer)
    }
}

impl Eq for BorderRule {}

impl fmt::Debug for BorderRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BorderRule({:?}, at most {}, tokenizer {})", self.border, self.mem_freq, self.tokenizer)
    }
}

/// Puts landmarks into a text that arrives token by token.
#[derive(Clone, Debug)]
pub struct Placer {
    rule: Option<BorderRule>,
    mem_freq: u32,
    place: Place,
}

impl Placer {
    /// A landmark after every `mem_freq` tokens, which are at least 1.
    pub fn every(mem_freq: u32) -> Self {
        Self { rule: None, mem_freq: mem_freq.max(1), place: Place::default() }
    }

    /// Landmarks at borders.
    pub fn at_borders(rule: BorderRule) -> Self {
        Self { mem_freq: rule.mem_freq, rule: Some(rule), place: Place::default() }
    }

    /// The most ordinary tokens of a block.
    pub fn mem_freq(&self) -> u32 {
        self.mem_freq
    }

    /// Whether all blocks have that many.
    pub fn is_regular(&self) -> bool {
        self.rule.is_none()
    }

    /// Takes the text's next token; whether a landmark follows it.
    pub fn push(&mut self, token: u32) -> bool {
        match &self.rule {
            Some(rule) => rule.step(&mut self.place, token),
            None => {
                self.place.tokens = (self.place.tokens + 1) % self.mem_freq;
                self.place.tokens == 0
            }
        }
    }

    /// Goes back to the beginning of a text.
    pub fn clear(&mut self) {
        self.place = Place::default();
    }
}

#[cfg(test)]
mod tests;
