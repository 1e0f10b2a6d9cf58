//! The byte-level alphabet and the byte tokenizer's `tokenizer.json`.
//!
//! GPT-2 and its heirs write a byte as one printable character: a printable Latin-1 byte as itself, any other as the next
//! free code point from U+0100 on. A byte tokenizer is then a BPE with the 256 characters as vocabulary and no merges.

/// The end-of-text id of the byte tokenizer: the first id after the bytes.
pub(super) const END_OF_TEXT: u32 = 256;
/// The landmark id of the byte tokenizer.
pub(super) const LANDMARK: u32 = 257;
/// The number of ids of the byte tokenizer.
pub(super) const VOCAB_SIZE: u32 = 258;

/// The byte that `c` stands for.
fn char_to_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The character that `byte` is written as.
pub(super) fn byte_to_char(byte: u8) -> char {
    let code = match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
        0x00..=0x20 => 0x100 + u32::from(byte),
        0x7f..=0xa0 => 0x121 + u32::from(byte - 0x7f),
        0xad => 0x143,
    };
    // Never the replacement: all of these are characters.
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The bytes of a token of a byte-level vocabulary. A token with any other character (an added one) is its own text.
pub(super) fn token_bytes(token: &str) -> Vec<u8> {
    token.chars().map(char_to_byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte tokenizer as a `tokenizer.json` that the `tokenizers` library loads and that gives the same ids. A file of the
/// source tree and not made by code: its bytes are what the fingerprint is of, so they must never change.
pub(super) const TOKENIZER_JSON: &str = include_str!("bytes.tokenizer.json");

#[cfg(test)]
mod tests {
    use super::*;

    /// GPT-2's rule, spelled out: printable bytes are themselves, the others take the next free code point.
    fn alphabet() -> Vec<char> {
        let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut free = 0x100..;
        let code = |b: u32| if printable(b) { Some(b) } else { free.next() };
        (0..=255).filter_map(code).filter_map(char::from_u32).collect()
    }

    #[test]
    fn the_alphabet_is_a_bijection_and_the_library_s() {
        let ours = alphabet();
        let theirs = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert_eq!(ours.iter().copied().collect::<std::collections::HashSet<_>>(), theirs.into_iter().collect());
        for (byte, &c) in (0..=255u8).zip(&ours) {
            assert_eq!((char_to_byte(c), byte_to_char(byte)), (Some(byte), c));
        }
        assert!((0..0x300).filter_map(char::from_u32).all(|c| ours.contains(&c) == char_to_byte(c).is_some()));
        assert_eq!(token_bytes("Ġthe"), b" the");
        assert_eq!(token_bytes("日本"), "日本".as_bytes());
    }
}
