//! What a passkey test found, for people and for programs.

use super::prompt::number;
use crate::plot::{self, Axes, Curve};
use crate::reading::grouped;
use landmark_inference::Setting;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::Path;

/// A prompt and its answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Its number.
    pub trial: u64,
    /// How far into the prompt the key was told, of 1.
    pub depth: f64,
    /// The key.
    pub key: u64,
    /// What the model said.
    pub answer: String,
    /// How long the prompt was read; its share of those that were read side by side.
    pub seconds: f64,
    /// Tokens that were read in that time, if it was not the whole prompt: a fork of another goes on from what that has read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
}

impl Trial {
    fn is_right(&self) -> bool {
        number(&self.answer) == Some(self.key)
    }
}

/// The prompts of a length, read in one way.
pub struct Cell {
    /// Tokens of a prompt.
    pub length: usize,
    /// How it was read.
    pub setting: Setting,
    /// If it was read into sessions: which landmarks were scored when they were asked.
    pub session: Option<&'static str>,
    /// The prompts.
    pub trials: Vec<Trial>,
}

impl Cell {
    fn right(&self) -> usize {
        self.trials.iter().filter(|trial| trial.is_right()).count()
    }

    /// The share of right answers.
    fn accuracy(&self) -> f64 {
        self.right() as f64 / self.trials.len() as f64
    }

    /// Tokens read a second.
    fn tok_per_s(&self) -> f64 {
        let seconds: f64 = self.trials.iter().map(|trial| trial.seconds).sum();
        let tokens = self.trials.iter().map(|trial| trial.tokens.unwrap_or(self.setting.eval_seq_length));
        tokens.sum::<usize>() as f64 / seconds.max(1e-9)
    }

    /// How it was read, in a few words.
    fn way(&self) -> String {
        if let Some(way) = self.session {
            return format!("session, {way}");
        }
        match (self.setting.lm_cache.as_str(), self.setting.cache_topk, &self.setting.cache_selection_method) {
            ("mem", Some(k), Some(method)) => format!("{k} blocks, {method}"),
            ("none", ..) => "the last window alone".into(),
            (kind, ..) => kind.into(),
        }
    }

    /// A line of the table; its length is told where it is a new one.
    pub fn line(&self, is_new: bool) -> String {
        let length = if is_new { grouped(self.length) } else { String::new() };
        let (right, count) = (self.right(), self.trials.len());
        let (share, speed) = match count {
            0 => ("-".into(), "-".into()),
            _ => (format!("{right}/{count} = {:.1} %", 100. * self.accuracy()), grouped(self.tok_per_s() as usize)),
        };
        format!("{length:>12}  {:<30}  {share:>18}  {speed:>10}\n", self.way())
    }
}

/// All of a test.
pub struct Results {
    checkpoint: String,
    device: String,
    dtype: String,
    filler: Option<String>,
    keys: usize,
    seed: u64,
    /// Length by length, and way by way in each.
    pub cells: Vec<Cell>,
}

impl Results {
    /// Nothing yet.
    pub fn new(checkpoint: &Path, device: &str, dtype: &str, filler: Option<&Path>, keys: usize, seed: u64) -> Self {
        let (checkpoint, filler) = (checkpoint.display().to_string(), filler.map(|path| path.display().to_string()));
        Self { checkpoint, device: device.into(), dtype: dtype.into(), filler, keys, seed, cells: Vec::new() }
    }

    /// What stands over the lines.
    pub fn header() -> String {
        format!("{:>12}  {:<30}  {:>18}  {:>10}\n", "tokens", "each token reads", "right", "tok/s")
    }

    /// All figures.
    pub fn json(&self) -> anyhow::Result<String> {
        let cell = |cell: &Cell| {
            serde_json::json!({
                "length": cell.length,
                "way": cell.way(),
                "setting": cell.setting,
                "session": cell.session,
                "right": cell.right(),
                "accuracy": (!cell.trials.is_empty()).then(|| cell.accuracy()),
                "tok_per_s": (!cell.trials.is_empty()).then(|| cell.tok_per_s()),
                "trials": cell.trials,
            })
        };
        let all = serde_json::json!({
            "checkpoint": self.checkpoint,
            "device": self.device,
            "dtype": self.dtype,
            "filler": self.filler,
            "keys": self.keys,
            "seed": self.seed,
            "results": self.cells.iter().map(cell).collect::<Vec<_>>(),
        });
        Ok(serde_json::to_string_pretty(&all)? + "\n")
    }

    /// A line for each prompt. An answer is quoted as RFC 4180 has it.
    pub fn csv(&self) -> String {
        let mut text = String::from("length,trial,lm_cache,top_k,selection,depth,key,answer,right,seconds,session\n");
        for Cell { length, setting, session, trials } in &self.cells {
            let top_k = setting.cache_topk.map(|k| k.to_string()).unwrap_or_default();
            let session = session.unwrap_or_default();
            let (lm_cache, selection) = (&setting.lm_cache, setting.cache_selection_method.as_deref().unwrap_or(""));
            for trial in trials {
                let Trial { trial: number, depth, key, answer, seconds, .. } = trial;
                let (answer, right) = (answer.replace('"', "\"\""), trial.is_right());
                let line = format!(
                    "{length},{number},{lm_cache},{top_k},{selection},{depth:.4},{key},\"{answer}\",{right},{seconds:.3},{session}"
                );
                writeln!(text, "{line}").expect("a string takes it");
            }
        }
        text
    }

    /// A curve for each way.
    pub fn draw(&self, path: &Path) -> anyhow::Result<()> {
        let mut curves: Vec<Curve> = Vec::new();
        for cell in self.cells.iter().filter(|cell| !cell.trials.is_empty()) {
            let point = (cell.length as f64, cell.accuracy());
            match curves.iter_mut().find(|curve| curve.name == cell.way()) {
                Some(curve) => curve.points.push(point),
                None => curves.push(Curve { name: cell.way(), points: vec![point] }),
            }
        }
        for curve in &mut curves {
            curve.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        let title = match self.keys {
            1 => "Pass keys found".into(),
            keys => format!("One of {keys} named keys found"),
        };
        let axes = Axes { title: &title, x: ("tokens", true), y: "share", y_range: Some(-0.02..1.02) };
        plot::write(path, &axes, &curves)
    }
}
