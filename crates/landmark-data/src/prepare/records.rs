//! JSON lines: a record on each line, with its text in one field.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::layout::Input;
use super::reader::Rules;
use super::source::Source;
use crate::{Error, Result};

/// The most bytes of a line: the longest documents of the known corpora have a few megabytes.
const MAX_LINE: usize = 64 << 20;
/// The field that describes a record.
pub(super) const META: &str = "meta";

/// What a record is to a preparation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record {
    Text(String),
    /// It belongs to another part of the data set.
    Other,
}

/// Reads the texts of the records of a file.
pub(super) struct Records<'a> {
    input: &'a Input,
    rules: Rules<'a>,
    source: Source,
    line: Vec<u8>,
}

impl<'a> Records<'a> {
    pub(super) fn new(input: &'a Input, rules: Rules<'a>, source: Source) -> Self {
        Self { input, rules, source, line: Vec::new() }
    }

    /// The next record; `None` at the end. After an error about a record the next one can be asked for.
    pub(super) fn next(&mut self) -> Result<Option<Record>> {
        loop {
            self.line.clear();
            self.source.line(&mut self.line, MAX_LINE)?;
            if self.line.is_empty() {
                return Ok(None);
            }
            if self.line.len() == MAX_LINE && !self.line.ends_with(b"\n") {
                return Err(self.pass_over()?);
            }
            // An empty line, such as the last, is no record.
            if !self.line.trim_ascii().is_empty() {
                return self.parse().map(Some);
            }
        }
    }

    pub(super) fn offset(&self) -> u64 {
        self.source.offset()
    }

    pub(super) fn disk(&self) -> u64 {
        self.source.disk()
    }

    fn parse(&self) -> Result<Record> {
        let text =
            std::str::from_utf8(&self.line).map_err(|e| self.source.invalid_utf8(&self.line, e.valid_up_to()))?;
        let mut json = serde_json::Deserializer::from_str(text.trim_end());
        let found = json.deserialize_map(Fields(self.rules)).and_then(|found| json.end().map(|()| found));
        match found {
            Ok(Some(record)) => Ok(record),
            Ok(None) => {
                let field = self.rules.field.to_owned();
                Err(Error::MissingField { path: self.input.path.clone(), line: self.number()?, field })
            }
            Err(error) => {
                // The library counts lines in what it is given, which is always one.
                let message = error.to_string().replace("line 1 column", "column");
                Err(self.bad(message)?)
            }
        }
    }

    /// The error for a line that is too long, whose rest is passed over.
    fn pass_over(&mut self) -> Result<Error> {
        let error = self.bad(format!("it is longer than {} MiB", MAX_LINE >> 20))?;
        while !self.line.is_empty() && !self.line.ends_with(b"\n") {
            self.line.clear();
            self.source.line(&mut self.line, MAX_LINE)?;
        }
        Ok(error)
    }

    fn bad(&self, message: String) -> Result<Error> {
        Ok(Error::BadRecord { path: self.input.path.clone(), line: self.number()?, message })
    }

    /// The number of the line that was read last.
    fn number(&self) -> Result<u64> {
        Ok(self.source.lines()? + u64::from(!self.line.ends_with(b"\n")))
    }
}

/// Whether `meta`, an object or the JSON of one, names another part of the data set than `config`.
pub(super) fn names_another(meta: &Value, config: &str) -> bool {
    let parsed;
    let meta = match meta {
        Value::String(json) => {
            parsed = serde_json::from_str(json).unwrap_or(Value::Null);
            &parsed
        }
        meta => meta,
    };
    meta.get("config").and_then(Value::as_str).is_some_and(|named| named != config)
}

/// Takes the text of an object, and its `meta` where that matters, and looks at nothing else. Of a field that is there twice the
/// last counts, as everywhere.
struct Fields<'a>(Rules<'a>);

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Option<Record>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with the string {:?}", self.0.field)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let Rules { field, config, .. } = self.0;
        let (mut found, mut other) = (None, false);
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            if key == field {
                found = match map.next_value()? {
                    Value::String(text) => Some(Record::Text(text)),
                    // As good as none.
                    Value::Null => None,
                    _ => return Err(A::Error::custom(format!("the field {field:?} is not a string"))),
                };
            } else if let Some(config) = config.filter(|_| key == META) {
                other = names_another(&map.next_value()?, config);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(if other { Some(Record::Other) } else { found })
    }
}
