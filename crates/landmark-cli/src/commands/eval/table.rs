//! A grid's results as the paper lays them out, and as CSV.

use super::grid::{Cell, Table};
use super::paper::{GridName, Method, Row};
use super::report::quoted;
use landmark_inference::SelectionMethod;

/// The table in Markdown, with the reasons of refused cells below.
pub fn markdown(table: &Table) -> String {
    let columns = match table.name {
        GridName::Table1 => vec!["", "Eval. length", "Chunk", "XL cache", "# Blocks", "k", "Attention size"],
        GridName::Table2 => vec!["Per head", "Per token", "Eval. length", "k", "Blocks"],
    };
    let mut header: Vec<String> = columns.into_iter().map(String::from).collect();
    header.extend(table.datasets.iter().cloned());
    let mut lines = vec![header];
    let mut reasons: Vec<String> = Vec::new();
    for (row, cells) in &table.rows {
        let mut line = match table.name {
            GridName::Table1 => table1(row, table),
            GridName::Table2 => table2(row, table),
        };
        for cell in cells {
            line.push(match cell {
                Cell::Done(report) => format!("{:.2}", report.measured.perplexity),
                Cell::NoModel => "-".into(),
                Cell::Pending => "...".into(),
                Cell::Refused(reason) => {
                    let number = reasons.iter().position(|known| known == reason).unwrap_or_else(|| {
                        reasons.push(reason.clone());
                        reasons.len() - 1
                    });
                    format!("refused [{}]", number + 1)
                }
            });
        }
        lines.push(line);
    }
    let mut text = format!("Perplexity ({}). {}\n\n", table.split, caption(table));
    text += &aligned(&lines);
    for (number, reason) in reasons.iter().enumerate() {
        text += &format!("\n[{}] {reason}\n", number + 1);
    }
    text
}

/// How to read it.
fn caption(table: &Table) -> String {
    let block = table.landmark.map_or("a block's".into(), |(_, mem_freq)| mem_freq.to_string());
    match table.name {
        GridName::Table1 => format!(
            "As Table 1 of arXiv 2305.16300; attention size is the chunk, k times {block} tokens of a block and a landmark for each \
             block kept. Rows with k = 0 are not the paper's: the same landmark model without retrieval."
        ),
        GridName::Table2 => {
            "As Table 2 of arXiv 2305.16300; blocks is how many could be read at most while a chunk of 250 \
             tokens is read: tokens x heads x k, without the tokens or heads that share theirs."
                .into()
        }
    }
}

fn table1(row: &Row, table: &Table) -> Vec<String> {
    let dash = || String::from("-");
    let (length, chunk) = (row.eval_seq_length.to_string(), row.chunk.to_string());
    match row.method {
        Method::Dense => vec!["dense".into(), length, chunk.clone(), dash(), dash(), dash(), chunk],
        Method::Xl => {
            let cache = row.cache.unwrap_or(0);
            let size = (row.chunk + cache).to_string();
            vec!["transformer-xl".into(), length, chunk, cache.to_string(), dash(), dash(), size]
        }
        Method::Landmark if row.is_without_retrieval() => {
            vec!["landmark, no retrieval".into(), length, chunk.clone(), dash(), dash(), "0".into(), chunk]
        }
        Method::Landmark => {
            let (blocks, k) = (row.cache.unwrap_or(0), row.top_k.unwrap_or(0));
            let size = table.landmark.map_or(dash(), |(_, mem_freq)| (row.chunk + k * mem_freq + blocks).to_string());
            vec!["landmark".into(), length, chunk, dash(), blocks.to_string(), k.to_string(), size]
        }
    }
}

fn table2(row: &Row, table: &Table) -> Vec<String> {
    let heads = table.landmark.map_or("heads".into(), |(heads, _)| heads.to_string());
    let (chunk, k) = (row.chunk, row.top_k.unwrap_or(0));
    let (per_head, per_token, blocks) = match row.selection {
        SelectionMethod::PerTokenAndHead => ("yes", "yes", format!("{chunk} x {heads} x {k}")),
        SelectionMethod::MaxOverTokens => ("yes", "no", format!("{heads} x {k}")),
        SelectionMethod::MaxOverHeads => ("no", "yes", format!("{chunk} x {k}")),
    };
    vec![per_head.into(), per_token.into(), row.eval_seq_length.to_string(), k.to_string(), blocks]
}

/// A Markdown table whose columns are even in a terminal too.
fn aligned(lines: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..lines[0].len())
        .map(|c| lines.iter().map(|line| line[c].chars().count()).max().unwrap_or(0).max(3))
        .collect();
    let row = |cells: &[String]| {
        let cells = cells.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:>width$} "));
        format!("|{}|\n", cells.collect::<Vec<_>>().join("|"))
    };
    let rule: Vec<String> = widths.iter().map(|&width| format!("{}:", "-".repeat(width - 1))).collect();
    row(&lines[0]) + &row(&rule) + &lines[1..].iter().map(|line| row(line)).collect::<String>()
}

/// A line for each cell.
pub fn csv(table: &Table) -> String {
    let mut text = String::from(
        "table,method,dataset,split,eval_seq_length,mid_length,xl_cache,blocks,cache_topk,cache_selection_method,status,\
         perplexity,loss,accuracy,sequences,tokens,tok_per_s,reason\n",
    );
    for (row, cells) in &table.rows {
        for (cell, dataset) in cells.iter().zip(&table.datasets) {
            let method = match row.method {
                Method::Dense => "dense",
                Method::Xl => "xl",
                Method::Landmark => "landmark",
            };
            let number = |value: Option<usize>| value.map_or(String::new(), |value| value.to_string());
            let (xl_cache, blocks) = match row.method {
                Method::Xl => (row.cache, None),
                _ => (None, row.cache.filter(|_| !row.is_without_retrieval())),
            };
            let selection = if row.method == Method::Landmark { row.selection.name() } else { "" };
            let mut line = vec![
                table.name.name().into(),
                method.into(),
                quoted(dataset),
                table.split.into(),
                row.eval_seq_length.to_string(),
                row.chunk.to_string(),
                number(xl_cache),
                number(blocks),
                number(row.top_k),
                selection.into(),
            ];
            let (status, reason, figures) = match cell {
                Cell::Done(report) => {
                    let m = &report.measured;
                    let rate = format!("{:.1}", m.tok_per_s);
                    let counts = [m.sequences.to_string(), m.tokens.to_string(), rate];
                    let means = [m.perplexity, m.loss, m.accuracy].map(|value| value.to_string());
                    ("done", String::new(), [&means[..], &counts[..]].concat())
                }
                Cell::Refused(reason) => ("refused", reason.clone(), vec![String::new(); 6]),
                Cell::NoModel => ("no model", String::new(), vec![String::new(); 6]),
                Cell::Pending => ("pending", String::new(), vec![String::new(); 6]),
            };
            line.push(status.into());
            line.extend(figures);
            line.push(quoted(&reason));
            text += &(line.join(",") + "\n");
        }
    }
    text
}
