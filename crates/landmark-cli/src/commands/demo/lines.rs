//! Lines that fit a terminal.

use std::io::{Result, Write};

/// Columns of a line.
const WIDTH: usize = 86;

/// Writes text as it arrives, indented, and broken between words.
pub struct Lines<'w, W> {
    out: &'w mut W,
    indent: &'static str,
    /// Columns of the current line; none before its first word.
    column: usize,
    /// A word that may not be complete.
    word: String,
}

impl<'w, W: Write> Lines<'w, W> {
    /// Nothing yet.
    pub fn new(out: &'w mut W, indent: &'static str) -> Self {
        Self { out, indent, column: 0, word: String::new() }
    }

    /// The next piece of the text. Every word is written once the space after it arrives.
    pub fn push(&mut self, text: &str) -> Result<()> {
        for c in text.chars() {
            match c {
                '\n' => {
                    self.end_word()?;
                    if self.column > 0 {
                        writeln!(self.out)?;
                        self.column = 0;
                    }
                }
                c if c.is_whitespace() => self.end_word()?,
                c => self.word.push(c),
            }
        }
        self.out.flush()
    }

    /// Writes the word that is held back.
    pub fn end_word(&mut self) -> Result<()> {
        if self.word.is_empty() {
            return Ok(());
        }
        let length = self.word.chars().count();
        if self.column > 0 && self.column + 1 + length > WIDTH {
            writeln!(self.out)?;
            self.column = 0;
        }
        let before = if self.column == 0 { self.indent } else { " " };
        write!(self.out, "{before}{}", self.word)?;
        self.column += before.len() + length;
        self.word.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_between_words() {
        let mut out = Vec::new();
        let mut lines = Lines::new(&mut out, "  ");
        for piece in ["It w", "as ", "a\n\ndark ", &"night ".repeat(30)] {
            lines.push(piece).unwrap();
        }
        lines.end_word().unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("  It was a\n  dark night"), "{text}");
        assert!(text.lines().count() == 4 && text.lines().all(|line| line.len() <= WIDTH && line.starts_with("  ")));
        assert_eq!(text.split_whitespace().count(), 34);
    }
}
