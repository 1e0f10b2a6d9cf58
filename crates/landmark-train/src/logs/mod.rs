//! What a run tells of itself while it trains: `metrics.jsonl`, TensorBoard's event files, and a run of Weights & Biases.
//!
//! A resumed run goes on from its checkpoint, and so do all three: what was written after the checkpoint is cut off, or
//! declared void where TensorBoard may be reading it.

mod metrics;
mod tensorboard;
mod wandb;

use crate::error::Result;
use crate::trainer::{Evaluation, Step};
use metrics::Metrics;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::Duration;
pub use wandb::Wandb;

/// The logs of a run, open for appending.
pub(crate) struct Logs {
    metrics: Metrics,
    tensorboard: tensorboard::Writer,
    wandb: Option<wandb::Run>,
}

impl Logs {
    /// Opens the logs of an experiment to go on after `iteration`. `note` is told what a user may want to know.
    pub(crate) fn open(
        folder: &Path,
        iteration: usize,
        settings: &impl Serialize,
        wandb: Option<&Wandb>,
        note: &mut dyn FnMut(String),
    ) -> Result<Self> {
        Ok(Self {
            metrics: Metrics::open(&folder.join("metrics.jsonl"), iteration)?,
            tensorboard: tensorboard::Writer::create(folder, iteration)?,
            wandb: wandb.map(|options| wandb::Run::open(options, settings, folder, iteration, note)).transpose()?,
        })
    }

    /// A step was made.
    pub(crate) fn step(&mut self, iteration: usize, step: &Step, took: Duration) -> Result<()> {
        let &Step { loss, lr, grad_norm, tokens } = step;
        let tokens_per_second = tokens as f64 / took.as_secs_f64().max(1e-9);
        let mut line = json!({"iteration": iteration, "loss": loss, "lr": lr, "tokens_per_second": tokens_per_second});
        let mut scalars = vec![("train/loss", loss), ("lr", lr), ("tokens_per_second", tokens_per_second)];
        if let Some(norm) = grad_norm {
            line["grad_norm"] = norm.into();
            scalars.push(("grad_norm", norm));
        }
        self.scalars(iteration, &line, &scalars)
    }

    /// The model was evaluated.
    pub(crate) fn evaluation(&mut self, iteration: usize, evaluation: &Evaluation, took: Duration) -> Result<()> {
        let &Evaluation { loss, accuracy } = evaluation;
        let perplexity = evaluation.perplexity();
        let line = json!({
            "iteration": iteration,
            "val_loss": loss,
            "val_perplexity": perplexity,
            "val_accuracy": accuracy,
            "seconds": took.as_secs_f64(),
        });
        let scalars = [("val/loss", loss), ("val/perplexity", perplexity), ("val/acc", accuracy)];
        self.scalars(iteration, &line, &scalars)?;
        self.say(&format!("{iteration} [val] loss={loss:.3} pp={perplexity:.2} acc={accuracy:.3}"))
    }

    /// The model wrote something.
    pub(crate) fn sample(&mut self, iteration: usize, text: &str) -> Result<()> {
        self.metrics.append(&json!({"iteration": iteration, "sample": text}))?;
        self.tensorboard.text(iteration, "sample", text)?;
        self.wandb.as_mut().map_or(Ok(()), |run| run.add(iteration, [("sample", text.into())]))?;
        self.say(&format!("{iteration} [sample] {text}"))
    }

    fn say(&mut self, line: &str) -> Result<()> {
        self.wandb.as_mut().map_or(Ok(()), |run| run.say(line))
    }

    /// The names are those of the reference's `wandb.log`; ours beside them.
    fn scalars(&mut self, iteration: usize, line: &Value, scalars: &[(&str, f64)]) -> Result<()> {
        self.metrics.append(line)?;
        self.tensorboard.scalars(iteration, scalars)?;
        let row = scalars.iter().map(|&(name, value)| (name, value.into()));
        let row = row.chain([("iter", iteration.into())]);
        self.wandb.as_mut().map_or(Ok(()), |run| run.add(iteration, row))
    }

    /// All of it reaches the disk: before a checkpoint that counts on it.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.metrics.sync()?;
        self.tensorboard.sync()?;
        self.wandb.as_mut().map_or(Ok(()), wandb::Run::sync)
    }

    /// The process ends its part of the run, with this exit code.
    pub(crate) fn close(&mut self, exit_code: i32) -> Result<()> {
        self.sync()?;
        self.wandb.as_mut().map_or(Ok(()), |run| run.exit(exit_code))
    }
}

/// Settings as one flat table, as the reference's `vars(args)`: an optimizer, say, becomes its name and its numbers.
fn flat(settings: &impl Serialize) -> Map<String, Value> {
    fn put(table: &mut Map<String, Value>, key: String, value: Value) {
        match value {
            Value::Object(fields) => {
                // A choice with numbers of its own is an object of one object.
                if let (1, Some((name, Value::Object(_)))) = (fields.len(), fields.iter().next()) {
                    table.insert(key, name.clone().into());
                }
                for (name, value) in fields {
                    match value {
                        Value::Object(fields) => fields.into_iter().for_each(|(key, value)| put(table, key, value)),
                        value => put(table, name, value),
                    }
                }
            }
            value => {
                table.insert(key, value);
            }
        }
    }
    let mut table = Map::new();
    if let Ok(Value::Object(fields)) = serde_json::to_value(settings) {
        fields.into_iter().for_each(|(key, value)| put(&mut table, key, value));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Process, Settings};
    use landmark_models::gpt::GptConfig;

    #[test]
    fn settings_are_one_table_with_the_references_names() {
        let process = Process::TransformerXl { total_sequence_length: 2048, mem_cache_size: 256 };
        let settings = Settings { optimization_process: process, ..Settings::of(GptConfig::default()) };
        let table = flat(&settings);
        let expected = [
            ("model", json!("landmark")),
            ("n_embd", json!(1024)),
            ("lr", json!(2e-3)),
            ("opt", json!("adamw")),
            ("beta2", json!(0.95)),
            ("optimization_process", json!("transformer_xl")),
            ("total_sequence_length", json!(2048)),
            ("scheduler", json!("cos")),
            ("group_dropout", Value::Null),
        ];
        for (key, value) in expected {
            assert_eq!(table[key], value, "{key}");
        }
        assert!(table.values().all(|value| !value.is_object()));
        let sgd = Settings { opt: crate::Method::Sgd, ..settings };
        assert_eq!(flat(&sgd)["opt"], "sgd");
    }
}
