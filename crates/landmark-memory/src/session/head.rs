//! `session.json`: what a session is made for. `{"checksum":"crc32c:HEX","session":{..}}`, the checksum that of the session's object as it stands
//! there.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::codec::{BlockType, Codec};
use crate::segments::Shape;
use crate::{Error, Result};

pub const NAME: &str = "session.json";
const VERSION: u32 = 1;
/// What is around the checksum.
const BEFORE: &str = "{\"checksum\":\"crc32c:";
const BETWEEN: &str = "\",\"session\":";

/// What the file says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Of the files' formats.
    pub version: u32,
    /// A random number, in hexadecimal, that a session shares with its forks.
    pub lineage: String,
    pub block_type: String,
    pub layers: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Positions of a block's place.
    pub block: usize,
    pub head_dim: usize,
    pub blocks_per_segment: usize,
    /// Bytes that the session may take on disk.
    pub disk_limit: Option<u64>,
    /// Blocks that were damaged, and that repair dropped.
    pub dropped: Vec<u32>,
    /// What the session's owner has to remember.
    pub about: serde_json::Value,
}

impl Head {
    pub fn new(shape: &Shape, disk_limit: Option<u64>, about: serde_json::Value) -> Self {
        let Shape { layers, heads, codec: Codec { of, block, head_dim }, per_segment, lineage } = *shape;
        Self {
            version: VERSION,
            lineage: format!("{lineage:016x}"),
            block_type: of.name().into(),
            layers,
            kv_heads: heads,
            block,
            head_dim,
            blocks_per_segment: per_segment,
            disk_limit,
            dropped: Vec::new(),
            about,
        }
    }

    /// The sizes of the session's files; refuses those that no model has.
    pub fn shape(&self, path: &Path) -> Result<Shape> {
        let wrong = |what: &str| Error::damaged(path, format!("{what} is out of range"));
        let of: BlockType =
            self.block_type.parse().map_err(|error| Error::damaged(path, format!("block_type: {error}")))?;
        let lineage = u64::from_str_radix(&self.lineage, 16).map_err(|_| wrong("lineage"))?;
        for (name, x, most) in [
            ("layers", self.layers, 1 << 12),
            ("kv_heads", self.kv_heads, 1 << 12),
            ("block", self.block, 1 << 20),
            ("head_dim", self.head_dim, 1 << 12),
            ("blocks_per_segment", self.blocks_per_segment, 1 << 20),
        ] {
            if x == 0 || x > most || (name == "block" && x < 2) {
                return Err(wrong(name));
            }
        }
        let codec = Codec { of, block: self.block, head_dim: self.head_dim };
        let per_segment = self.blocks_per_segment;
        let shape = Shape { layers: self.layers, heads: self.kv_heads, codec, per_segment, lineage };
        let sizes = [self.layers, self.kv_heads, self.block, self.head_dim, 8];
        let bytes = sizes.into_iter().try_fold(1usize, |bytes, x| bytes.checked_mul(x));
        // A block is written and read at once, in memory: those of the largest models take a hundredth of this.
        bytes.filter(|&bytes| bytes <= 1 << 33).map(|_| shape).ok_or_else(|| wrong("the size of a block"))
    }

    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(NAME);
        let text = std::fs::read_to_string(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::Session { path: folder.to_path_buf(), reason: format!("no session: there is no {NAME} in it") }
            }
            std::io::ErrorKind::InvalidData => Error::damaged(&path, "it is no text"),
            _ => Error::io("read", &path)(error),
        })?;
        let session =
            text.strip_prefix(BEFORE).and_then(|rest| rest.split_at_checked(8)).and_then(|(checksum, rest)| {
                let session = rest.strip_prefix(BETWEEN)?.strip_suffix('}')?;
                (checksum == checksum_of(session)).then_some(session)
            });
        let session =
            session.ok_or_else(|| Error::damaged(&path, "it is not what was written: its checksum is another"))?;
        let version = serde_json::from_str::<serde_json::Value>(session).ok();
        let version = version.and_then(|session| session.get("version")?.as_u64());
        if version != Some(u64::from(VERSION)) {
            let version = version.map_or("unknown".into(), |version| version.to_string());
            let reason = format!("its files are of version {version}, and this program reads version {VERSION}");
            return Err(Error::Session { path: folder.to_path_buf(), reason });
        }
        serde_json::from_str(session).map_err(|error| Error::damaged(&path, error.to_string()))
    }

    pub fn write(&self, folder: &Path) -> Result<()> {
        let session = serde_json::to_string(self).expect("a head has no keys but strings");
        let text = format!("{BEFORE}{}{BETWEEN}{session}}}", checksum_of(&session));
        super::folder::replace(&folder.join(NAME), text.as_bytes())
    }
}

fn checksum_of(session: &str) -> String {
    format!("{:08x}", crc32c::crc32c(session.as_bytes()))
}
