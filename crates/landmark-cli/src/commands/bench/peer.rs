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
    /// The Python that the peer runs in
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    /// Measure ours alone
    #[arg(long)]
    no_peer: bool,
}

/// Who ours is compared with.
pub enum Peer {
    /// A script, running.
    Running(Process),
    /// Nobody; what to write where they would stand.
    Absent(String),
}

/// The process.
pub struct Process {
    /// The package and its version.
    name: String,
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// What a script says.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    /// It is ready; the version of its package.
    #[serde(alias = "torch", alias = "tokenizers")]
    Ready(String),
    /// The package cannot be imported, or the request not be met.
    Error(String),
    /// How long each call took.
    Seconds(Vec<f64>),
}

impl Flags {
    /// Starts a script on as many threads as ours has. Where that cannot be, says on stderr how to get the package that it needs.
    pub fn start(&self, package: &'static str, script: &str, arguments: &[String]) -> anyhow::Result<Peer> {
        if self.no_peer {
            return Ok(Peer::Absent("not asked".into()));
        }
        let python = self.python.display();
        let missing = |why: String| {
            eprintln!(
                "{package} missing, ours is measured alone: {why}. `pip install {package}`, name another Python with --python PATH, \
                 or pass --no_peer"
            );
            Ok(Peer::Absent(format!("{package} missing")))
        };
        let mut command = Command::new(&self.python);
        command.arg("-c").arg(script).arg(rayon::current_num_threads().to_string()).args(arguments);
        let mut child = match command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() {
            Err(error) if error.kind() == ErrorKind::NotFound => return missing(format!("there is no {python}")),
            child => child.with_context(|| format!("--python {python}: cannot run it"))?,
        };
        let requests = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut process = Process { name: package.into(), child, requests, answers };
        match process.answer().with_context(|| format!("--python {python}"))? {
            Answer::Ready(version) => {
                process.name = format!("{package} {version}");
                Ok(Peer::Running(process))
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
            Self::Running(process) => process.name.clone(),
            Self::Absent(why) => why.clone(),
        }
    }

    /// The seconds of the calls that `request` describes; none if there is no peer.
    pub fn seconds(&mut self, request: &Value) -> anyhow::Result<Vec<f64>> {
        self.ask(request)?.map_err(|why| anyhow::anyhow!("the peer in Python failed: {why}"))
    }

    /// As [`Self::seconds`]; or why the peer cannot do this, and goes on.
    pub fn ask(&mut self, request: &Value) -> anyhow::Result<Result<Vec<f64>, String>> {
        let Self::Running(process) = self else { return Ok(Ok(Vec::new())) };
        // That the process is gone shows in its answer.
        let _ = writeln!(process.requests, "{request}");
        match process.answer()? {
            Answer::Seconds(seconds) => Ok(Ok(seconds)),
            Answer::Error(why) => Ok(Err(why)),
            Answer::Ready(_) => bail!("the peer in Python did not answer what it was asked"),
        }
    }
}

impl Process {
    fn answer(&mut self) -> anyhow::Result<Answer> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() {
            bail!("the peer in Python ended without an answer ({})", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("the peer in Python said {:?}", line.trim_end()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
