//! The header of a token file: 128 bytes to a struct and back, with every check that needs only the header.

use std::path::Path;

use crate::{Error, Fingerprint, Result};

/// The first bytes of every token file.
pub(super) const MAGIC: [u8; 8] = *b"LMTOKENS";
/// The version of the layout.
pub(super) const VERSION: u32 = 1;
/// The header's length in bytes.
pub(super) const HEADER_LEN: usize = 128;
/// The length of one document border.
pub(super) const BORDER_LEN: u64 = 8;
/// Borders start at a multiple of this.
const BORDER_ALIGN: u64 = 8;
/// In the file: no end-of-text id.
const NONE: u32 = u32::MAX;
/// The header's last field covers all bytes before it.
const CHECKSUM_AT: usize = HEADER_LEN - 4;

/// Bytes of one stored token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    U16,
    U32,
}

impl Width {
    /// The narrowest width for ids below `vocab_size`.
    pub(super) fn of(vocab_size: u32) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// The header's fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) width: Width,
    pub(super) vocab_size: u32,
    pub(super) end_of_text: Option<u32>,
    pub(super) tokens: u64,
    pub(super) documents: u64,
    pub(super) body_checksum: u32,
    pub(super) tokenizer: Fingerprint,
}

/// Where the parts of a file lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) tokens_end: u64,
    pub(super) borders_start: u64,
    pub(super) file_len: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&(self.width.bytes() as u32).to_le_bytes());
        put(&self.vocab_size.to_le_bytes());
        put(&self.end_of_text.unwrap_or(NONE).to_le_bytes());
        put(&self.tokens.to_le_bytes());
        put(&self.documents.to_le_bytes());
        put(&self.body_checksum.to_le_bytes());
        put(&[0; 4]);
        put(&self.tokenizer.0);
        let checksum = crc32fast::hash(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads and checks the header of the file whose bytes are `file`.
    pub(super) fn decode(path: &Path, file: &[u8]) -> Result<Self> {
        // The magic first: of a short file that is something else, the length is not the news.
        if let Some(&got) = file.first_chunk::<8>()
            && got != MAGIC
        {
            return Err(Error::BadMagic { path: path.to_path_buf(), got });
        }
        let Some(header) = file.first_chunk::<HEADER_LEN>() else {
            let (got, expected) = (file.len() as u64, HEADER_LEN as u64);
            return Err(Error::WrongLength { path: path.to_path_buf(), got, expected });
        };
        // The version before the checksum: another version may keep its checksum elsewhere.
        let version = u32_at(header, 8);
        if version != VERSION {
            return Err(Error::UnsupportedVersion { path: path.to_path_buf(), got: version, expected: VERSION });
        }
        let (got, expected) = (crc32fast::hash(&header[..CHECKSUM_AT]), u32_at(header, CHECKSUM_AT));
        if got != expected {
            return Err(Error::HeaderChecksum { path: path.to_path_buf(), got, expected });
        }

        let bad = |field, got, expected| Error::HeaderField { path: path.to_path_buf(), field, got, expected };
        let vocab_size = u32_at(header, 16);
        if vocab_size == 0 {
            return Err(bad("vocab_size", 0, "at least 1"));
        }
        let width = match u32_at(header, 12) {
            2 if vocab_size <= 1 << 16 => Width::U16,
            4 => Width::U32,
            other => return Err(bad("token_width", other.into(), "4, or 2 for a vocabulary of at most 65536")),
        };
        let end_of_text = match u32_at(header, 20) {
            NONE => None,
            id if id < vocab_size => Some(id),
            id => return Err(bad("end_of_text", id.into(), "an id below vocab_size, or 0xffffffff for none")),
        };
        let mut tokenizer = [0; 32];
        tokenizer.copy_from_slice(&header[48..80]);
        Ok(Self {
            width,
            vocab_size,
            end_of_text,
            tokens: u64_at(header, 24),
            documents: u64_at(header, 32),
            body_checksum: u32_at(header, 40),
            tokenizer: Fingerprint(tokenizer),
        })
    }

    /// Where the parts lie; `None` where the counts overflow a file's length.
    pub(super) fn layout(&self) -> Option<Layout> {
        let tokens_end = self.tokens.checked_mul(self.width.bytes())?.checked_add(HEADER_LEN as u64)?;
        let borders_start = tokens_end.checked_next_multiple_of(BORDER_ALIGN)?;
        let file_len = self.documents.checked_mul(BORDER_LEN)?.checked_add(borders_start)?;
        Some(Layout { tokens_end, borders_start, file_len })
    }
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}
