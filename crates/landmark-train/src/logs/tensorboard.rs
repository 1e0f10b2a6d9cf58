//! TensorBoard's event files, `events.out.tfevents.*` in the experiment's folder: records of TensorFlow's TFRecord format, each
//! an `Event` message.
//!
//! | bytes | field |
//! |---|---|
//! | 8 | length, little-endian |
//! | 4 | masked CRC-32C of the length |
//! | length | the message |
//! | 4 | masked CRC-32C of the message |
//!
//! Every process that trains writes a file of its own. One that goes on from a checkpoint begins with a `SessionLog`, by which
//! readers forget the steps after the checkpoint that an earlier file has.

use crate::error::{Error, Result};
use prost::Message;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const PREFIX: &str = "events.out.tfevents.";

/// `tensorflow/core/util/event.proto`, of which this is what we write.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

const SESSION_START: i32 = 1;

/// `tensorflow/core/framework/summary.proto`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(oneof = "Content", tags = "2, 8")]
    content: Option<Content>,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    Scalar(f32),
    #[prost(message, tag = "8")]
    Tensor(Strings),
}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

/// A `TensorProto` of strings.
#[derive(Clone, PartialEq, Message)]
struct Strings {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    values: Vec<Vec<u8>>,
}

const DT_STRING: i32 = 7;

#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(int64, tag = "1")]
    size: i64,
}

/// An event file, open for appending.
pub(crate) struct Writer {
    path: PathBuf,
    file: File,
}

impl Writer {
    /// A new file for the steps after `iteration`.
    pub(crate) fn create(folder: &Path, iteration: usize) -> Result<Self> {
        let earlier = earlier(folder)?;
        // Readers take the files in the order of their names.
        let seconds = (now() as u64).max(earlier.map_or(0, |earlier| earlier + 1));
        let host = gethostname::gethostname().to_string_lossy().replace(['/', '\\'], "-");
        let path = folder.join(format!("{PREFIX}{seconds:010}.{host}.{}.0", std::process::id()));
        let file = File::options().append(true).create_new(true).open(&path).map_err(Error::io("create", &path))?;
        let mut writer = Self { path, file };
        writer.append(0, What::FileVersion("brain.Event:2".into()))?;
        if earlier.is_some() {
            writer.append(iteration + 1, What::SessionLog(SessionLog { status: SESSION_START }))?;
        }
        Ok(writer)
    }

    /// Appends numbers by name.
    pub(crate) fn scalars(&mut self, step: usize, scalars: &[(&str, f64)]) -> Result<()> {
        let value = |&(tag, value): &(&str, f64)| SummaryValue {
            tag: tag.into(),
            content: Some(Content::Scalar(value as f32)),
            metadata: None,
        };
        self.append(step, What::Summary(Summary { value: scalars.iter().map(value).collect() }))
    }

    /// Appends a text.
    pub(crate) fn text(&mut self, step: usize, tag: &str, text: &str) -> Result<()> {
        // Shown as Markdown: indented, it stays as it is.
        let text: String = text.lines().map(|line| format!("    {line}\n")).collect();
        let shape = Shape { dim: vec![Dim { size: 1 }] };
        let tensor = Strings { dtype: DT_STRING, shape: Some(shape), values: vec![text.into_bytes()] };
        let plugin_data = Some(PluginData { plugin_name: "text".into() });
        let value = SummaryValue {
            tag: tag.into(),
            content: Some(Content::Tensor(tensor)),
            metadata: Some(Metadata { plugin_data }),
        };
        self.append(step, What::Summary(Summary { value: vec![value] }))
    }

    /// All of it reaches the disk.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }

    fn append(&mut self, step: usize, what: What) -> Result<()> {
        let event = Event { wall_time: now(), step: step as i64, what: Some(what) };
        self.file.write_all(&record(&event.encode_to_vec())).map_err(Error::io("write", &self.path))
    }
}

/// The newest number in the names of the folder's event files.
fn earlier(folder: &Path) -> Result<Option<u64>> {
    let number = |name: &str| name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok();
    let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    Ok(entries.filter_map(|entry| number(&entry.ok()?.file_name().to_string_lossy())).max())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0., |time| time.as_secs_f64())
}

/// A message in its frame.
fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(message.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(message);
    record.extend(masked_crc(message).to_le_bytes());
    record
}

/// Masked, so that the checksum of data that holds checksums is no trouble.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of a file, with the frames checked.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[..12 + length + 4], record(&rest[12..12 + length]));
            events.push(Event::decode(&rest[12..12 + length]).unwrap());
            rest = &rest[12 + length + 4..];
        }
        events
    }

    #[test]
    fn frames_are_tensorflows() {
        // As every file of TensorFlow's begins: a record of 24 bytes.
        assert_eq!(record(&[0; 24])[..12], [24, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn a_resumed_run_declares_the_steps_after_its_checkpoint_void() {
        let folder = tempfile::tempdir().unwrap();
        for (first, resumed_at) in [(1, 0), (4, 3)] {
            let mut writer = Writer::create(folder.path(), resumed_at).unwrap();
            for step in first..first + 5 {
                writer.scalars(step, &[("train/loss", 1. / step as f64), ("lr", 0.5)]).unwrap();
            }
            writer.text(first + 4, "sample", "It was\ndark").unwrap();
        }
        let mut paths: Vec<PathBuf> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let [first, second] = &paths[..] else { panic!("{paths:?}") };
        let (first, second) = (read(first), read(second));
        assert!(matches!(&first[0].what, Some(What::FileVersion(version)) if version == "brain.Event:2"));
        let Some(What::Summary(summary)) = &first[1].what else { panic!("{first:?}") };
        assert_eq!((first[1].step, summary.value[0].tag.as_str()), (1, "train/loss"));
        assert_eq!(summary.value[1].content, Some(Content::Scalar(0.5)));
        assert!(matches!(&second[1].what, Some(What::SessionLog(log)) if log.status == 1) && second[1].step == 4);
        let Some(What::Summary(summary)) = &second.last().unwrap().what else { panic!("{second:?}") };
        let Some(Content::Tensor(text)) = &summary.value[0].content else { panic!("{summary:?}") };
        assert_eq!(text.values, [b"    It was\n    dark\n"]);
    }
}
