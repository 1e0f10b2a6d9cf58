//! The settings of the paper's tables (arXiv 2305.16300, Tables 1 and 2).

use clap::ValueEnum;
use landmark_inference::{CacheFlags, LmCache, NoneOr, SelectionMethod};
use serde::{Deserialize, Serialize};

/// `--grid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GridName {
    /// Dense, Transformer-XL and landmark models over lengths, chunks, blocks and k
    #[value(name = "table1")]
    Table1,
    /// The three ways to select blocks
    #[value(name = "table2")]
    Table2,
}

/// Which model a row is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// No cache.
    Dense,
    /// Transformer-XL's cache.
    Xl,
    /// The landmark cache.
    Landmark,
}

/// A row of a table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Whose it is.
    pub method: Method,
    /// Tokens of a sequence.
    pub eval_seq_length: usize,
    /// Tokens that are read at once.
    pub chunk: usize,
    /// With Xl: tokens in the cache. With Landmark: blocks.
    pub cache: Option<usize>,
    /// With Landmark: blocks that a token reads.
    pub top_k: Option<usize>,
    /// With Landmark: who shares them.
    pub selection: SelectionMethod,
}

impl GridName {
    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Table1 => "table1",
            Self::Table2 => "table2",
        }
    }

    /// The rows, in the paper's order. In Table 1 each length ends with a row that is not the paper's: the landmark model
    /// without retrieval, k = 0, to which the others compare.
    pub fn rows(self) -> Vec<Row> {
        match self {
            Self::Table1 => vec![
                dense(512),
                dense(360),
                landmark(512, 250, 10, 2),
                without(512, 250),
                xl(2048, 256, 256),
                landmark(2048, 250, 40, 2),
                landmark(2048, 350, 40, 2),
                landmark(2048, 300, 40, 3),
                landmark(2048, 250, 20, 4),
                landmark(2048, 250, 40, 4),
                without(2048, 250),
                xl(4096, 256, 256),
                landmark(4096, 250, 40, 4),
                landmark(4096, 250, 80, 2),
                landmark(4096, 250, 80, 4),
                without(4096, 250),
            ],
            Self::Table2 => {
                let rows = [landmark(2048, 250, 40, 2), landmark(2048, 250, 40, 4), landmark(4096, 250, 80, 4)];
                [SelectionMethod::PerTokenAndHead, SelectionMethod::MaxOverTokens, SelectionMethod::MaxOverHeads]
                    .into_iter()
                    .flat_map(|selection| rows.map(|row| Row { selection, ..row }))
                    .collect()
            }
        }
    }
}

fn dense(length: usize) -> Row {
    let selection = SelectionMethod::PerTokenAndHead;
    Row { method: Method::Dense, eval_seq_length: length, chunk: length, cache: None, top_k: None, selection }
}

fn xl(eval_seq_length: usize, chunk: usize, tokens: usize) -> Row {
    Row { method: Method::Xl, eval_seq_length, chunk, cache: Some(tokens), ..dense(chunk) }
}

fn landmark(eval_seq_length: usize, chunk: usize, blocks: usize, k: usize) -> Row {
    let (cache, top_k) = (Some(blocks), Some(k));
    Row { method: Method::Landmark, eval_seq_length, chunk, cache, top_k, ..dense(chunk) }
}

/// Nothing but the chunk and the unfinished block before it.
fn without(eval_seq_length: usize, chunk: usize) -> Row {
    landmark(eval_seq_length, chunk, 1, 0)
}

impl Row {
    /// The flags that read so.
    pub fn flags(&self) -> CacheFlags {
        let (kind, mem_cache_size): (_, NoneOr<usize>) = match self.method {
            Method::Dense => (LmCache::None, None),
            Method::Xl => (LmCache::Kv, self.cache),
            Method::Landmark => (LmCache::Mem, self.cache),
        };
        CacheFlags {
            lm_cache: Some(kind),
            cache_topk: self.top_k,
            mem_cache_size,
            cache_selection_method: (self.method == Method::Landmark).then_some(self.selection),
            mid_length: Some(self.chunk),
            ..CacheFlags::default()
        }
    }

    /// Whether it is one of ours: a landmark model without retrieval.
    pub fn is_without_retrieval(&self) -> bool {
        self.top_k == Some(0)
    }

    /// In a few words.
    pub fn label(&self) -> String {
        let Self { eval_seq_length: length, chunk, .. } = self;
        match (self.method, self.cache, self.top_k) {
            (Method::Dense, ..) => format!("dense, {length}"),
            (Method::Xl, cache, _) => format!("transformer-xl, {length}, chunk {chunk}, cache {}", cache.unwrap_or(0)),
            (Method::Landmark, _, Some(0)) => format!("landmark, {length}, chunk {chunk}, no retrieval"),
            (Method::Landmark, blocks, k) => {
                let (blocks, k) = (blocks.unwrap_or(0), k.unwrap_or(0));
                let selection = match self.selection {
                    SelectionMethod::PerTokenAndHead => String::new(),
                    other => format!(", {}", other.name()),
                };
                format!("landmark, {length}, chunk {chunk}, {blocks} blocks, k {k}{selection}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Section 4 of the method: (evaluation length, chunk, blocks, k).
    #[test]
    fn the_rows_are_the_papers() {
        let of = |grid: GridName, method| -> Vec<(usize, usize, usize, usize)> {
            let rows = grid.rows().into_iter().filter(|row| row.method == method && !row.is_without_retrieval());
            rows.map(|row| (row.eval_seq_length, row.chunk, row.cache.unwrap_or(0), row.top_k.unwrap_or(0))).collect()
        };
        assert_eq!(of(GridName::Table1, Method::Dense), [(512, 512, 0, 0), (360, 360, 0, 0)]);
        assert_eq!(of(GridName::Table1, Method::Xl), [(2048, 256, 256, 0), (4096, 256, 256, 0)]);
        let mut landmark = of(GridName::Table1, Method::Landmark);
        landmark.sort();
        let mut expected = vec![
            (512, 250, 10, 2),
            (2048, 250, 40, 2),
            (2048, 350, 40, 2),
            (2048, 300, 40, 3),
            (2048, 250, 20, 4),
            (2048, 250, 40, 4),
            (4096, 250, 40, 4),
            (4096, 250, 80, 2),
            (4096, 250, 80, 4),
        ];
        expected.sort();
        assert_eq!(landmark, expected);
        let three = [(2048, 250, 40, 2), (2048, 250, 40, 4), (4096, 250, 80, 4)];
        assert_eq!(of(GridName::Table2, Method::Landmark), [three, three, three].concat());
    }
}
