//! The text of documents. Those that are no plain text are taken apart by libraries that were written for documents of good faith; so that happens in a
//! process of its own, which may take so much time and memory and no more, and whose end, whatever it is, ends nothing else.

use crate::Error;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes of text that a document may have.
const MOST_TEXT: u64 = 64 << 20;
/// How long a document may take, and the memory that it may take.
const TIME: Duration = Duration::from_secs(30);
const MEMORY: u64 = 2 << 30;
/// A line of a document in HTML is a paragraph of it, however long.
const WIDTH: usize = 100_000;

/// What a document is that is no plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Document {
    /// `text/html`, in UTF-8.
    Html,
    /// `application/pdf`.
    Pdf,
}

/// Why a document has no text for us.
#[derive(Debug, PartialEq, Eq)]
pub enum NoText {
    /// It cannot be taken apart, or not with what it may take of time and memory.
    Unreadable,
    /// It is more text than one may have.
    TooLong,
    /// The process cannot be started.
    NoProcess(String),
}

impl Document {
    fn name(self) -> &'static str {
        match self {
            Self::Html => "html",
            Self::Pdf => "pdf",
        }
    }

    /// What [`Document::name`] names.
    fn of(name: &str) -> Option<Self> {
        [Self::Html, Self::Pdf].into_iter().find(|document| document.name() == name)
    }

    /// The text of one, by a process that `program` starts when it is given the document's kind.
    pub async fn text(self, program: &[OsString], bytes: &[u8]) -> Result<String, NoText> {
        let refuse = |reason: std::io::Error| NoText::NoProcess(reason.to_string());
        let (name, arguments) = program.split_first().ok_or(NoText::NoProcess("no program is named".into()))?;
        let mut command = tokio::process::Command::new(name);
        command.args(arguments).arg(self.name()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.kill_on_drop(true).spawn().map_err(refuse)?;
        let (Some(mut to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(NoText::NoProcess("its input and output are not there".into()));
        };
        let mut text = Vec::new();
        let work = async {
            let send = async {
                // One that ends before it has read all says so by its status.
                let _ = to.write_all(bytes).await;
                drop(to);
            };
            let mut from = from.take(MOST_TEXT + 1);
            let ((), received) = tokio::join!(send, from.read_to_end(&mut text));
            received.map_err(refuse)?;
            if text.len() as u64 > MOST_TEXT {
                return Err(NoText::TooLong);
            }
            let status = child.wait().await.map_err(refuse)?;
            if status.success() { Ok(()) } else { Err(NoText::Unreadable) }
        };
        tokio::time::timeout(TIME, work).await.map_err(|_| NoText::Unreadable)??;
        String::from_utf8(text).map_err(|_| NoText::Unreadable)
    }
}

/// What that process does: reads a document of kind `name` from standard input, and writes its text to standard output.
///
/// # Errors
/// Another kind, and a document that cannot be taken apart. One that makes a library panic, or takes more than it may, ends the process.
pub fn convert(name: &str) -> Result<(), Error> {
    let refuse = |reason: String| Error::Document { reason };
    let document = Document::of(name).ok_or_else(|| refuse("expected html or pdf".into()))?;
    limit().map_err(|error| refuse(error.to_string()))?;
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).map_err(|error| refuse(error.to_string()))?;
    let text = match document {
        Document::Html => html2text::config::with_decorator(html2text::render::TrivialDecorator::new())
            .raw_mode(true)
            .allow_width_overflow()
            .string_from_read(&bytes[..], WIDTH)
            .map_err(|error| refuse(error.to_string()))?,
        Document::Pdf => pdf_extract::extract_text_from_mem(&bytes).map_err(|error| refuse(error.to_string()))?,
    };
    std::io::stdout().write_all(text.trim().as_bytes()).map_err(|error| refuse(error.to_string()))
}

/// Bounds what this process may take. Where a system has no such bounds, the server's clock is the only one.
#[cfg(unix)]
fn limit() -> std::io::Result<()> {
    use rlimit::Resource;
    let seconds = TIME.as_secs();
    Resource::CPU.set(seconds, seconds)?;
    Resource::AS.set(MEMORY, MEMORY)?;
    // An end by a signal leaves no file.
    Resource::CORE.set(0, 0)
}

#[cfg(not(unix))]
fn limit() -> std::io::Result<()> {
    Ok(())
}
