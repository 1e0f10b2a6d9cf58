//! Prompts that were read, kept to be gone on with.
//!
//! What is taken over are whole chunks alone, by comparing tokens: a text that goes on from one of these places is read in the same portions as
//! one that is read from its beginning, so the reply is the same to the bit, whatever was kept.

use crate::Owner;
use landmark_inference::{Mark, Reader};

/// A text that is read, with the places after each of its chunks.
pub struct Text {
    /// What has read it.
    pub reader: Reader,
    /// Its tokens; not all of them need be read.
    pub tokens: Vec<u32>,
    /// Tokens that were read up to each place.
    pub marks: Vec<(usize, Mark)>,
}

struct Kept {
    owner: Owner,
    text: Text,
}

/// Texts, those that were used last at the end.
pub struct KeptTexts {
    texts: Vec<Kept>,
    bytes: u64,
}

impl KeptTexts {
    /// Of so many bytes at most, for all owners together.
    pub fn new(bytes: u64) -> Self {
        Self { texts: Vec::new(), bytes }
    }

    /// Whether anything is kept at all.
    pub fn is_on(&self) -> bool {
        self.bytes > 0
    }

    /// Takes the text whose beginning `tokens` share farthest, back at its last place that they share; nothing if none does. A text that
    /// would lose more than half of itself stays.
    pub fn take(&mut self, owner: &Owner, tokens: &[u32]) -> anyhow::Result<Option<Text>> {
        let shared = |text: &Text| {
            let shared = text.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            text.marks.partition_point(|(read, _)| *read <= shared)
        };
        let found =
            self.texts.iter().enumerate().filter(|(_, kept)| kept.owner == *owner).filter_map(|(place, kept)| {
                let marks = shared(&kept.text);
                (marks > 0 && 2 * marks >= kept.text.marks.len()).then_some((marks, place))
            });
        let Some((marks, place)) = found.max() else { return Ok(None) };
        let mut text = self.texts.remove(place).text;
        text.marks.truncate(marks);
        text.reader.rewind(&text.marks[marks - 1].1)?;
        Ok(Some(text))
    }

    /// Keeps a text as far as its last place, if there is room for it; those that were used longest ago go for it.
    pub fn keep(&mut self, owner: &Owner, mut text: Text) -> anyhow::Result<()> {
        let Some((read, mark)) = text.marks.last() else { return Ok(()) };
        if text.reader.cache_bytes() as u64 > self.bytes {
            return Ok(());
        }
        text.reader.rewind(mark)?;
        text.tokens.truncate(*read);
        self.texts.push(Kept { owner: owner.clone(), text });
        while self.used() > self.bytes {
            self.texts.remove(0);
        }
        Ok(())
    }

    /// Bytes that are set aside.
    pub fn used(&self) -> u64 {
        self.texts.iter().map(|kept| kept.text.reader.cache_bytes() as u64).sum()
    }

    /// Texts that are kept.
    pub fn len(&self) -> usize {
        self.texts.len()
    }
}
