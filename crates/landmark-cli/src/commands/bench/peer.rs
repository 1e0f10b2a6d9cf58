//! The peer: a script in Python that stays alive and answers a line of JSON with a line of JSON, so that ours and theirs take
//! turns in one run.

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::Value;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The flags that choose the peer.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
pub struct Flags {
    /// The Python to run PyTorch with
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    /// Measure ours alone
    #[arg(long)]
    no_peer: bool,
}

/// Who ours is compared with.
pub enum Peer {
    /// PyTorch, running.
    Torch(Torch),
    /// Nobody; what to write where they would stand.
    Absent(&'static str),
}

/// The process.
pub struct Torch {
    version: String,
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// What a script says.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    /// It is ready; its version of PyTorch.
    Torch(String),
    /// PyTorch cannot be imported.
    Error(String),
    /// How long each call took.
    Seconds(Vec<f64>),
}

impl Flags {
    /// Starts a script on as many threads as ours has. Where that cannot be, says on stderr how to get PyTorch.
    pub fn start(&self, script: &str, arguments: &[String]) -> anyhow::Result<Peer> {
        if self.no_peer {
            return Ok(Peer::Absent("not asked"));
        }
        let python = self.python.display();
        let missing = |why: String| {
            eprintln!(
                "torch missing, ours is measured alone: {why}. `pip install torch`, name another Python with --python PATH, or \
                 pass --no_peer"
            );
            Ok(Peer::Absent("torch missing"))
        };
        let mut command = Command::new(&self.python);
        command.arg("-c").arg(script).arg(rayon::current_num_threads().to_string()).args(arguments);
        let mut child = match command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() {
            Err(error) if error.kind() == ErrorKind::NotFound => return missing(format!("there is no {python}")),
            child => child.with_context(|| format!("--python {python}: cannot run it"))?,
        };
        let requests = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut torch = Torch { version: String::new(), child, requests, answers };
        match torch.answer().with_context(|| format!("--python {python}"))? {
            Answer::Torch(version) => {
                torch.version = version;
                Ok(Peer::Torch(torch))
            }
            Answer::Error(why) => missing(format!("{python} says: {why}")),
            Answer::Seconds(_) => bail!("--python {python}: an answer before the first question"),
        }
    }
}

impl Peer {
    /// What to call it.
    pub fn name(&self) -> String {
        match self {
            Self::Torch(torch) => format!("torch {}", torch.version),
            Self::Absent(why) => (*why).into(),
        }
    }

    /// The seconds of the calls that `request` describes; none if there is no peer.
    pub fn seconds(&mut self, request: &Value) -> anyhow::Result<Vec<f64>> {
        let Self::Torch(torch) = self else { return Ok(Vec::new()) };
        // That the process is gone shows in its answer.
        let _ = writeln!(torch.requests, "{request}");
        match torch.answer()? {
            Answer::Seconds(seconds) => Ok(seconds),
            _ => bail!("the peer in Python did not answer what it was asked"),
        }
    }
}

impl Torch {
    fn answer(&mut self) -> anyhow::Result<Answer> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() {
            bail!("the peer in Python ended without an answer ({})", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("the peer in Python said {:?}", line.trim_end()))
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
