//! How reading is shown: a bar while it goes on, numbers and blocks when it is done.

use indicatif::{ProgressBar, ProgressStyle};
use landmark_inference::Reader;
use std::fmt::Write;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Columns that the words of a block may take.
const WORDS: usize = 88;

/// Shows how far a text is read, on a terminal alone.
pub struct ReadingBar {
    bar: ProgressBar,
    begun: Instant,
    tokens: usize,
}

impl ReadingBar {
    /// For a text of so many units (bytes, or tokens), if that is known.
    pub fn new(what: &str, length: Option<u64>) -> Self {
        let template = match length {
            Some(_) => "{prefix} {bar:30} {percent:>3}% {msg} ETA {eta}",
            None => "{prefix} {spinner} {msg}",
        };
        let style = ProgressStyle::with_template(template).expect("a template without mistakes");
        let bar = length.map_or_else(ProgressBar::no_length, ProgressBar::new).with_style(style);
        bar.set_prefix(what.to_string());
        Self { bar, begun: Instant::now(), tokens: 0 }
    }

    /// So many units and tokens are read.
    pub fn set(&mut self, position: u64, tokens: usize) {
        self.tokens = tokens;
        self.bar.set_position(position);
        self.bar.set_message(format!("{} tokens, {} tok/s", grouped(tokens), grouped(self.rate())));
    }

    /// Tokens a second so far.
    pub fn rate(&self) -> usize {
        rate(self.tokens, self.begun.elapsed())
    }

    /// Clears the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Tokens a second.
pub fn rate(tokens: usize, time: Duration) -> usize {
    (tokens as f64 / time.as_secs_f64().max(1e-9)) as usize
}

/// A number with commas between thousands.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The `count` blocks that the generated text read most, with their words; `tokens` is the text. Blocks with tokens of `marked` are
/// marked.
pub fn most_read(reader: &Reader, tokens: &[u32], count: usize, marked: &Range<usize>) -> anyhow::Result<String> {
    let reads = reader.reads();
    if reads.is_empty() {
        return Ok("No blocks were read: none is finished yet, or --cache_topk is 0.\n".into());
    }
    let total = grouped(reader.blocks());
    let mut text = format!("The blocks that it read most, of {total}, and their share of its attention:\n");
    for read in reads.iter().take(count) {
        let range = &read.tokens;
        let words = tokens.get(range.clone()).map_or(Ok(String::new()), |tokens| reader.tokenizer().decode(tokens))?;
        let (block, first, last) = (grouped(read.block), grouped(range.start), grouped(range.end - 1));
        let mark = if range.start < marked.end && marked.start < range.end { "  <- told here" } else { "" };
        writeln!(text, "{:5.1}%  block {block}, tokens {first} to {last}{mark}", 100. * read.weight)?;
        writeln!(text, "        {:?}", shortened(&words))?;
    }
    Ok(text)
}

/// Words on one line, of a length that fits it.
fn shortened(words: &str) -> String {
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    match words.char_indices().nth(WORDS) {
        None => words,
        Some((end, _)) => format!("{}...", &words[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_words_read_well() {
        assert_eq!([0, 12, 999, 1000, 1234567].map(grouped), ["0", "12", "999", "1,000", "1,234,567"]);
        assert_eq!(shortened(" a\n\n b "), "a b");
        assert_eq!(shortened(&"\u{e9}".repeat(100)), "\u{e9}".repeat(WORDS) + "...");
    }
}
