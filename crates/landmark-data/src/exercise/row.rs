//! One exercise: what is planted, and how far apart.

use super::fact::{self, Fact, VALUE};
use super::{Draw, Exercises};
use crate::Result;

/// The tokens of a row, one more than its inputs, and the weight of each as a target.
pub(super) struct Row {
    pub ids: Vec<u32>,
    pub weights: Vec<f32>,
}

/// The most facts, and the most questions.
const MOST: usize = 5;
/// The share of exercises with a description of the task in front.
const TASKS: f64 = 0.25;
/// The share whose filler is one piece of text again and again.
const REPEATED: f64 = 0.1;
/// The share of facts that stand in a line of their own.
const LINES: f64 = 0.5;

/// A piece of text to be planted.
type Piece = Row;

impl Row {
    fn new() -> Self {
        Self { ids: Vec::new(), weights: Vec::new() }
    }

    fn push(&mut self, ids: &[u32], weight: f32) {
        self.ids.extend_from_slice(ids);
        self.weights.resize(self.ids.len(), weight);
    }

    fn append(&mut self, piece: &Piece) {
        self.ids.extend_from_slice(&piece.ids);
        self.weights.extend_from_slice(&piece.weights);
    }

    pub(super) fn draw(exercises: &Exercises, draw: &mut Draw) -> Result<Self> {
        let tokens = exercises.blocks.tokens() + 1;
        // An exercise that fills the window has nothing to skip: drawn again, and simpler after some attempts.
        for attempt in 0.. {
            let plan = Plan::draw(exercises, draw, attempt < 8)?;
            let planted = plan.len();
            if planted + 2 * exercises.blocks.len() <= tokens || attempt > 16 && planted <= tokens {
                return plan.lay(exercises, draw, tokens - planted);
            }
        }
        unreachable!("the window was checked against the longest exercise")
    }
}

/// What is planted.
struct Plan {
    task: Piece,
    statements: Vec<Piece>,
    questions: Vec<Piece>,
    asked_again: bool,
}

impl Plan {
    /// `rich`: perhaps several facts and questions.
    fn draw(exercises: &Exercises, draw: &mut Draw, rich: bool) -> Result<Self> {
        let options = &exercises.options;
        let several = rich && draw.chance(options.several_facts);
        let facts = Fact::several(
            if several { 2 + draw.below(MOST - 1).max(draw.below(MOST - 1)) } else { 1 },
            &exercises.words,
            draw,
        );
        let statements = facts.iter().map(|fact| statement(exercises, draw, fact)).collect::<Result<_>>()?;
        let asked_again = rich && draw.chance(options.asked_again);
        let asked = match (asked_again, facts.len()) {
            (true, 1) => vec![0; 2 + draw.below(MOST - 1)],
            (false, 1) => vec![0],
            // Each fact once at most: one that was asked for would be answered by its last answer.
            (again, facts) => {
                let count = if again { facts } else { 1 + draw.below(2) };
                draw.order(facts, count)
            }
        };
        let questions = asked.into_iter().map(|i| question(exercises, draw, &facts[i])).collect::<Result<_>>()?;
        let mut task = Piece::new();
        if rich && draw.chance(TASKS) {
            task.push(&exercises.tokenizer.encode(&format!("{}\n", fact::task(draw)))?, 1.);
        }
        Ok(Self { task, statements, questions, asked_again })
    }

    fn len(&self) -> usize {
        let pieces = self.statements.iter().chain(&self.questions);
        self.task.ids.len() + pieces.map(|piece| piece.ids.len()).sum::<usize>()
    }

    /// The tokens of filler before each statement and each question, of `free`; what is left is the tail.
    fn gaps(&self, draw: &mut Draw, free: usize, block: usize) -> Vec<usize> {
        let (facts, planted) = (self.statements.len(), self.statements.len() + self.questions.len());
        let between = |cuts: Vec<usize>, end: usize| -> Vec<usize> {
            let ends = cuts.iter().copied().chain([end]);
            ends.scan(0, |from, to| Some(to - std::mem::replace(from, to))).collect()
        };
        if self.asked_again {
            let before = draw.below(free * 2 / 5 + 1);
            let tail = draw.below(60).min(free - before);
            let rest = free - before - tail;
            // Squares of random numbers lie close together near 0: the first gaps are short.
            let mut cuts: Vec<usize> =
                (0..planted - 2).map(|_| (draw.fraction().powi(2) * rest as f64) as usize).collect();
            cuts.sort_unstable();
            return std::iter::once(before).chain(between(cuts, rest)).collect();
        }
        let tail = if draw.chance(0.7) { draw.below(60) } else { draw.below(free / 2 + 1) };
        // Mostly at least a block between the facts and the question, so that it must look back through a landmark.
        let away = if draw.chance(0.9) { block } else { 0 };
        let (tail, away) = if tail + away > free { (0, 0) } else { (tail, away) };
        let rest = free - tail - away;
        let mut gaps = between(draw.cuts(planted - 1, rest), rest);
        if let [.., first, second] = &mut gaps[facts - 1..]
            && self.questions.len() == 2
        {
            // The second of two questions follows the first.
            let kept = (*second).min(draw.below(20));
            *first += *second - kept;
            *second = kept;
        }
        gaps[facts] += away;
        gaps
    }

    fn lay(self, exercises: &Exercises, draw: &mut Draw, free: usize) -> Result<Row> {
        let gaps = self.gaps(draw, free, exercises.blocks.len());
        let filler = filler(exercises, draw, free);
        let mut rest = &filler[..];
        let mut row = self.task;
        for (piece, gap) in self.statements.iter().chain(&self.questions).zip(gaps) {
            let (text, later) = rest.split_at(gap);
            row.push(text, 1.);
            row.append(piece);
            rest = later;
        }
        row.push(rest, 1.);
        Ok(row)
    }
}

/// Running text of the corpus.
fn filler(exercises: &Exercises, draw: &mut Draw, n: usize) -> Vec<u32> {
    let corpus = exercises.plain.stream().tokens();
    // The corpus is longer than a window: the batches were checked for that.
    let from = draw.below((corpus.len() as usize).saturating_sub(n).max(1)) as u64;
    let mut text = Vec::with_capacity(n);
    let repeated = draw.chance(REPEATED);
    let period = if repeated { (12 + draw.below(48)).min(n) } else { n };
    text.extend((from..from + period as u64).filter_map(|i| corpus.get(i)));
    for i in text.len()..n {
        text.push(text[i - period]);
    }
    text
}

/// A fact, told: its value's digits have no loss the first time, since nobody can guess them.
pub(super) fn statement(exercises: &Exercises, draw: &mut Draw, fact: &Fact) -> Result<Piece> {
    let text = fact.statement(draw);
    let text = match draw.chance(LINES) {
        true => format!("\n{text}\n"),
        false => format!(" {text}"),
    };
    let mut piece = Piece::new();
    plant(exercises, &mut piece, &text, &fact.value, [0., 1.])?;
    Ok(piece)
}

/// A question and its answer.
pub(super) fn question(exercises: &Exercises, draw: &mut Draw, fact: &Fact) -> Result<Piece> {
    let mut piece = Piece::new();
    let line = draw.of(&["\n", "\n", "\n", "\n\n", " "]);
    piece.push(&exercises.tokenizer.encode(&(line.to_string() + &fact.question(draw)))?, 1.);
    let weight = exercises.options.answer_weight as f32;
    // The full stop is part of the answer: without it a model never learns where a number ends.
    for part in [&format!(" {}", fact.value), "."] {
        piece.push(&exercises.tokenizer.encode(part)?, weight);
    }
    Ok(piece)
}

/// Adds a text with values in it. `weights` are those of the value's tokens, the first time and later.
fn plant(exercises: &Exercises, piece: &mut Piece, text: &str, value: &str, weights: [f32; 2]) -> Result<()> {
    let encode = |text: &str| exercises.tokenizer.encode(text);
    let mut parts = text.split(VALUE).peekable();
    let mut times = 0;
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            piece.push(&encode(part)?, 1.);
            break;
        }
        // The space before a number belongs to it, as tokenizers cut it.
        let (part, number) = match part.strip_suffix(' ') {
            Some(part) => (part, format!(" {value}")),
            None => (part, value.to_string()),
        };
        piece.push(&encode(part)?, 1.);
        piece.push(&encode(&number)?, weights[times.min(1)]);
        times += 1;
    }
    Ok(())
}

/// As many tokens as a window must have: some exercise of one fact, and a block to skip.
pub(super) fn longest(exercises: &Exercises) -> Result<usize> {
    let tokens = exercises.tokenizer.encode(&fact::longest(&exercises.words))?.len();
    Ok(tokens + exercises.blocks.len())
}
