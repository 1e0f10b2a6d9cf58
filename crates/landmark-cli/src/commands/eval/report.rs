//! What an evaluation found, for people and for programs.

use super::Model;
use super::measure::Measured;
use super::text::Text;
use crate::files;
use crate::reading::grouped;
use anyhow::Context;
use landmark_inference::machine::peak_memory;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::Path;

/// All figures of an evaluation: what `--json` writes, and what a grid keeps of a cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The folder of the checkpoint.
    pub checkpoint: String,
    /// The kind of model.
    pub model: String,
    /// Its parameters.
    pub parameters: usize,
    /// The data set's name, or the text's file.
    pub dataset: String,
    /// The part of the data set.
    pub split: Option<String>,
    /// Bytes of memory that the process had at most, where the system tells. A grid's is that of all its cells so far.
    pub peak_bytes: Option<u64>,
    #[serde(flatten)]
    pub measured: Measured,
}

impl Report {
    /// Says what was measured of what.
    pub fn new(model: &Model, text: &Text, measured: Measured) -> Self {
        Self {
            checkpoint: model.folder.display().to_string(),
            model: model.weights.kind(),
            parameters: model.weights.parameters(),
            dataset: text.name.clone(),
            split: text.split.map(|split| split.name().into()),
            peak_bytes: peak_memory(),
            measured,
        }
    }

    /// For the terminal.
    pub fn table(&self) -> String {
        let m = &self.measured;
        let part = self.split.as_ref().map_or(String::new(), |split| format!(" ({split})"));
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<12}  {value}");
        };
        line("model", format!("{} ({}, {} parameters)", self.checkpoint, self.model, grouped(self.parameters)));
        let (count, length) = (grouped(m.sequences), grouped(m.setting.eval_seq_length));
        let noun = if m.sequences == 1 { "sequence" } else { "sequences" };
        line("text", format!("{}{part}: {count} {noun} of {length} tokens", self.dataset));
        line("reading", m.setting.words());
        line("perplexity", format!("{:.3}   (loss {:.4} over {} tokens)", m.perplexity, m.loss, grouped(m.tokens)));
        line("accuracy", format!("{:.2} %", 100. * m.accuracy));
        let tenths = [m.tok_per_s_first_tenth, m.tok_per_s_last_tenth].map(|rate| grouped(rate as usize));
        let rate = grouped(m.tok_per_s as usize);
        line(
            "speed",
            format!("{rate} tok/s   (first tenth {}, last tenth {}; {:.1} s)", tenths[0], tenths[1], m.seconds),
        );
        let peak = self.peak_bytes.map_or("unknown".into(), |bytes| format!("{} MB", bytes >> 20));
        line("memory", format!("{peak} at most, {} MB of it for cached blocks", m.cache_bytes >> 20));
        if let Some(share) = m.skipped_retrievals {
            line("retrievals", format!("{:.1} % saved by the context-miss token", 100. * share));
        }
        let _ = writeln!(text, "\n  position in the sequence    tokens      loss  perplexity  accuracy");
        for bin in &m.by_position {
            let range = format!("{} to {}", grouped(bin.from), grouped(bin.to - 1));
            let number = |value: Option<f64>, digits| value.map_or("-".into(), |value| format!("{value:.digits$}"));
            let _ = writeln!(
                text,
                "  {range:>24}  {:>8}  {:>8}  {:>10}  {:>8}",
                grouped(bin.tokens),
                number(bin.loss, 4),
                number(bin.perplexity, 2),
                bin.accuracy.map_or("-".into(), |share| format!("{:.2} %", 100. * share))
            );
        }
        if !m.retrieved_by_distance.is_empty() {
            let _ = writeln!(text, "\n  distance in blocks    share of the blocks that were read");
            for bin in &m.retrieved_by_distance {
                let range = match bin.from == bin.to {
                    true => grouped(bin.from),
                    false => format!("{} to {}", grouped(bin.from), grouped(bin.to)),
                };
                let bar = "#".repeat((40. * bin.share).round() as usize);
                let _ = writeln!(text, "  {range:>18}  {:>6.2} %  {bar}", 100. * bin.share);
            }
        }
        text
    }
}

/// Settings and means, a line for each evaluation.
pub fn csv<'r>(reports: impl IntoIterator<Item = &'r Report>) -> String {
    let mut text = String::from(
        "checkpoint,model,dataset,split,eval_seq_length,mid_length,lm_cache,mem_cache_size,mem_cache_freq,cache_topk,\
         cache_selection_method,rem_cutoff,sequences,tokens,loss,perplexity,accuracy,tok_per_s,tok_per_s_first_tenth,\
         tok_per_s_last_tenth,cache_bytes,peak_bytes\n",
    );
    for report in reports {
        let (m, s) = (&report.measured, &report.measured.setting);
        let or_empty = |value: Option<String>| value.unwrap_or_default();
        let cells = [
            report.checkpoint.clone(),
            report.model.clone(),
            report.dataset.clone(),
            or_empty(report.split.clone()),
            s.eval_seq_length.to_string(),
            s.mid_length.to_string(),
            s.lm_cache.clone(),
            or_empty(s.mem_cache_size.map(|n| n.to_string())),
            or_empty(s.mem_cache_freq.map(|n| n.to_string())),
            or_empty(s.cache_topk.map(|n| n.to_string())),
            or_empty(s.cache_selection_method.clone()),
            or_empty(s.rem_cutoff.map(|x| x.to_string())),
            m.sequences.to_string(),
            m.tokens.to_string(),
            m.loss.to_string(),
            m.perplexity.to_string(),
            m.accuracy.to_string(),
            format!("{:.1}", m.tok_per_s),
            format!("{:.1}", m.tok_per_s_first_tenth),
            format!("{:.1}", m.tok_per_s_last_tenth),
            m.cache_bytes.to_string(),
            or_empty(report.peak_bytes.map(|n| n.to_string())),
        ];
        text += &(cells.map(|cell| quoted(&cell)).join(",") + "\n");
    }
    text
}

/// As CSV has a cell.
pub fn quoted(cell: &str) -> String {
    match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.into(),
    }
}

/// Writes a file whole or not at all.
pub fn write(path: &Path, flag: &str, contents: &str) -> anyhow::Result<()> {
    files::write(path, contents.as_bytes()).with_context(|| format!("{flag} {}: cannot write it", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_quoted_where_csv_needs_it() {
        assert_eq!(["a b", "a,b", "say \"a\""].map(quoted), ["a b", "\"a,b\"", "\"say \"\"a\"\"\""]);
    }
}
