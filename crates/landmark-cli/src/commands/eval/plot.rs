//! What the plots of evaluations show.

use super::grid::{Cell, Table};
use super::measure::PositionBin;
use super::report::Report;
use crate::plot::{Axes, Curve, write};
use std::path::Path;

/// Perplexity by position.
pub fn positions(path: &Path, report: &Report) -> anyhow::Result<()> {
    let m = &report.measured;
    let title = format!("{}: perplexity {:.2}", report.dataset, m.perplexity);
    by_position(path, &title, &[curve(m.setting.words(), &m.by_position)])
}

/// Blocks that were read by distance.
pub fn distances(path: &Path, report: &Report) -> anyhow::Result<()> {
    let bins = &report.measured.retrieved_by_distance;
    let points = bins.iter().map(|bin| ((bin.from as f64 * bin.to as f64).sqrt(), 100. * bin.share)).collect();
    let title = format!("{}: how far the blocks are that were read", report.dataset);
    let axes = Axes {
        title: &title,
        x: ("distance in blocks", true),
        y: "% of the blocks, a point for each doubling",
        y_range: None,
    };
    write(path, &axes, &[Curve { name: report.measured.setting.words(), points }])
}

/// Perplexity by position in one column of a table: the dense row of the largest window and the rows of the longest sequences.
/// Nothing if none of them is finished.
pub fn grid(path: &Path, table: &Table, column: usize) -> anyhow::Result<()> {
    let longest = table.rows.iter().map(|(row, _)| row.eval_seq_length).max().unwrap_or(0);
    let dense = table.rows.iter().find(|(row, _)| row.cache.is_none()).map_or(0, |(row, _)| row.eval_seq_length);
    let curves: Vec<Curve> = table
        .rows
        .iter()
        .filter(|(row, _)| row.eval_seq_length == if row.cache.is_none() { dense } else { longest })
        .filter_map(|(row, cells)| match &cells[column] {
            Cell::Done(report) => Some(curve(row.label(), &report.measured.by_position)),
            _ => None,
        })
        .collect();
    if curves.is_empty() {
        return Ok(());
    }
    by_position(path, &format!("{} ({})", table.datasets[column], table.split), &curves)
}

fn by_position(path: &Path, title: &str, curves: &[Curve]) -> anyhow::Result<()> {
    write(path, &Axes { title, x: ("position in the sequence", false), y: "perplexity", y_range: None }, curves)
}

fn curve(name: String, bins: &[PositionBin]) -> Curve {
    let middle = |bin: &PositionBin| (bin.from + bin.to) as f64 / 2.;
    let points = bins.iter().filter_map(|bin| Some((middle(bin), bin.perplexity?))).collect();
    Curve { name, points }
}
