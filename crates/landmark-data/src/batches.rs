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

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::{Error, Result, Stream};

/// The target of a position that has no loss.
pub const IGNORE: u32 = u32::MAX;

/// The most ids of a batch: more is a slip of the keyboard, and would end in an allocation that no machine can make.
const MAX_BATCH: usize = 1 << 31;

/// Windows and their targets, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// `rows * sequence_length` ids.
    pub inputs: Vec<u32>,
    /// As many ids, or [`IGNORE`].
    pub targets: Vec<u32>,
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
        Ok(Self { stream, batch_size, sequence_length, end_of_text })
    }

    /// The stream that batches are drawn from.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Batch number `index` of the run with this `seed`: a pure function of the two.
    pub fn batch(&self, seed: u64, index: u64) -> Batch {
        let mut key = *b"landmark-data: windows  --------";
        key[24..].copy_from_slice(&seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(index);
        // At least 1: `new` has seen to it.
        let starts = self.stream.len() - self.sequence_length as u64 - 1;
        self.gather((0..self.batch_size).map(|_| below(&mut rng, starts)))
    }

    /// The whole stream in order, in windows that follow each other without overlap, for evaluation. The last batch may
    /// have fewer rows; a rest that fills no window is left out, as the authors do.
    pub fn sequential(&self) -> impl ExactSizeIterator<Item = Batch> + '_ {
        let window = self.sequence_length as u64;
        // A window and its last target take one position more than the window.
        let windows = (self.stream.len() - 1) / window;
        let rows = self.batch_size as u64;
        // In memory there are never more windows than a `usize` counts, but a stream over a file may be longer than that.
        let batches = usize::try_from(windows.div_ceil(rows)).unwrap_or(usize::MAX);
        (0..batches).map(move |batch| {
            let first = batch as u64 * rows;
            self.gather((first..windows.min(first + rows)).map(|i| i * window))
        })
    }

    fn gather(&self, starts: impl Iterator<Item = u64>) -> Batch {
        let sequence_length = self.sequence_length;
        let capacity = self.batch_size * sequence_length;
        let mut batch = Batch {
            inputs: Vec::with_capacity(capacity),
            targets: Vec::with_capacity(capacity),
            rows: 0,
            sequence_length,
        };
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
        batch
    }
}

/// A uniform number below `bound`, without bias (Lemire's multiplication with rejection). Written here, so that no library's
/// next version changes which windows a seed means.
fn below(rng: &mut impl RngCore, bound: u64) -> u64 {
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
    use crate::Landmarks;

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
