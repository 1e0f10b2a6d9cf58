//! Training batches that depend on nothing but a seed and an index, and the windows of an evaluation.
//!
//! # Targets
//!
//! The rule of the authors' `get_batch`. For a window of inputs `x[0..T]` that starts at position `s` of the stream:
//!
//! - the target of `x[i]` is the next position, `s + i + 1`;
//! - where that is a landmark, the target is the position after it: no model is taught to write landmarks;
//! - where `x[i]` itself is a landmark or end-of-text, there is no loss: [`IGNORE`].
//!
//! ```text
//! stream   a  b  L  c  d  L  e
//! inputs   a  b  L  c  d
//! targets  b  c  -  d  e
//! ```
//!
//! # Sampling
//!
//! Window starts are uniform over all starts whose targets exist, as the authors draw them, with replacement and independent
//! of the blocks: a window may begin anywhere within a block. The generator is ChaCha8 with the seed as its key and the
//! index as its stream number, so that batch `i` costs the same for every `i` and a run resumes from its step count alone.
//! Processes that train together take disjoint indices: `index = step * processes + rank`.
//!
//! With [whole blocks](Batches::whole_blocks) a window begins at any token, and its landmarks are counted from there: every window
//! begins with a whole block, as a text does that is read, and all rows have their landmarks at the same places.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::{Error, Landmarks, Result, Stream};

/// The target of a position that has no loss.
pub const IGNORE: u32 = u32::MAX;

/// The most ids of a batch: more is a slip of the keyboard, and would end in an allocation that no machine can make.
const MAX_BATCH: usize = 1 << 31;

/// Windows and their targets, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `rows * sequence_length` ids.
    pub inputs: Vec<u32>,
    /// As many ids, or [`IGNORE`].
    pub targets: Vec<u32>,
    /// The weight of each target in the loss, where they are not all 1.
    pub weights: Option<Vec<f32>>,
    /// The number of rows, the first ones, that are [exercises](crate::exercise).
    pub exercises: usize,
    /// The number of windows.
    pub rows: usize,
    /// The length of a window, landmarks included.
    pub sequence_length: usize,
}

/// Draws batches from a stream; the [module documentation](self) has the rules of targets and sampling.
#[derive(Clone, Debug)]
pub struct Batches {
    stream: Stream,
    batch_size: usize,
    sequence_length: usize,
    end_of_text: Option<u32>,
    blocks: Option<Blocks>,
}

impl Batches {
    /// Batches of `batch_size` windows of `sequence_length` positions, landmarks included.
    pub fn new(stream: Stream, batch_size: usize, sequence_length: usize, end_of_text: Option<u32>) -> Result<Self> {
        for (name, value) in [("batch_size", batch_size), ("sequence_length", sequence_length)] {
            if value == 0 {
                return Err(Error::Param { name, got: "0".into(), expected: "at least 1" });
            }
        }
        if batch_size.checked_mul(sequence_length).is_none_or(|ids| ids > MAX_BATCH) {
            let got = format!("{batch_size} rows of {sequence_length}");
            return Err(Error::Param { name: "batch_size", got, expected: "at most 2^31 ids in a batch" });
        }
        // One more position for the last target, and one more where that one is a landmark.
        let expected = (sequence_length as u64).saturating_add(2);
        if stream.len() < expected {
            return Err(Error::TooShort { got: stream.len(), expected });
        }
        Ok(Self { stream, batch_size, sequence_length, end_of_text, blocks: None })
    }

    /// The same with windows that begin with a whole block, wherever in the corpus they begin. The stream must insert its landmarks
    /// at regular places.
    pub fn whole_blocks(self) -> Result<Self> {
        let &Landmarks::Insert { id, mem_freq } = self.stream.landmarks() else {
            let expected = "landmarks that are inserted after every mem_freq tokens";
            return Err(Error::Param { name: "whole_blocks", got: "other landmarks, or none".into(), expected });
        };
        let (mem_freq, sequence_length, end_of_text) = (mem_freq as usize, self.sequence_length, self.end_of_text);
        let blocks = Blocks { landmark: id, mem_freq, sequence_length, end_of_text };
        let (got, expected) = (self.stream.tokens().len(), blocks.tokens() as u64 + 1);
        if got < expected {
            return Err(Error::TooShort { got, expected });
        }
        Ok(Self { blocks: Some(blocks), ..self })
    }

    /// The rows of a batch.
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// How windows are laid out, if they have whole blocks.
    pub(crate) fn blocks(&self) -> Option<&Blocks> {
        self.blocks.as_ref()
    }

    /// The stream that batches are drawn from.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Batch number `index` of the run with this `seed`: a pure function of the two.
    pub fn batch(&self, seed: u64, index: u64) -> Batch {
        let mut batch = self.empty();
        self.fill(&mut batch, seed, index);
        batch
    }

    /// Adds windows until the batch is full.
    pub(crate) fn fill(&self, batch: &mut Batch, seed: u64, index: u64) {
        let mut key = *b"landmark-data: windows  --------";
        key[24..].copy_from_slice(&seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(index);
        // At least 1: `new` and `whole_blocks` have seen to it.
        let starts = match &self.blocks {
            None => self.stream.len() - self.sequence_length as u64 - 1,
            Some(blocks) => self.stream.tokens().len() - blocks.tokens() as u64,
        };
        let rows = self.batch_size - batch.rows;
        self.gather(batch, (0..rows).map(|_| below(&mut rng, starts)));
    }

    /// The whole stream in order, in windows that follow each other without overlap, for evaluation. The last batch may
    /// have fewer rows; a rest that fills no window is left out, as the authors do.
    pub fn sequential(&self) -> impl ExactSizeIterator<Item = Batch> + '_ {
        let (window, len) = match &self.blocks {
            None => (self.sequence_length as u64, self.stream.len()),
            Some(blocks) => (blocks.tokens() as u64, self.stream.tokens().len()),
        };
        // A window and its last target take one position more than the window.
        let windows = (len - 1) / window;
        let rows = self.batch_size as u64;
        // In memory there are never more windows than a `usize` counts, but a stream over a file may be longer than that.
        let batches = usize::try_from(windows.div_ceil(rows)).unwrap_or(usize::MAX);
        (0..batches).map(move |batch| {
            let first = batch as u64 * rows;
            let mut batch = self.empty();
            self.gather(&mut batch, (first..windows.min(first + rows)).map(|i| i * window));
            batch
        })
    }

    /// A batch without rows.
    pub(crate) fn empty(&self) -> Batch {
        let sequence_length = self.sequence_length;
        let ids = || Vec::with_capacity(self.batch_size * sequence_length);
        Batch { inputs: ids(), targets: ids(), weights: None, exercises: 0, rows: 0, sequence_length }
    }

    /// Adds the windows that begin at these positions, or with whole blocks at these tokens.
    fn gather(&self, batch: &mut Batch, starts: impl Iterator<Item = u64>) {
        if let Some(blocks) = &self.blocks {
            let mut ids = Vec::with_capacity(blocks.tokens() + 1);
            for start in starts {
                ids.clear();
                ids.extend((start..=start + blocks.tokens() as u64).filter_map(|i| self.stream.tokens().get(i)));
                blocks.lay(&ids, None, batch);
            }
            return;
        }
        let sequence_length = self.sequence_length;
        let landmark = self.stream.landmarks().id();
        let mut ids = Vec::with_capacity(sequence_length + 2);
        for start in starts {
            self.stream.read_into(&mut ids, start, sequence_length + 2);
            // `IGNORE` stands for the one position after the stream's end that a last target may ask for: no loss there.
            ids.resize(sequence_length + 2, IGNORE);
            for i in 0..sequence_length {
                let (input, next) = (ids[i], ids[i + 1]);
                let target = if Some(next) == landmark { ids[i + 2] } else { next };
                let no_loss = Some(input) == landmark || Some(input) == self.end_of_text;
                batch.inputs.push(input);
                batch.targets.push(if no_loss { IGNORE } else { target });
            }
            batch.rows += 1;
        }
    }
}

/// Windows whose blocks are counted from their first token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blocks {
    landmark: u32,
    mem_freq: usize,
    sequence_length: usize,
    end_of_text: Option<u32>,
}

impl Blocks {
    /// The positions of a block.
    pub fn len(&self) -> usize {
        self.mem_freq + 1
    }

    /// The tokens of a window that are no landmarks.
    pub fn tokens(&self) -> usize {
        self.sequence_length - self.sequence_length / self.len()
    }

    /// Adds a window to a batch: one token more than it has, and the weight of each as a target, 0 for no loss.
    pub fn lay(&self, ids: &[u32], weights: Option<&[f32]>, batch: &mut Batch) {
        debug_assert_eq!(ids.len(), self.tokens() + 1);
        let mut push = |input, target, weight| {
            batch.inputs.push(input);
            batch.targets.push(target);
            if let Some(weights) = &mut batch.weights {
                weights.push(weight);
            }
        };
        let mut at = 0;
        for position in 0..self.sequence_length {
            if position % self.len() == self.mem_freq {
                push(self.landmark, IGNORE, 0.);
                continue;
            }
            let (input, target, weight) = (ids[at], ids[at + 1], weights.map_or(1., |weights| weights[at + 1]));
            at += 1;
            if Some(input) == self.end_of_text || weight == 0. {
                push(input, IGNORE, 0.);
            } else {
                push(input, target, weight);
            }
        }
        batch.rows += 1;
    }
}

/// A uniform number below `bound`, without bias (Lemire's multiplication with rejection). Written here, so that no library's
/// next version changes which windows a seed means.
pub(crate) fn below(rng: &mut impl RngCore, bound: u64) -> u64 {
    // 2^64 mod bound: low halves under it belong to results that would come up once too often.
    let threshold = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(bound);
        if product as u64 >= threshold {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LANDMARK: u32 = 50260;
    const END: u32 = 5;

    /// The authors' `get_batch` for one given start, on a materialised stream, line by line.
    fn naive(data: &[u32], start: usize, seq_length: usize) -> (Vec<u32>, Vec<u32>) {
        let x = &data[start..start + seq_length];
        let y = &data[start + 1..start + 1 + seq_length + 1];
        let y: Vec<u32> = (0..seq_length).map(|i| if y[i] == LANDMARK { y[i + 1] } else { y[i] }).collect();
        let skip = |x: u32| x == LANDMARK || x == END;
        (x.to_vec(), x.iter().zip(&y).map(|(&x, &y)| if skip(x) { IGNORE } else { y }).collect())
    }

    fn landmarks() -> impl Strategy<Value = Landmarks> {
        prop_oneof![
            Just(Landmarks::None),
            (1u32..12).prop_map(|mem_freq| Landmarks::Insert { id: LANDMARK, mem_freq }),
            Just(Landmarks::Present { id: LANDMARK }),
        ]
    }

    /// Few different ids, so that the corpus' own ends and landmarks are frequent.
    fn corpus() -> impl Strategy<Value = Vec<u32>> {
        prop::collection::vec(prop_oneof![9 => 0u32..8, 1 => Just(LANDMARK)], 40..200)
    }

    /// The corpus without landmarks of its own, unless that is what the stream is told.
    fn stream(mut corpus: Vec<u32>, landmarks: Landmarks) -> Stream {
        if !matches!(landmarks, Landmarks::Present { .. }) {
            corpus.retain(|&id| id != LANDMARK);
            corpus.resize(corpus.len().max(40), 1);
        }
        Stream::new(corpus, landmarks).unwrap()
    }

    proptest! {
        #[test]
        fn batches_are_windows_with_the_authors_targets(
            corpus in corpus(), landmarks in landmarks(), rows in 1usize..5, window in 1usize..38, seed: u64, index: u64,
        ) {
            let stream = stream(corpus, landmarks);
            let data = stream.read(0, stream.len() as usize).unwrap();
            let batches = Batches::new(stream, rows, window, Some(END)).unwrap();
            let batch = batches.batch(seed, index);
            prop_assert_eq!(&batch, &batches.clone().batch(seed, index));
            prop_assert_eq!((batch.rows, batch.sequence_length), (rows, window));
            prop_assert_eq!((batch.inputs.len(), batch.targets.len()), (rows * window, rows * window));
            let legal: Vec<_> = (0..data.len() - window - 1).map(|start| naive(&data, start, window)).collect();
            for (x, y) in batch.inputs.chunks(window).zip(batch.targets.chunks(window)) {
                prop_assert!(legal.iter().any(|(a, b)| a == x && b == y), "{:?} {:?}", x, y);
            }
        }

        #[test]
        fn sequential_covers_the_stream_once(
            corpus in corpus(), landmarks in landmarks(), rows in 1usize..5, window in 1usize..38,
        ) {
            let stream = stream(corpus, landmarks);
            let mut data = stream.read(0, stream.len() as usize).unwrap();
            let batches = Batches::new(stream, rows, window, Some(END)).unwrap();
            let count = (data.len() - 1) / window;
            let sequential: Vec<Batch> = batches.sequential().collect();
            prop_assert_eq!(batches.sequential().len(), sequential.len());
            prop_assert_eq!(sequential.len(), count.div_ceil(rows));
            prop_assert!(sequential.iter().rev().skip(1).all(|batch| batch.rows == rows));

            let inputs: Vec<u32> = sequential.iter().flat_map(|batch| batch.inputs.clone()).collect();
            prop_assert_eq!(&inputs, &data[..count * window]);
            let targets: Vec<u32> = sequential.iter().flat_map(|batch| batch.targets.clone()).collect();
            data.push(IGNORE);
            let expected: Vec<u32> = (0..count).flat_map(|i| naive(&data, i * window, window).1).collect();
            prop_assert_eq!(targets, expected);
        }

        #[test]
        fn below_stays_below(seed: u64, bound in 1u64..) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            prop_assert!(below(&mut rng, bound) < bound);
        }
    }

    proptest! {
        #[test]
        fn whole_blocks_begin_with_a_block_anywhere(
            corpus in prop::collection::vec(0u32..8, 60..200), mem_freq in 1u32..12, rows in 1usize..5, window in 1usize..38,
            seed: u64, index: u64,
        ) {
            let plain = Stream::new(corpus.clone(), Landmarks::None).unwrap();
            let stream = Stream::new(corpus.clone(), Landmarks::Insert { id: LANDMARK, mem_freq }).unwrap();
            let batches = Batches::new(stream, rows, window, Some(END)).unwrap().whole_blocks().unwrap();
            let length = mem_freq as usize + 1;
            let tokens = window - window / length;
            // What a stream makes of a corpus that begins at the window.
            let expected = |start: usize| {
                let rest = corpus[start..].to_vec();
                let stream = Stream::new(rest, Landmarks::Insert { id: LANDMARK, mem_freq }).unwrap();
                let mut data = stream.read(0, stream.len().min(window as u64 + 2) as usize).unwrap();
                data.resize(window + 2, IGNORE);
                naive(&data, 0, window)
            };
            let batch = batches.batch(seed, index);
            prop_assert_eq!((batch.rows, &batch.weights, batch.exercises), (rows, &None, 0));
            for (x, y) in batch.inputs.chunks(window).zip(batch.targets.chunks(window)) {
                prop_assert!((0..plain.len() as usize - tokens).map(expected).any(|(a, b)| a == x && b == y));
            }
            let sequential: Vec<Batch> = batches.sequential().collect();
            let windows = (corpus.len() - 1) / tokens;
            prop_assert_eq!(sequential.iter().map(|batch| batch.rows).sum::<usize>(), windows);
            let rows = sequential.iter().flat_map(|batch| batch.inputs.chunks(window).zip(batch.targets.chunks(window)));
            for (i, (x, y)) in rows.enumerate() {
                let (a, b) = expected(i * tokens);
                prop_assert_eq!((x, y), (&a[..], &b[..]));
            }
        }
    }

    #[test]
    fn whole_blocks_need_landmarks_at_regular_places() {
        for landmarks in [Landmarks::None, Landmarks::Present { id: LANDMARK }] {
            let batches = Batches::new(Stream::new(vec![1; 30], landmarks).unwrap(), 1, 8, None).unwrap();
            assert!(matches!(batches.whole_blocks(), Err(Error::Param { name: "whole_blocks", .. })));
        }
    }

    #[test]
    fn starts_are_uniform_and_reach_both_ends() {
        // The corpus counts up, so an input is its start.
        let stream = Stream::new((0..12).collect::<Vec<u32>>(), Landmarks::None).unwrap();
        let batches = Batches::new(stream, 100, 3, None).unwrap();
        let mut seen = [0u32; 8];
        for index in 0..80 {
            batches.batch(7, index).inputs.chunks(3).for_each(|window| seen[window[0] as usize] += 1);
        }
        // 8000 draws over 8 starts: the standard deviation of a count is under 30.
        assert!(seen.iter().all(|&count| (850..1150).contains(&count)), "{seen:?}");
    }

    #[test]
    fn seeds_and_indices_give_different_batches_that_never_change() {
        let stream = Stream::new((0..100_000).collect::<Vec<u32>>(), Landmarks::None).unwrap();
        let batches = Batches::new(stream, 4, 1, None).unwrap();
        let starts = |seed, index| batches.batch(seed, index).inputs;
        assert_ne!(starts(0, 0), starts(0, 1));
        assert_ne!(starts(0, 0), starts(1, 0));
        // A recorded draw: another generator here would silently change what "seed 1, resumed at step 1000" means.
        assert_eq!(starts(1, 1000), [57302, 49674, 63439, 61673]);
    }

    #[test]
    fn the_worked_example_of_the_documentation() {
        let (a, b, c, d, e) = (0, 1, 2, 3, 4);
        let stream = Stream::new(vec![a, b, c, d, e], Landmarks::Insert { id: LANDMARK, mem_freq: 2 }).unwrap();
        let batch = Batches::new(stream, 1, 5, Some(END)).unwrap().batch(0, 0);
        assert_eq!(batch.inputs, [a, b, LANDMARK, c, d]);
        assert_eq!(batch.targets, [b, c, IGNORE, d, e]);
    }

    #[test]
    fn bad_arguments_are_errors() {
        let stream = |n| Stream::new(vec![1; n], Landmarks::None).unwrap();
        assert!(matches!(Batches::new(stream(9), 1, 8, None), Err(Error::TooShort { got: 9, expected: 10 })));
        assert!(Batches::new(stream(10), 1, 8, None).is_ok());
        assert!(matches!(Batches::new(stream(10), 1, 1 << 31, None), Err(Error::TooShort { .. })));
        for (rows, window) in [(1, usize::MAX), (usize::MAX, 2), (1 << 30, 8)] {
            assert!(matches!(
                Batches::new(stream(10), rows, window, None),
                Err(Error::Param { name: "batch_size", .. })
            ));
        }
        assert!(matches!(Batches::new(stream(10), 0, 8, None), Err(Error::Param { name: "batch_size", .. })));
        assert!(matches!(Batches::new(stream(10), 1, 0, None), Err(Error::Param { name: "sequence_length", .. })));
    }
}
