//! Places where a text may be cut.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::{Error, Result};

/// How far after its ideal place the cut between the sets is looked for.
const CUT_WINDOW: u64 = 64 << 10;

/// A place to cut the file of length `len` at, from `at` on: after the next line, else after the next space, else between two
/// characters.
pub(super) fn cut_after(path: &Path, at: u64, len: u64) -> Result<u64> {
    if at == 0 {
        return Ok(0);
    }
    let mut file = File::open(path).map_err(Error::io(path))?;
    // From one byte earlier: `at` itself may already be the start of a line.
    file.seek(SeekFrom::Start(at - 1)).map_err(Error::io(path))?;
    let mut window = Vec::new();
    file.take(CUT_WINDOW).read_to_end(&mut window).map_err(Error::io(path))?;
    let after = |wanted: u8| window.iter().position(|&byte| byte == wanted).map(|i| i + 1);
    // A continuation byte is 0b10xxxxxx: never cut before one.
    let character = || (1..window.len()).find(|&i| window[i] & 0xc0 != 0x80);
    let offset = after(b'\n').or_else(|| after(b' ')).or_else(character).unwrap_or(window.len());
    Ok((at - 1 + offset as u64).min(len))
}

/// The last place in `text` that no tokenizer joins across (`pieces.rs` says why); the whole of it where there is none.
pub fn border(text: &str) -> usize {
    let letter = |c: Option<char>| c.is_some_and(char::is_alphabetic);
    let separates =
        |&(at, _): &(usize, &str)| letter(text[..at].chars().next_back()) && letter(text[at + 1..].chars().next());
    text.rmatch_indices(' ').find(separates).map_or(text.len(), |(at, _)| at)
}
