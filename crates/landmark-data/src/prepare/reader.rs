//! All inputs as one sequence of steps, from any earlier place on.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::OnError;
use super::layout::{Division, Format, Input, Set};
use super::pieces::{Pieces, split};
use super::progress::is_bad_input;
use super::records::{Record, Records};
use super::source::Source;
use super::table::Table;
use crate::{Error, Result};

/// Something to do with the output.
pub(super) struct Step {
    pub(super) set: Set,
    pub(super) action: Action,
    /// The place after this step; `None` within a record, where reading cannot start.
    pub(super) place: Option<Place>,
}

pub(super) enum Action {
    /// More text of the current document.
    Text(String),
    /// The document is complete.
    End,
    /// Something is bad: what there is of the current document, maybe nothing, does not count.
    Skip(Error),
    /// A record belongs to another part of the data set.
    Other,
}

/// A place between two steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// The number of the input.
    input: usize,
    /// Where in it: bytes of its text, or rows of a table.
    offset: u64,
    /// Whether that is after its start. (A range of a file starts where it starts, whatever the offset says.)
    inside: bool,
    /// The set of the document that this place is within.
    document: Option<Set>,
    /// Bytes of all inputs, as they lie on the disk, that are used up.
    pub(super) disk: u64,
}

/// What reading needs to know besides the inputs.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    /// The field with the text.
    pub(super) field: &'a str,
    /// The part of the data set that is read: records whose `meta` names another `config` are passed over.
    pub(super) config: Option<&'a str>,
    pub(super) on_error: OnError,
}

/// Calls `out` with the steps of `inputs` after `place`, until it says no.
pub(super) fn read(inputs: &[Input], rules: Rules<'_>, place: Place, out: &mut impl FnMut(Step) -> bool) -> Result<()> {
    let before: u64 = inputs[..place.input.min(inputs.len())].iter().map(Input::len).sum();
    let mut done = before;
    for (number, input) in inputs.iter().enumerate().skip(place.input) {
        let start = if number == place.input { place } else { Place::default() };
        done += input.len();
        let end = Place { input: number + 1, disk: done, ..Place::default() };
        let mut reader =
            InputReader { input, number, rules, before: done - input.len(), end, set: None, out: &mut *out };
        match reader.read(start) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => {
                // What is left of this input cannot be read.
                let error = reader.skip(error)?;
                let set = reader.set.unwrap_or(Set::Train);
                if !out(Step { set, action: Action::Skip(error), place: Some(end) }) {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

struct InputReader<'a, F> {
    input: &'a Input,
    number: usize,
    rules: Rules<'a>,
    /// Bytes of the inputs before this one.
    before: u64,
    /// The place after this input.
    end: Place,
    /// The set of the current document, once it is known.
    set: Option<Set>,
    out: &'a mut F,
}

impl<F: FnMut(Step) -> bool> InputReader<'_, F> {
    /// Reads the input; `false` where `out` wants no more.
    fn read(&mut self, start: Place) -> Result<bool> {
        if self.input.range.is_empty() {
            return Err(Error::EmptyFile { path: self.input.path.clone() });
        }
        let offset = if start.inside { start.offset } else { 0 };
        match self.input.format {
            Format::Text => {
                self.set = start.document;
                let pieces = Pieces::new(Source::open(self.input, offset)?);
                self.text(pieces)
            }
            Format::Lines => {
                let mut records = Records::new(self.input, self.rules, Source::open(self.input, offset)?);
                self.records(start.inside, || {
                    let next = records.next();
                    (next, records.offset(), records.disk())
                })
            }
            Format::Table => {
                let mut table = Table::open(self.input, self.rules, offset)?;
                self.records(start.inside, || {
                    let next = table.next();
                    (next, table.offset(), table.disk())
                })
            }
        }
    }

    fn text(&mut self, mut pieces: Pieces) -> Result<bool> {
        while let Some(text) = pieces.next()? {
            let set = *self.set.get_or_insert_with(|| self.input.division.set(&text));
            let place = Place { document: Some(set), ..self.place(pieces.offset(), pieces.disk()) };
            if !(self.out)(Step { set, action: Action::Text(text), place: Some(place) }) {
                return Ok(false);
            }
        }
        match self.set {
            Some(set) => Ok((self.out)(Step { set, action: Action::End, place: Some(self.end) })),
            // An archive of nothing.
            None => Err(Error::EmptyFile { path: self.input.path.clone() }),
        }
    }

    fn records(&mut self, mut any: bool, mut next: impl FnMut() -> (Result<Option<Record>>, u64, u64)) -> Result<bool> {
        loop {
            let (next, offset, disk) = next();
            let place = Some(self.place(offset, disk));
            let more = match next {
                Ok(Some(Record::Other)) => (self.out)(Step { set: Set::Train, action: Action::Other, place }),
                Ok(Some(Record::Text(text))) => {
                    let set = self.input.division.set(&text);
                    split(text)
                        .into_iter()
                        .all(|text| (self.out)(Step { set, action: Action::Text(text), place: None }))
                        && (self.out)(Step { set, action: Action::End, place })
                }
                Ok(None) if !any => return Err(Error::EmptyFile { path: self.input.path.clone() }),
                Ok(None) => return Ok(true),
                // The next record can be read. (A table without the column has none.)
                Err(error @ (Error::BadRecord { .. } | Error::MissingField { .. } | Error::InvalidUtf8 { .. })) => {
                    let action = Action::Skip(self.skip(error)?);
                    (self.out)(Step { set: Set::Train, action, place })
                }
                Err(error) => return Err(error),
            };
            if !more {
                return Ok(false);
            }
            any = true;
        }
    }

    fn place(&self, offset: u64, disk: u64) -> Place {
        let disk = self.before + disk.min(self.input.len());
        Place { input: self.number, offset, inside: true, document: None, disk }
    }

    /// The error again where bad input is left out and this is about the input; otherwise reading ends with it.
    fn skip(&self, error: Error) -> Result<Error> {
        if self.rules.on_error == OnError::Skip && is_bad_input(&error) { Ok(error) } else { Err(error) }
    }
}

impl Division {
    fn set(self, text: &str) -> Set {
        match self {
            Self::Fixed(set) => set,
            Self::Hashed(0) => Set::Train,
            Self::Hashed(threshold) => {
                let mut head = [0; 8];
                head.copy_from_slice(&Sha256::digest(text)[..8]);
                if u64::from_be_bytes(head) < threshold { Set::Validation } else { Set::Train }
            }
        }
    }
}
