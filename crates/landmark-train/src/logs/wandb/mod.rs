//! A run of Weights & Biases, written offline as their own library does: `wandb sync` sends it later, and their library reads it.
//!
//! | file of `offline-run-DATE_TIME-ID/` | holds |
//! |---|---|
//! | `run-ID.wandb` | everything: configuration, history, summary (module `log`) |
//! | `files/config.yaml` | the configuration |
//! | `files/wandb-summary.json` | the last value of everything that was logged |
//! | `files/wandb-metadata.json` | machine and command line |
//! | `files/output.log` | what the run said |

mod log;
mod record;

use super::flat;
use crate::error::{Error, Result};
use crate::files;
use log::Log;
use record::{Exit, Header, History, Item, Kind, Output, Record, Step, Table, Timestamp, VersionInfo};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Where the experiment's folder says which W&B run is its own.
const POINTER: &str = "wandb-run.json";

/// What a W&B run is called and where it lies.
#[derive(Clone, Debug)]
pub struct Wandb {
    /// The project.
    pub project: String,
    /// The name that is shown.
    pub name: String,
    /// The folder of all runs; their own library's is `./wandb`.
    pub folder: PathBuf,
    /// What the configuration has beside the settings.
    pub config: Map<String, Value>,
}

/// Which W&B run is the experiment's.
#[derive(Serialize, Deserialize)]
struct Pointer {
    id: String,
    folder: PathBuf,
}

/// A run, open for appending.
pub(super) struct Run {
    folder: PathBuf,
    log: Log,
    /// Rows may come in parts: what belongs to the newest step is here until the next one.
    row: Option<(usize, Map<String, Value>)>,
    summary: Map<String, Value>,
    begun: Instant,
    /// Seconds that the run had taken when this process took it up.
    earlier: f64,
}

impl Run {
    /// The run of an experiment, to go on after `iteration`; a new one if there is none.
    pub(super) fn open(
        options: &Wandb,
        settings: &impl Serialize,
        experiment: &Path,
        iteration: usize,
        note: &mut dyn FnMut(String),
    ) -> Result<Self> {
        let path = experiment.join(POINTER);
        if iteration > 0 && path.exists() {
            let text = fs::read(&path).map_err(Error::io("read", &path))?;
            let pointer: Pointer = serde_json::from_slice(&text).map_err(|error| Error::format(&path, error))?;
            if pointer.folder.is_dir() {
                return Self::resume(&pointer, iteration);
            }
            note(format!("W&B: {} is gone; this part of the run gets one of its own", pointer.folder.display()));
        }
        let (run, pointer) = Self::create(options, settings)?;
        let text = serde_json::to_vec_pretty(&pointer).map_err(|error| Error::format(&path, error))?;
        files::write(&path, &text)?;
        note(format!("W&B: offline run in {}; wandb sync sends it", run.folder.display()));
        Ok(run)
    }

    fn create(options: &Wandb, settings: &impl Serialize) -> Result<(Self, Pointer)> {
        let started = jiff::ZonedDateTime::now();
        let id = id(&started.to_string());
        let name = format!("offline-run-{}-{id}", started.strftime("%Y%m%d_%H%M%S"));
        fs::create_dir_all(&options.folder).map_err(Error::io("create", &options.folder))?;
        let base = options.folder.canonicalize().map_err(Error::io("find", &options.folder))?;
        let folder = base.join(&name);
        let files_folder = folder.join("files");
        fs::create_dir_all(&files_folder).map_err(Error::io("create", &files_folder))?;
        let mut config = flat(settings);
        config.extend(options.config.clone());
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        let mut log = Log::create(&folder.join(format!("run-{id}.wandb")))?;
        let producer = concat!("landmark/", env!("CARGO_PKG_VERSION")).to_string();
        let version_info = Some(VersionInfo { producer, min_consumer: "0.12.0".into() });
        log.append(Record::of(Kind::Header(Header { version_info })))?;
        log.append(Record::of(Kind::Run(Box::new(record::Run {
            run_id: id.clone(),
            project: options.project.clone(),
            config: Some(Table { update: config.iter().map(|(key, value)| item(key, value)).collect() }),
            display_name: options.name.clone(),
            host: host.clone(),
            start_time: Some(timestamp()),
        }))))?;
        files::write(&files_folder.join("config.yaml"), yaml(&config).as_bytes())?;
        let metadata = json!({
            "os": format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
            "program": std::env::current_exe().unwrap_or_default(),
            "args": std::env::args().skip(1).collect::<Vec<_>>(),
            "host": host,
            "startedAt": started.timestamp().to_string(),
            "root": std::env::current_dir().unwrap_or_default(),
            "cpu_count": std::thread::available_parallelism().map_or(1, usize::from),
            "version": env!("CARGO_PKG_VERSION"),
        });
        write_json(&files_folder.join("wandb-metadata.json"), &metadata)?;
        write_json(&files_folder.join("wandb-summary.json"), &json!({}))?;
        latest(&base, &name);
        let run =
            Self { folder: folder.clone(), log, row: None, summary: Map::new(), begun: Instant::now(), earlier: 0. };
        Ok((run, Pointer { id, folder }))
    }

    fn resume(pointer: &Pointer, iteration: usize) -> Result<Self> {
        let (mut summary, mut earlier) = (Map::new(), 0.);
        let path = pointer.folder.join(format!("run-{}.wandb", pointer.id));
        // Sent before, it is to be sent again: with this mark `wandb sync` would pass it over.
        let mark = pointer.folder.join(format!("run-{}.wandb.synced", pointer.id));
        if mark.exists() {
            fs::remove_file(&mark).map_err(Error::io("remove", &mark))?;
        }
        let log = Log::reopen(&path, |record| match &record.kind {
            Some(Kind::Exit(_)) => false,
            Some(Kind::History(row)) if row.step.as_ref().is_some_and(|step| step.num > iteration as i64) => false,
            Some(Kind::History(row)) => {
                for item in &row.item {
                    let value = serde_json::from_str(&item.value_json).unwrap_or(Value::Null);
                    summary.insert(item.nested_key.join("."), value);
                }
                earlier = summary.get("_runtime").and_then(Value::as_f64).unwrap_or(earlier);
                true
            }
            _ => true,
        })?;
        Ok(Self { folder: pointer.folder.clone(), log, row: None, summary, begun: Instant::now(), earlier })
    }

    /// Adds values to the row of a step. Steps come in order.
    pub(super) fn add<'v>(&mut self, step: usize, values: impl IntoIterator<Item = (&'v str, Value)>) -> Result<()> {
        if self.row.as_ref().is_some_and(|(of, _)| *of != step) {
            self.write_row()?;
        }
        let (_, row) = self.row.get_or_insert_with(|| (step, Map::new()));
        row.extend(values.into_iter().map(|(key, value)| (key.to_string(), value)));
        Ok(())
    }

    /// Notes a line that the run said.
    pub(super) fn say(&mut self, line: &str) -> Result<()> {
        let path = self.folder.join("files/output.log");
        let file = File::options().append(true).create(true).open(&path);
        file.and_then(|mut file| writeln!(file, "{line}")).map_err(Error::io("write", &path))?;
        let line = format!("{line}\n");
        self.log.append(Record::of(Kind::Output(Output { output_type: 0, timestamp: Some(timestamp()), line })))
    }

    /// All of it reaches the disk, the summary so far among it: a run that is killed later can be sent with what it had.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.write_row()?;
        let update = self.summary.iter().map(|(key, value)| nested(key, value)).collect();
        self.log.append(Record::of(Kind::Summary(Table { update })))?;
        write_json(&self.folder.join("files/wandb-summary.json"), &Value::Object(self.summary.clone()))?;
        self.log.sync()
    }

    /// The process ends with this exit code.
    pub(super) fn exit(&mut self, exit_code: i32) -> Result<()> {
        let runtime = self.runtime() as i32;
        self.log.append(Record::of(Kind::Exit(Exit { exit_code, runtime })))?;
        self.log.sync()
    }

    fn runtime(&self) -> f64 {
        self.earlier + self.begun.elapsed().as_secs_f64()
    }

    fn write_row(&mut self) -> Result<()> {
        let Some((step, mut row)) = self.row.take() else { return Ok(()) };
        row.insert("_step".into(), step.into());
        row.insert("_runtime".into(), self.runtime().into());
        row.insert("_timestamp".into(), seconds().into());
        let item = row.iter().map(|(key, value)| nested(key, value)).collect();
        self.log.append(Record::of(Kind::History(History { item, step: Some(Step { num: step as i64 }) })))?;
        self.summary.extend(row);
        Ok(())
    }
}

fn item(key: &str, value: &Value) -> Item {
    Item { key: key.into(), nested_key: Vec::new(), value_json: value.to_string() }
}

/// As their library writes history and summary: a name is the path of a value.
fn nested(key: &str, value: &Value) -> Item {
    Item { key: String::new(), nested_key: vec![key.into()], value_json: value.to_string() }
}

/// `files/config.yaml`. JSON values are YAML too.
fn yaml(config: &Map<String, Value>) -> String {
    let fields = config.iter().map(|(key, value)| format!("{}:\n    value: {value}\n", json!(key)));
    fields.collect()
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| Error::format(path, error))?;
    files::write(path, &text)
}

/// Eight letters and digits that no other run has.
fn id(started: &str) -> String {
    let digest = Sha256::digest(format!("{started} {} {:?}", std::process::id(), SystemTime::now()));
    digest.iter().take(8).map(|byte| b"0123456789abcdefghijklmnopqrstuvwxyz"[*byte as usize % 36] as char).collect()
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0., |time| time.as_secs_f64())
}

fn timestamp() -> Timestamp {
    let seconds = seconds();
    Timestamp { seconds: seconds as i64, nanos: (seconds.fract() * 1e9) as i32 }
}

/// Their library keeps a link to the newest run. It is a convenience: where links cannot be made there is none.
fn latest(base: &Path, name: &str) {
    #[cfg(unix)]
    {
        let link = base.join("latest-run");
        if !link.exists() || link.is_symlink() {
            let _ = fs::remove_file(&link);
            let _ = std::os::unix::fs::symlink(name, &link);
        }
    }
    #[cfg(not(unix))]
    let _ = (base, name);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Settings;
    use landmark_models::gpt::GptConfig;

    #[test]
    fn a_resumed_run_is_one_run_without_the_steps_after_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let options = Wandb {
            project: "memory-llm".into(),
            name: "a/b".into(),
            folder: folder.path().join("wandb"),
            config: [("dataset".to_string(), json!("pg19"))].into_iter().collect(),
        };
        let settings = Settings::of(GptConfig::default());
        let open = |iteration| Run::open(&options, &settings, folder.path(), iteration, &mut |_| {}).unwrap();
        let mut run = open(0);
        for step in 1..=5usize {
            run.add(step, [("iter", step.into()), ("train/loss", (1. / step as f64).into())]).unwrap();
            if step == 3 {
                run.add(step, [("val/loss", 0.5.into())]).unwrap();
                run.sync().unwrap();
            }
        }
        run.sync().unwrap();
        run.exit(255).unwrap();
        let mut run = open(3);
        run.add(4, [("train/loss", 7.into())]).unwrap();
        run.say("said").unwrap();
        run.sync().unwrap();
        run.exit(0).unwrap();

        let runs: Vec<PathBuf> = fs::read_dir(&options.folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let [run] = &runs.iter().filter(|path| !path.is_symlink()).collect::<Vec<_>>()[..] else { panic!("{runs:?}") };
        let name = run.file_name().unwrap().to_string_lossy().into_owned();
        let id = name.rsplit('-').next().unwrap();
        assert!(name.starts_with("offline-run-20") && id.len() == 8, "{name}");
        let records = log::records(&run.join(format!("run-{id}.wandb")));
        let mut rows = Vec::new();
        let mut kinds = Vec::new();
        for record in &records {
            kinds.push(match record.kind.as_ref().unwrap() {
                Kind::Header(_) => "header",
                Kind::Run(run) => {
                    let config = &run.config.as_ref().unwrap().update;
                    let value = |key: &str| &config.iter().find(|item| item.key == key).unwrap().value_json;
                    assert_eq!((value("n_embd").as_str(), value("dataset").as_str()), ("1024", "\"pg19\""));
                    assert_eq!((run.run_id.as_str(), run.project.as_str()), (id, "memory-llm"));
                    "run"
                }
                Kind::History(row) => {
                    let value = |key: &str| row.item.iter().find(|item| item.nested_key == [key]);
                    rows.push((row.step.as_ref().unwrap().num, value("train/loss").unwrap().value_json.clone()));
                    assert_eq!(value("val/loss").is_some(), rows.last().unwrap().0 == 3);
                    "history"
                }
                Kind::Summary(_) => "summary",
                Kind::Output(_) => "output",
                Kind::Exit(_) => "exit",
            });
        }
        let expected = "header run history history history summary output history summary exit";
        assert_eq!(kinds.join(" "), expected);
        assert_eq!(rows.iter().map(|row| row.0).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(rows[3].1, "7");
        let summary: Value = serde_json::from_slice(&fs::read(run.join("files/wandb-summary.json")).unwrap()).unwrap();
        assert_eq!(
            (&summary["train/loss"], &summary["val/loss"], &summary["_step"]),
            (&json!(7), &json!(0.5), &json!(4))
        );
        for file in ["config.yaml", "wandb-metadata.json", "output.log"] {
            assert!(run.join("files").join(file).is_file(), "{file}");
        }
    }
}
