//! Parquet: a column of strings, read a few rows at a time.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;
use serde_json::Value;

use super::layout::Input;
use super::reader::Rules;
use super::records::{META, Record, names_another};
use crate::{Error, Result};

/// Rows that are read at once. Their page is in memory in any case.
const ROWS: usize = 64;

/// Reads the texts of a column.
pub(super) struct Table<'a> {
    input: &'a Input,
    rules: Rules<'a>,
    file: SerializedFileReader<File>,
    text: Column,
    /// The descriptions of the rows, where they matter and there are some.
    meta: Option<Column>,
    /// The next group of rows.
    group: usize,
    /// Rows that were returned.
    row: u64,
    rows: u64,
}

/// A column of strings.
struct Column {
    number: usize,
    /// The level of a value that is there. At 0, rows cannot lack one.
    level: i16,
    reader: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Rows that were read and not yet returned, the next one last.
    waiting: Vec<Option<ByteArray>>,
}

impl<'a> Table<'a> {
    /// The rows of `input` from number `row` on.
    pub(super) fn open(input: &'a Input, rules: Rules<'a>, row: u64) -> Result<Self> {
        let path = &input.path;
        let file = File::open(path).map_err(Error::io(path))?;
        let file = guarded(|| SerializedFileReader::new(file)).map_err(|source| damaged(path, 0, source))?;
        let metadata = file.metadata().file_metadata();
        let schema = metadata.schema_descr();
        let field = rules.field;
        let text = match Column::find(schema, field) {
            Some(Ok(column)) => column,
            Some(Err(NotStrings)) => {
                let message = format!("the column {field:?} does not hold strings");
                return Err(Error::BadRecord { path: path.clone(), line: 1, message });
            }
            None => return Err(Error::MissingField { path: path.clone(), line: 1, field: field.to_owned() }),
        };
        let meta = rules.config.and_then(|_| Column::find(schema, META)).and_then(Result::ok);
        let rows = u64::try_from(metadata.num_rows()).unwrap_or(0);
        let mut table = Self { input, rules, file, text, meta, group: 0, row: 0, rows };
        table.pass_over(row)?;
        Ok(table)
    }

    /// The next row; `None` at the end. After an error about a row the next one can be asked for.
    pub(super) fn next(&mut self) -> Result<Option<Record>> {
        while self.text.waiting.is_empty() {
            if !self.read()? {
                return Ok(None);
            }
        }
        let text = self.text.waiting.pop().flatten();
        let meta = self.meta.as_mut().and_then(|column| column.waiting.pop()).flatten();
        self.row += 1;
        let meta =
            meta.and_then(|value| String::from_utf8(value.data().to_vec()).ok()).map_or(Value::Null, Value::String);
        if self.rules.config.is_some_and(|config| names_another(&meta, config)) {
            return Ok(Some(Record::Other));
        }
        let (path, line) = (self.input.path.clone(), self.row);
        let Some(text) = text else {
            return Err(Error::MissingField { path, line, field: self.rules.field.to_owned() });
        };
        match String::from_utf8(text.data().to_vec()) {
            Ok(text) => Ok(Some(Record::Text(text))),
            Err(error) => {
                let message = format!("not valid UTF-8 at byte {}", error.utf8_error().valid_up_to());
                Err(Error::BadRecord { path, line, message })
            }
        }
    }

    /// The number of rows that were returned.
    pub(super) fn offset(&self) -> u64 {
        self.row
    }

    /// Bytes of the file that are used up, about.
    pub(super) fn disk(&self) -> u64 {
        (u128::from(self.input.len()) * u128::from(self.row) / u128::from(self.rows.max(1))) as u64
    }

    /// Reads the next rows; `false` at the end of the file.
    fn read(&mut self) -> Result<bool> {
        let Self { input, file, text, meta, group, row, .. } = self;
        let damaged = |source| damaged(&input.path, *row, source);
        if text.reader.is_none() {
            if *group == file.num_row_groups() {
                return Ok(false);
            }
            let columns = std::iter::once(&mut *text).chain(meta.as_mut());
            guarded(|| {
                let reader = file.get_row_group(*group)?;
                columns.into_iter().try_for_each(|column| column.open(&*reader))
            })
            .map_err(damaged)?;
            *group += 1;
        }
        let rows = text.read().map_err(damaged)?;
        if let Some(meta) = meta
            && meta.read().map_err(damaged)? != rows
        {
            return Err(damaged(ParquetError::General("columns of different lengths".into())));
        }
        if rows == 0 {
            // The group's end; the next call opens the next one.
            text.reader = None;
        }
        Ok(true)
    }

    fn pass_over(&mut self, rows: u64) -> Result<()> {
        // Whole groups without reading them.
        while self.group < self.file.num_row_groups() {
            let len = u64::try_from(self.file.metadata().row_group(self.group).num_rows()).unwrap_or(0);
            if self.row + len > rows {
                break;
            }
            self.row += len;
            self.group += 1;
        }
        while self.row < rows {
            match self.next() {
                Ok(None) => break,
                // It was seen before.
                Ok(Some(_)) | Err(Error::BadRecord { .. } | Error::MissingField { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A column holds something else.
struct NotStrings;

impl Column {
    fn find(schema: &SchemaDescriptor, name: &str) -> Option<Result<Self, NotStrings>> {
        let number = (0..schema.num_columns()).find(|&i| schema.column(i).path().parts() == [name])?;
        let description = schema.column(number);
        if description.physical_type() != parquet::basic::Type::BYTE_ARRAY || description.max_rep_level() > 0 {
            return Some(Err(NotStrings));
        }
        Some(Ok(Self { number, level: description.max_def_level(), reader: None, waiting: Vec::new() }))
    }

    fn open(&mut self, group: &dyn RowGroupReader) -> Result<(), ParquetError> {
        self.reader = match group.get_column_reader(self.number)? {
            ColumnReader::ByteArrayColumnReader(reader) => Some(reader),
            _ => return Err(ParquetError::General("a column of another type".into())),
        };
        Ok(())
    }

    /// Reads the next rows of the group into `waiting`; how many.
    fn read(&mut self) -> Result<usize, ParquetError> {
        let Some(reader) = &mut self.reader else { return Ok(0) };
        let (mut values, mut levels) = (Vec::new(), Vec::new());
        let levels_if = (self.level > 0).then_some(&mut levels);
        let (rows, _, _) = guarded(|| reader.read_records(ROWS, levels_if, None, &mut values))?;
        let mut values = values.into_iter();
        self.waiting = match self.level {
            0 => values.map(Some).collect(),
            there => levels.into_iter().map(|level| if level == there { values.next() } else { None }).collect(),
        };
        self.waiting.reverse();
        if self.waiting.len() == rows { Ok(rows) } else { Err(ParquetError::General("rows without a value".into())) }
    }
}

/// Calls the library, which panics on some damaged files. What it was called on is not used again after an error.
fn guarded<T>(call: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, ParquetError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| Err(ParquetError::General("it makes no sense".into())))
}

fn damaged(path: &Path, line: u64, source: ParquetError) -> Error {
    Error::Archive { path: path.to_path_buf(), line, source: source.into() }
}
