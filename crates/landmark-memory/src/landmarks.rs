//! Landmark keys in the type that blocks are stored in, for who needs a few of them: an index, which has rounded keys of its own.
//!
//! A landmark is what its block's unit decodes to, so its type holds it without loss. The keys lie in parts of as many blocks each: memory grows by
//! parts, and none is ever copied to a larger place.

use landmark_attention::retrieval;

use crate::codec::Codec;

/// Blocks of a part.
const PART: usize = 1024;

/// The landmark keys of one layer.
#[derive(Debug)]
pub struct Landmarks {
    codec: Codec,
    heads: usize,
    /// `[blocks, heads]` rows of the codec each, at most [`PART`] blocks.
    parts: Vec<Vec<u8>>,
    len: usize,
}

impl Landmarks {
    /// Of no blocks.
    pub fn new(codec: Codec, heads: usize) -> Self {
        Self { codec, heads, parts: Vec::new(), len: 0 }
    }

    /// Blocks whose landmarks are there.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Vec::capacity).sum()
    }

    /// Bytes of memory that so many blocks take.
    pub fn bytes_of(&self, blocks: usize) -> usize {
        blocks.next_multiple_of(PART) * self.heads * self.codec.row()
    }

    /// Takes in a block's keys `[heads, head_dim]`, as they were decoded.
    pub fn push(&mut self, keys: &[f32]) {
        let row = self.codec.row();
        if self.len.is_multiple_of(PART) {
            self.parts.push(Vec::with_capacity(PART * self.heads * row));
        }
        let part = self.parts.last_mut().expect("a part with room");
        for key in keys.chunks_exact(self.codec.head_dim) {
            let begin = part.len();
            part.resize(begin + row, 0);
            self.codec.encode_again(key, &mut part[begin..]);
        }
        self.len += 1;
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.len = 0;
    }

    /// A key as it is kept.
    fn row(&self, head: usize, block: usize) -> &[u8] {
        let row = self.codec.row();
        &self.parts[block / PART][(block % PART * self.heads + head) * row..][..row]
    }
}

impl retrieval::Keys for Landmarks {
    fn key(&self, head: usize, block: usize, into: &mut [f32]) {
        self.codec.decode_again(self.row(head, block), into);
    }

    fn will_need(&self, head: usize, block: usize) {
        self.row(head, block).chunks(64).for_each(|line| retrieval::prefetch(&line[0]));
    }
}
