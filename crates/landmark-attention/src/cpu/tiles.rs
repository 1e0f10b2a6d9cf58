//! How the keys that a tile of queries sees are cut into tiles of keys.

/// Ordinary keys `start..end` of one block, and the landmark that closes it, if it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    pub start: usize,
    pub end: usize,
    /// Whether key `end` is the block's landmark and opens the block to some query of the tile. Only then is the block's inner
    /// softmax needed, and the block may not be cut.
    pub landmark: bool,
}

impl Block {
    /// The ordinary keys.
    #[inline(always)]
    pub fn tokens(&self) -> std::ops::Range<usize> {
        self.start..self.end
    }

    /// One past the block's last key.
    fn last(&self) -> usize {
        self.end + self.landmark as usize
    }
}

/// A run of keys that is handled at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyTile {
    /// Whole blocks `first..last` that are earlier blocks to every query of the tile.
    Past(std::ops::Range<usize>),
    /// A block that some queries of the tile are in (or before) while others are past it.
    Mixed(Block),
    /// A piece of a block that no query of the tile is past: no landmark, just a causal mask.
    Own(Block),
}

/// The tiles of keys for queries at positions `first..=last`, given the row's `landmarks` (ascending places), `target` keys a
/// tile where blocks allow it. `blocks` receives the past blocks that [`KeyTile::Past`] indexes.
pub fn key_tiles(
    landmarks: &[usize],
    first: usize,
    last: usize,
    target: usize,
    blocks: &mut Vec<Block>,
) -> Vec<KeyTile> {
    blocks.clear();
    let past = landmarks.partition_point(|&l| l < first);
    let mut tiles = Vec::new();
    let (mut start, mut tile_start) = (0, 0);
    for &l in &landmarks[..past] {
        // A tile is closed before the block that would overfill it.
        if tile_start < blocks.len() && l + 1 - blocks[tile_start].start > target {
            tiles.push(KeyTile::Past(tile_start..blocks.len()));
            tile_start = blocks.len();
        }
        blocks.push(Block { start, end: l, landmark: true });
        start = l + 1;
    }
    if tile_start < blocks.len() {
        tiles.push(KeyTile::Past(tile_start..blocks.len()));
    }
    for &l in landmarks[past..].iter().take_while(|&&l| l < last) {
        tiles.push(KeyTile::Mixed(Block { start, end: l, landmark: true }));
        start = l + 1;
    }
    // The landmark at `last`, if there is one, closes the last query's own block: no candidate, and nothing follows it.
    let end = if landmarks.binary_search(&last).is_ok() { last } else { last + 1 };
    while start < end {
        let piece = end.min(start + target);
        tiles.push(KeyTile::Own(Block { start, end: piece, landmark: false }));
        start = piece;
    }
    tiles
}

/// Keys of a tile: `start..end`, landmarks included.
pub fn key_range(tile: &KeyTile, blocks: &[Block]) -> std::ops::Range<usize> {
    match tile {
        KeyTile::Past(range) => blocks[range.start].start..blocks[range.end - 1].last(),
        KeyTile::Mixed(block) | KeyTile::Own(block) => block.start..block.last(),
    }
}
