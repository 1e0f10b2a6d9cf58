//! Keys and queries rounded to eight bits.
//!
//! Keys come in groups of 16 whose channels interleave by fours: a register holds four channels of 16 keys, and a query's same four channels meet
//! all of them.

/// Keys of a group.
pub(super) const GROUP: usize = 16;
/// Channels that lie side by side.
pub(super) const WORD: usize = 4;
/// Added to a rounded channel of a key: the machine multiplies unsigned bytes with signed ones.
const OFFSET: i32 = 128;

/// What a register holds, as memory has it at once.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(pub(super) [u8; GROUP * WORD]);

impl Line {
    /// Four channels of each key of a group that has none yet.
    const WORDS: Self = Self([OFFSET as u8; GROUP * WORD]);

    /// As factors of the keys of a group.
    #[inline(always)]
    pub(super) fn factors(&self) -> [f32; GROUP] {
        let bytes = self.0.as_chunks::<4>().0;
        std::array::from_fn(|i| f32::from_le_bytes(bytes[i]))
    }

    fn set_factor(&mut self, lane: usize, factor: f32) {
        self.0.as_chunks_mut::<4>().0[lane] = factor.to_le_bytes();
    }
}

/// Keys in eight bits a channel and a factor for each.
///
/// Keys of a head have most of themselves in common, and what is common changes no choice: they are rounded less an origin, the same for all that are
/// compared.
#[derive(Debug, Clone, Default)]
pub struct RoundedKeys {
    head_dim: usize,
    /// By group: a line for each four channels, `[GROUP, WORD]` plus [`OFFSET`], and one of factors; NaN where it has no key: that reaches nothing.
    pub(super) lines: Vec<Line>,
    len: usize,
}

impl RoundedKeys {
    /// No keys, of so many channels.
    pub fn new(head_dim: usize) -> Self {
        Self { head_dim, lines: Vec::new(), len: 0 }
    }

    /// Keys that there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Channels of a key.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        size_of::<Line>() * self.lines.capacity()
    }

    /// Lines of a group.
    pub(super) fn lines_of_group(&self) -> usize {
        self.head_dim.div_ceil(WORD) + 1
    }

    /// Tells the machine that they will be scored soon, so that memory begins with them.
    #[inline(always)]
    pub(super) fn prefetch(&self) {
        self.lines.iter().for_each(prefetch);
    }

    /// Puts a key, less `origin`, after the others.
    pub fn push(&mut self, key: &[f32], origin: &[f32]) {
        if self.len.is_multiple_of(GROUP) {
            let group = self.lines_of_group();
            // Many lists, each of them large: an eighth more than there is, and not twice as much.
            if self.lines.capacity() < self.lines.len() + group {
                self.lines.reserve_exact((self.len / GROUP / 8).max(2) * group);
            }
            self.lines.resize(self.lines.len() + group - 1, Line::WORDS);
            let mut factors = Line::WORDS;
            (0..GROUP).for_each(|lane| factors.set_factor(lane, f32::NAN));
            self.lines.push(factors);
        }
        self.len += 1;
        self.set(self.len - 1, key, origin);
    }

    /// Puts a key, less `origin`, in the place of another.
    pub fn set(&mut self, at: usize, key: &[f32], origin: &[f32]) {
        let (lane, lines) = (at % GROUP, self.lines_of_group());
        let lines = &mut self.lines[at / GROUP * lines..][..lines];
        let (factor, inverse) = factors(key.iter().zip(origin).map(|(x, origin)| x - origin));
        for (channel, (x, origin)) in key.iter().zip(origin).enumerate() {
            let byte = &mut lines[channel / WORD].0[lane * WORD + channel % WORD];
            *byte = (i32::from(rounded((x - origin) * inverse)) + OFFSET) as u8;
        }
        lines[lines.len() - 1].set_factor(lane, factor);
    }
}

/// Tells the machine that this will be read soon.
#[inline(always)]
pub fn prefetch<T>(what: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: nothing is read: this is a hint, which every machine of this kind has.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(what).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = what;
}

/// What a rounded channel stands for, and its inverse.
#[inline(always)]
pub(super) fn factors(x: impl Iterator<Item = f32>) -> (f32, f32) {
    let largest = x.fold(0f32, |largest, x| largest.max(x.abs()));
    if largest > 0. { (largest / 127., 127. / largest) } else { (0., 0.) }
}

/// The integer that a number between -128 and 127 is nearest to: added to 1.5 * 2^23, it is in the low bits.
#[inline(always)]
fn rounded(x: f32) -> i8 {
    (x + 12_582_912.).to_bits() as i8
}

/// Queries of one head, likewise rounded. Their scores are times a positive factor of each, which no choice depends on.
#[derive(Debug)]
pub struct RoundedQueries {
    /// `[queries, words]`, four channels each.
    pub(super) words: Vec<i32>,
    /// What the keys' [`OFFSET`] adds to the scores of each.
    pub(super) surplus: Vec<i32>,
}

impl RoundedQueries {
    /// Queries `[queries, head_dim]`.
    #[inline(always)]
    pub fn new(queries: &[f32], head_dim: usize) -> Self {
        let words = head_dim.div_ceil(WORD);
        let mut all = Self { words: Vec::with_capacity(queries.len() / head_dim * words), surplus: Vec::new() };
        let mut bytes = vec![0; words * WORD];
        for query in queries.chunks_exact(head_dim) {
            let (_, inverse) = factors(query.iter().copied());
            bytes.iter_mut().zip(query).for_each(|(byte, x)| *byte = rounded(x * inverse));
            all.surplus.push(OFFSET * bytes.iter().map(|&byte| i32::from(byte)).sum::<i32>());
            let bytes = bytes.as_chunks::<WORD>().0;
            all.words.extend(bytes.iter().map(|bytes| i32::from_le_bytes(bytes.map(i8::cast_unsigned))));
        }
        all
    }
}
