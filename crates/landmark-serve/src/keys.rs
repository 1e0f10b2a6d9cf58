//! Who may ask, and whose sessions are whose.

use crate::Error;
use landmark_inference::hex;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// Digits of a key's hash that name the folder of its sessions.
const FOLDER_DIGITS: usize = 32;

/// The keys that are let in. What is kept of a key is its hash.
pub struct Keys(Vec<[u8; 32]>);

/// Who asks: those with the same key, or all if there are none. Sessions and kept prompts of others are out of reach.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner(Arc<str>);

impl Owner {
    /// The folder of the owner's sessions, under that of all.
    pub fn folder(&self) -> &str {
        &self.0
    }
}

impl Keys {
    /// None: everybody who can reach the address is let in.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// Whether everybody is let in.
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// The keys of a file, one a line; lines that are empty or begin with `#` are left out.
    ///
    /// # Errors
    /// A file that cannot be read, or that has no key.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let refuse = |reason: String| Error::Keys { path: path.to_path_buf(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys: Vec<[u8; 32]> = lines.map(hash).collect();
        if keys.is_empty() { Err(refuse("no key in it: expected one a line".into())) } else { Ok(Self(keys)) }
    }

    /// Who has the key of an `Authorization` header, if it is let in. All keys are compared, in a time that tells nothing of them.
    pub fn owner(&self, authorization: Option<&[u8]>) -> Option<Owner> {
        if self.is_none() {
            return Some(Owner("local".into()));
        }
        let given = authorization.and_then(|value| {
            let (scheme, key) = value.split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
        });
        let given: [u8; 32] = Sha256::digest(given.unwrap_or_default()).into();
        let found = self.0.iter().fold(0, |found, key| found | key.ct_eq(&given).unwrap_u8());
        (found == 1).then(|| Owner(format!("key-{}", &hex(&given)[..FOLDER_DIGITS]).into()))
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_file_are_let_in_and_no_others() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "# two\nfirst\n\n second \n").unwrap();
        let keys = Keys::read(file.path()).unwrap();
        let owner = |header: &str| keys.owner(Some(header.as_bytes()));
        let (first, second) = (owner("Bearer first").unwrap(), owner("bearer second").unwrap());
        assert_ne!(first, second);
        assert!(!first.folder().contains("first"));
        for wrong in ["Bearer third", "Bearer # two", "Bearer ", "first", "Basic first", "Bearer  first", ""] {
            assert_eq!(owner(wrong), None, "{wrong:?}");
        }
        assert_eq!(keys.owner(None), None);
        assert_eq!(Keys::none().owner(None).unwrap().folder(), "local");
        std::fs::write(&file, "# none\n").unwrap();
        assert!(Keys::read(file.path()).err().unwrap().to_string().contains("no key in it"));
    }
}
